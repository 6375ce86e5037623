"""The scores of tensors, read block by block: to select among them, and to cut by them."""

from collections.abc import Callable, Iterator

from lpsparse.checkpoint.counting import check_finite, nonfinite
from lpsparse.checkpoint.dtypes import Bits, ordered
from lpsparse.checkpoint.open import Checkpoint
from lpsparse.checkpoint.tensors import Blocks, Tensor
from lpsparse.errors import UsageError
from lpsparse.parallel.threads import parallel
from lpsparse.pruning.criteria.base import Criterion
from lpsparse.pruning.cuts import divides, joined, table_of
from lpsparse.pruning.select import Scored


def cut_each(
    tensor: Tensor, blocks: Blocks, criterion: Criterion, cut: Callable[[Bits, Bits], None], grain: int = 1
) -> Blocks:
    """A copy of each block, a multiple of `grain` lines, after `cut` of it and its scores."""
    for line, block in joined(blocks, grain):
        scores, copy = criterion.score(ordered(block, tensor.dtype), tensor, line), block.copy()
        cut(copy, scores)
        del scores, block  # each thread would hold them while it writes
        yield line, copy


def is_wide(tensors: list[Tensor], criterion: Criterion) -> bool:
    return any(criterion.dtype(tensor) == "F64" for tensor in tensors)


def check_divides(flag: str, tensors: list[Tensor], rows: int, columns: int) -> None:
    """Raises UsageError for tensors that do not consist of such blocks."""
    odd = [tensor for tensor in tensors if not divides(tensor, rows, columns)]
    if odd:
        high, wide = table_of(odd[0])
        what = f"{flag}: {odd[0].name!r}: {high} rows of {wide} do not divide into {rows} x {columns}"
        others = f"; nor do {', '.join(tensor.name for tensor in odd[1:9])}" if len(odd) > 1 else ""
        more = f" and {len(odd) - 9} more" if len(odd) > 9 else ""
        raise UsageError(
            215, what + others + more, hint="--exclude them (it takes globs), or choose other numbers"
        )


def check_all_finite(source: Checkpoint, tensors: list[Tensor]) -> None:
    def check(tensor: Tensor) -> None:
        for _, raw in tensor.blocks():
            finite_codes(source, tensor, raw)

    parallel(check, tensors)


def finite_codes(source: Checkpoint, tensor: Tensor, raw: Bits) -> Bits:
    codes = ordered(raw, tensor.dtype)
    check_finite(source, tensor, nonfinite(codes, tensor.dtype))
    return codes


def scored_of(source: Checkpoint, tensor: Tensor, criterion: Criterion) -> Scored:
    def scores(first: int, last: int) -> Iterator[Bits]:
        for line, raw in tensor.blocks(first, last):
            yield criterion.score(finite_codes(source, tensor, raw), tensor, line)

    return Scored(tensor.name, criterion.dtype(tensor), *tensor.grid, scores)
