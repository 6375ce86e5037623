"""Estimate the memory of each process from what the code keeps for each weight, for `finetune --dry-run`.

In bytes, float32 masters. Activations depend on the model and the batch, and are not in it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from lpsparse.checkpoint.dtypes import DTYPES
from lpsparse.checkpoint.tensors import Tensor
from lpsparse.families import METHODS
from lpsparse.steps.finetune import FinetuneStep

_WEIGHT, _GRADIENT = 4, 4
_AVERAGES = {"adamw": 8, "sgd": 4, "muon": 4, "adafactor": 0}  # adafactor's are of rows and columns
_COVERED, _SPARED, _LIVING = 4, 1, 1  # control: the value under a cover, who is spared, who lives
_DIVISOR = 4  # decay: from before the optimizer's step to after it
_CHOICE = 4 + 4 + 4  # allocation: scores, all of them in one list, and what is looked at of each


@dataclass(frozen=True, slots=True)
class Memory:
    kept: int  # bytes a process has throughout, in the decay phase
    peak: int  # bytes more at the highest moment of a step: choosing, or the decay
    exchanged: int  # bytes a process sends in a step


def estimate(step: FinetuneStep, *, trained: int, frozen: int, prunable: int, processes: int) -> Memory:
    """Of `trained` and `frozen` weights, of which `prunable` may be cut.

    Exchanged by rings of `processes`: DDP reduces and gathers the gradients; FSDP2 gathers the weights for
    the forward and again for the backward pass (in bf16 half of them), and reduces the gradients.
    """
    share = processes if step.shard else 1
    method = METHODS[step.method]
    selects = step.target_sparsity is not None and method.selects and step.selective
    extra = _SPARED * selects + _COVERED * (selects and step.masked_forward)
    extra += _LIVING * (step.target_sparsity is not None and not method.selects)
    each = _WEIGHT + _GRADIENT + _AVERAGES.get(step.optimizer, 8)
    kept = (each * trained + _WEIGHT * frozen + extra * prunable) / share
    if step.distill or step.distill_blocks:
        kept += _WEIGHT * (trained + frozen) / share  # the teacher
    work = max(_DIVISOR * method.decays, _CHOICE * (step.target_sparsity is not None)) * prunable / share
    ring = (processes - 1) / processes
    width = 2 if step.shard and step.mixed_precision == "bf16" else 4
    moved = 2 * width * (trained + frozen) + 4 * trained if step.shard else 2 * 4 * trained
    return Memory(int(kept), int(work), int(ring * moved))


def trained_and_frozen(step: FinetuneStep, tensors: Iterable[Tensor]) -> tuple[int, int]:
    """Weights of a checkpoint that `step` would train, and that it would leave, by names and dtypes alone."""
    trained = frozen = 0
    for tensor in tensors:
        if DTYPES[tensor.dtype].is_float:
            kept = any(fnmatchcase(tensor.name, pattern) for pattern in step.freeze)
            trained, frozen = trained + tensor.size * (not kept), frozen + tensor.size * kept
    return trained, frozen


def of_measuring(weights: int) -> int:
    """Bytes of a model that is only measured."""
    return _WEIGHT * weights
