"""Count zeros, kept values, NaN and Inf in tensors, with a checksum of their bits."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lpsparse.checkpoint.dtypes import DTYPES, Bits, infinity, ordered
from lpsparse.checkpoint.tensors import Blocks, Checkpoint, Tensor
from lpsparse.errors import InputError
from lpsparse.parallel.progress import advance, phase
from lpsparse.parallel.threads import parallel

_TASK_BYTES = 32 << 20  # what a thread counts at a time

Sums = dict[str, tuple[int, int]]  # of each tensor, `stored` and `total` of its Count
Cut = Callable[[Blocks], Blocks]  # a stream of blocks in, the same lines out with more zeros
Cuts = Callable[[Tensor], Cut | None]


@dataclass(frozen=True, slots=True)
class Count:
    """Counts of a tensor, or of some of its lines."""

    zeros: int  # exact zeros of either sign (for integers: zero)
    stored: int  # values that are not the all-zero bit pattern: -0.0 counts
    nonfinite: int
    total: int  # modulo 2**64, the sum of the raw bits of each line (8 bytes a word where lines are made of
    # them) times an odd number of its own: another one shows that bits are others, or elsewhere

    def __add__(self, other: "Count") -> "Count":
        return Count(
            self.zeros + other.zeros,
            self.stored + other.stored,
            self.nonfinite + other.nonfinite,
            (self.total + other.total) % 2**64,
        )


NOTHING = Count(0, 0, 0, 0)


def count_block(line: int, block: Bits, dtype: str) -> Count:
    """Counts of a block of lines that begins with this line."""
    advance(block.nbytes)
    stored, total = sums_of(line, block)
    if not DTYPES[dtype].is_float or _is_plain(block, dtype):
        return Count(block.size - stored, stored, 0, total)
    codes = ordered(block, dtype)
    return Count(block.size - int(np.count_nonzero(codes)), stored, nonfinite(codes, dtype), total)


def sums_of(line: int, block: Bits) -> tuple[int, int]:
    """`stored` and `total` of `Count`."""
    words = block
    if block.shape[-1] * block.itemsize % 8 == 0:
        words = np.ascontiguousarray(block).view(np.uint64)  # of a torch file's view, the block is not
    one = words.shape[1] == 1  # a sum of each would take 20 times as long
    each = words[:, 0].astype(np.uint64) if one else words.sum(axis=1, dtype=np.uint64)
    weights = 2 * np.arange(line, line + len(each), dtype=np.uint64) + 1
    return int(np.count_nonzero(block)), int((each * weights).sum(dtype=np.uint64))


def _is_plain(block: Bits, dtype: str) -> bool:
    """Whether there is no -0, Inf or NaN: of sign and magnitude the extremes tell, without a copy."""
    if not block.size:
        return True
    top, limit = 1 << (8 * block.itemsize - 1), infinity(dtype)
    signed = block.view(f"<i{block.itemsize}")
    return -top < int(signed.min()) and int(signed.max()) < limit and int(block.max()) < top + limit


def count(tensor: Tensor, blocks: Blocks) -> Count:
    return sum((count_block(line, block, tensor.dtype) for line, block in blocks), NOTHING)


def count_all(checkpoint: Checkpoint, cut: Cuts = lambda _: None) -> dict[str, Count]:
    """Counts of each tensor, as it is or after `cut`."""
    tasks: list[tuple[Tensor, int, int]] = []
    for tensor in checkpoint.tensors:
        whole = cut(tensor) is not None  # it goes from the first line to the last
        tasks += [(tensor, *task) for task in tensor.tasks(tensor.nbytes if whole else _TASK_BYTES)]

    def counted(task: tuple[Tensor, int, int]) -> Count:
        tensor, first, last = task
        apply = cut(tensor)
        return count(tensor, apply(tensor.blocks()) if apply else tensor.blocks(first, last))

    found = {tensor.name: NOTHING for tensor in checkpoint.tensors}
    with phase("reading", checkpoint.dense_bytes):
        counts = parallel(counted, tasks)
    for (tensor, _, _), each in zip(tasks, counts, strict=True):
        found[tensor.name] += each
    return found


def nonfinite(codes: Bits, dtype: str) -> int:
    """How many of some ordered magnitudes are NaN or Inf."""
    limit = infinity(dtype)
    if not codes.size or int(codes.max()) < limit:
        return 0
    return int(np.count_nonzero(codes >= codes.dtype.type(limit)))


def check_finite(source: Checkpoint, tensor: Tensor, bad: int) -> None:
    """Raise InputError when a block has `bad` values that are NaN or Inf."""
    if bad:
        what = f"{source.name}/{tensor.file}: {tensor.name!r}: {bad} values are NaN or Inf"
        raise InputError(334, what, hint="fix the checkpoint; `lpsparse report` lists the tensors")
