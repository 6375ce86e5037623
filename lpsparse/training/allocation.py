"""Share a count of zeros among tensors by their scores, and make exact masks.

Shares: global, the smallest scores wherever they are; lamp, the smallest w**2 / (sum of the squares that
are not smaller in its tensor), which never empties a tensor whose scale is small (Lee et al. 2021, arXiv
2010.07611); uniform, one sparsity for all; erk, density in proportion to sum(shape) / prod(shape) (Evci et
al. 2020, arXiv 1911.11134).
"""

import numpy as np
import torch
from torch import Tensor

from lpsparse.parallel import ranks

SHARES = ("global", "lamp", "uniform", "erk")


def kth_smallest(values: Tensor, count: int, *, across: bool = False) -> Tensor:
    """The count-th smallest (count from 1) of a flat tensor that is not negative, 0-dim.

    float32 on a CPU: looked for among those alone that share its upper 16 bits, which takes a fourth of the
    time (such bits are in the order of the numbers). `across`: of the values of all processes, found by the
    counts of each 16 bits; all processes call it.
    """
    if across:
        return _kth_across(values, count)
    if values.device.type != "cpu" or values.dtype != torch.float32:
        return values.kthvalue(count).values
    upper = values.view(torch.int32) >> 16
    reached = torch.bincount(upper).cumsum(0)
    bucket = int((reached < count).sum())
    before = int(reached[bucket - 1]) if bucket else 0
    return values[upper == bucket].kthvalue(count - before).values


def _kth_across(values: Tensor, count: int) -> Tensor:
    kind = torch.int64 if values.element_size() == 8 else torch.int32
    bits, found = values.view(kind), 0
    left = bits
    for shift in range(8 * values.element_size() - 16, -1, -16):
        digits = (left >> shift) & 0xFFFF
        reached = ranks.all_reduce_counts(torch.bincount(digits, minlength=1 << 16)).cumsum(0)
        digit = int((reached < count).sum())
        count -= int(reached[digit - 1]) if digit else 0
        left, found = left[digits == digit], found << 16 | digit
    return torch.tensor([found], dtype=kind).view(values.dtype)[0].to(values.device)


@torch.no_grad()
def keep_only_(values: Tensor, keep: Tensor) -> None:
    """Set what is not kept to +0, in place. On a CPU masked_fill_ takes as long as all of AdamW's step, and
    numpy's product a tenth of it."""
    if values.device.type != "cpu" or type(values.data) is not Tensor:
        values.masked_fill_(~keep, 0.0)
        return
    array = values.numpy(force=True)
    np.multiply(array, keep.numpy(), out=array)
    np.add(array, 0.0, out=array)  # -0 becomes +0


@torch.no_grad()
def allocate(scores: dict[str, Tensor], count: int, share: str, *, across: bool = False) -> dict[str, int]:
    """How many of `count` zeros each tensor gets; ties by tensor name, then position. Exact in sum.
    `scores` are not negative; one that is exactly 0 goes before any other, whatever the shares.
    `across` (global only): each process has consecutive parts of all tensors, by rank, and gets the zeros
    of its own parts; all processes call it."""
    names = sorted(scores)
    if count == 0 or not names:
        return dict.fromkeys(names, 0)
    if share in ("uniform", "erk"):
        return _by_shape({name: scores[name] for name in names}, count, share)
    ranked = [_lamp(scores[name]) if share == "lamp" else scores[name].abs().flatten() for name in names]
    threshold = kth_smallest(torch.cat(ranked), count, across=across)
    below = [int((score < threshold).sum()) for score in ranked]
    ties = [int((score == threshold).sum()) for score in ranked]
    found = ranks.all_gather((below, ties)) if across else [(below, ties)]
    left = count - sum(sum(each) for each, _ in found)
    for k in range(len(names)):
        for rank, (_, at) in enumerate(found):
            taken = min(left, at[k])
            below[k] += taken if len(found) == 1 or rank == ranks.rank() else 0
            left -= taken
    return dict(zip(names, below, strict=True))


def _by_shape(scores: dict[str, Tensor], count: int, share: str) -> dict[str, int]:
    """Densities k * weight, at most 1, with k such that the zeros add up; what rounding leaves goes to the
    largest, and no tensor has fewer than it has scores of 0."""
    sizes = {name: score.numel() for name, score in scores.items()}
    least = {name: int((score == 0).sum()) for name, score in scores.items()}
    least = least if sum(least.values()) <= count else dict.fromkeys(least, 0)
    weight = {
        name: sum(score.shape) / score.numel() if share == "erk" else 1.0 for name, score in scores.items()
    }
    whole: set[str] = set()  # tensors that stay dense
    while True:
        part = [name for name in sizes if name not in whole]
        kept = sum(sizes[name] for name in part) - count  # what the others keep beside the dense ones
        k = kept / sum(weight[name] * sizes[name] for name in part)
        more = {name for name in part if k * weight[name] > 1}
        if not more:
            break
        whole |= more
    zeros = {
        name: max(
            least[name], 0 if name in whole else min(size, max(0, round((1 - k * weight[name]) * size)))
        )
        for name, size in sizes.items()
    }
    for name in sorted(sizes, key=lambda each: (each in whole, -sizes[each])):
        moved = min(max(count - sum(zeros.values()), least[name] - zeros[name]), sizes[name] - zeros[name])
        zeros[name] += moved
    return zeros


def _lamp(score: Tensor) -> Tensor:
    """LAMP of each score in float64, in the order of `score`."""
    squares, order = score.detach().flatten().double().square().sort(stable=True)
    rest = squares.flip(0).cumsum(0).flip(0)  # of itself and all that follow
    lamp = torch.empty_like(squares)
    lamp[order] = squares / rest.clamp(min=torch.finfo(torch.float64).tiny)
    return lamp


@torch.no_grad()
def smallest_masks(scores: dict[str, Tensor], counts: dict[str, int]) -> dict[str, Tensor]:
    """True where a weight is kept: all but the `counts`
    smallest scores of each tensor, ties by position."""
    masks: dict[str, Tensor] = {}
    for name, score in scores.items():
        size, count = score.abs().flatten(), counts[name]
        if count == 0:
            masks[name] = torch.ones_like(score, dtype=torch.bool)
            continue
        edge = kth_smallest(size, count)
        keep = size > edge
        ties = (size == edge).nonzero().flatten()  # in order of position
        spared = ties[count - int((size < edge).sum()) :]
        keep[spared] = True
        masks[name] = keep.view(score.shape)
    return masks
