"""Singular values, on request: they take minutes where counting takes a second."""

import numpy as np

from lpsparse.checkpoint.dtypes import DTYPES
from lpsparse.checkpoint.open import Checkpoint
from lpsparse.checkpoint.tensors import Tensor
from lpsparse.parallel.progress import advance, phase
from lpsparse.parallel.threads import parallel
from lpsparse.reporting.changes import floats
from lpsparse.reporting.records import Spectrum

_MOST_VALUES = 1 << 27  # of a matrix: its float64 copies and LAPACK's work take about 3 GB then


def spectra(checkpoint: Checkpoint, names: set[str]) -> dict[str, Spectrum]:
    """The largest and the smallest singular value of each matrix of `names` (rows by the rest), in float64.
    Left out are those with NaN or Inf, without values, and of over 2**27 values."""
    chosen = [
        tensor
        for tensor in checkpoint.tensors
        if tensor.name in names
        and len(tensor.shape) > 1
        and 0 < tensor.size <= _MOST_VALUES
        and DTYPES[tensor.dtype].is_float
    ]
    with phase("singular values", sum(tensor.nbytes for tensor in chosen)):
        found = parallel(_spectrum, chosen)
    return {tensor.name: each for tensor, each in zip(chosen, found, strict=True) if each is not None}


def _spectrum(tensor: Tensor) -> Spectrum | None:
    matrix = floats(tensor.read(), tensor.dtype).reshape(tensor.rows, -1).astype(np.float64)
    advance(tensor.nbytes)
    if not np.isfinite(matrix).all():
        return None
    values = np.linalg.svd(matrix, compute_uv=False)
    largest, smallest = float(values[0]), float(values[-1])
    return Spectrum(
        largest=largest, smallest=smallest, condition=largest / smallest if smallest > 0 else None
    )
