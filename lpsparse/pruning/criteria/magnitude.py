"""The magnitude |w| as it is stored: no arithmetic, hence exact."""

from lpsparse.pruning.criteria.base import Criterion

MAGNITUDE = Criterion(score=lambda codes, tensor, line: codes, dtype=lambda tensor: tensor.dtype)
