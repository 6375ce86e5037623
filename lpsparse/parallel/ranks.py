"""Collectives between ranks, and models sharded over them. The only file that uses torch.distributed.

One process is world size 1: every function then returns at once. A function that says "all ranks" is a
collective: all of them call it, or none.
"""

import os
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed, nn

from lpsparse.errors import LpsparseError, ResourceError, UsageError, is_out_of_memory
from lpsparse.parallel.threads import Processes, sharing_with

T = TypeVar("T")

_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}

_MEETING = timedelta(minutes=10)  # for ranks to connect

_patient: Any = None  # a process group without a time limit to speak of

MISSED = 604  # code of the error of a rank that waited for one that is gone or late


def _is_one() -> bool:
    return not distributed.is_available() or not distributed.is_initialized()


def rank() -> int:
    return 0 if _is_one() else distributed.get_rank()


def world_size() -> int:
    return 1 if _is_one() else distributed.get_world_size()


def _device() -> torch.device:
    """Device that the process group's tensors must be on."""
    on_cpu = "gloo" in distributed.get_backend() or "cpu" in str(distributed.get_backend_config())
    return torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())


def all_reduce_sum(numbers: Sequence[float]) -> list[float]:
    """Sum each number over all ranks, in float64."""
    if _is_one():
        return list(numbers)
    held = torch.tensor(numbers, dtype=torch.float64, device=_device())
    distributed.all_reduce(held)
    return held.tolist()


def all_reduce_counts(counts: Tensor) -> Tensor:
    """Sum an integer tensor over all ranks."""
    if _is_one():
        return counts
    held = counts.to(_device())
    distributed.all_reduce(held)
    return held.to(counts.device)


def all_reduce_max(numbers: Sequence[float]) -> list[float]:
    """Maximum of each number over all ranks."""
    if _is_one():
        return list(numbers)
    held = torch.tensor(numbers, dtype=torch.float64, device=_device())
    distributed.all_reduce(held, distributed.ReduceOp.MAX)
    return held.tolist()


def all_gather(value: Any) -> list[Any]:
    """`value` of every rank, in order. For small values: they are sent as Python objects."""
    if _is_one():
        return [value]
    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, value)
    return found


def run_on_rank_0(make: Callable[[], T]) -> T:
    """Run `make` on rank 0 and return its result on all ranks, or raise its LpsparseError. No timeout."""
    if _is_one():
        return make()
    found: T | None = None
    error: LpsparseError | None = None
    if rank() == 0:
        try:
            found = make()
        except LpsparseError as raised:
            error = raised
    found, told = all_gather_no_timeout((found, error))[0]
    if told is not None:
        raise error or told
    return cast("T", found)


def all_gather_no_timeout(value: Any) -> list[Any]:
    """`all_gather` without a timeout: a rank may work for hours before it has its value."""
    barrier()
    return all_gather(value)


@contextmanager
def together() -> Generator[None]:
    """Share the work on checkpoints inside among all ranks of a job: each reads, cuts and writes its part,
    rank 0 makes and renames OUT, and all get the result.

    Uses gloo, or the existing process group, and keeps it: a launcher's store cannot be joined twice. Raises
    ResourceError when a rank is gone, UsageError when the launcher set no address to meet at.
    """
    if _is_one():
        _meet()
    with lost_rank_errors():
        make_barrier_group()
        with sharing_with(Processes(rank(), world_size(), all_gather_no_timeout, run_on_rank_0)):
            yield
        barrier()


def _meet() -> None:
    try:
        distributed.init_process_group("gloo", timeout=_MEETING)
    except ValueError as error:  # WORLD_SIZE without MASTER_ADDR
        raise UsageError(
            257, f"several processes: {error}", hint="start them with torchrun or srun"
        ) from error
    except RuntimeError as error:
        line = str(error).strip().partition("\n")[0][:200]
        what = f"rank {os.environ.get('RANK')}: the other ranks did not connect: {line}"
        raise ResourceError(MISSED, what, hint="see what ended the other processes") from error


def make_barrier_group() -> None:
    """Make the group that `barrier` uses. All ranks call it, early: a rank that dies before is not missed."""
    global _patient
    if not _is_one() and _patient is None:
        _patient = distributed.new_group(backend="gloo", timeout=timedelta(days=30))


def barrier() -> None:
    """Wait for all ranks, without a timeout: one of them may work alone for long (writing, tokenising)."""
    make_barrier_group()
    if not _is_one():
        distributed.barrier(_patient)


def _is_of_waiting(error: RuntimeError) -> bool:
    """torch has a class for NCCL's; gloo's errors, its barrier's too, are plain and name their source."""
    known = isinstance(error, distributed.DistError)
    return known or any(word in str(error) for word in ("gloo", "Connection", "ProcessGroup", "barrier"))


@contextmanager
def lost_rank_errors(doing: str = "") -> Generator[None]:
    """Turn the error of a collective whose other rank is gone or late into ResourceError."""
    try:
        yield
    except RuntimeError as error:
        if _is_one() or is_out_of_memory(error) or not _is_of_waiting(error):
            raise
        line = str(error).strip().partition("\n")[0][:200]
        what = f"process {rank()}: {doing}{type(error).__name__}: {line}"
        hint = "see what ended the other processes (--debug shows where this one was)"
        raise ResourceError(MISSED, what, hint=hint) from error


def broadcast_buffers(model: nn.Module) -> None:
    """Copy the buffers (running statistics) of rank 0, which are the ones that are written, to all ranks."""
    if not _is_one():
        for buffer in model.buffers():
            distributed.broadcast(buffer, 0)


def average_(tensors: Sequence[Tensor]) -> None:
    """Replace each 1-D tensor by its mean over all ranks, in place."""
    if not tensors or _is_one():
        return
    flat = torch.cat(list(tensors))
    distributed.all_reduce(flat)
    means = flat.div_(distributed.get_world_size()).split([len(tensor) for tensor in tensors])
    for tensor, mean in zip(tensors, means, strict=True):
        tensor.copy_(mean)


def first_different_rank(value: str) -> int | None:
    """First rank whose value differs from rank 0's; None if all are equal."""
    found = all_gather(value)
    return next((i for i, each in enumerate(found) if each != found[0]), None)


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, on the same memory; any other tensor as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # pyright: ignore[reportAttributeAccessIssue]


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "to_local")  # a DTensor, whose import takes a second


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, on every rank (a collective); any other tensor as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # pyright: ignore[reportAttributeAccessIssue]


def distribute(
    model: nn.Module, device: torch.device, blocks: Iterable[nn.Module] = (), *, shard: bool, bf16: bool
) -> None:
    """Move `model` to `device` with the values of rank 0 on all ranks; the others may be on the meta device.

    With `shard` each rank keeps its part of the first dimension of every parameter (FSDP2), gathered block by
    block; only rank 0 ever holds more than one block's parameters beside these parts.
    """
    if shard:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        options: dict[str, Any] = {"mp_policy": policy} if bf16 else {}
        for part in (*blocks, model):
            _receive(part, device)
            fully_shard(part, **options)
    elif not _is_one():
        _receive(model, device)
    model.to(device)
    broadcast_buffers(model)


def _receive(module: nn.Module, device: torch.device) -> None:
    """Receive the parameters of rank 0 that are not sharded yet. Tied ones stay tied."""
    for param in module.parameters():
        if is_sharded(param):
            continue
        value = torch.empty_like(param, device=device) if param.is_meta else param.detach().to(device)
        value = value.contiguous()
        distributed.broadcast(value, 0)
        if param.is_meta:
            torch.utils.swap_tensors(param, nn.Parameter(value, requires_grad=param.requires_grad))
        else:
            param.data = value


def reshard(model: Any) -> None:
    """Shard again after a forward pass without a backward pass: FSDP2 leaves the outermost parameters
    gathered, in the place of those that train."""
    if hasattr(model, "reshard"):
        model.reshard()


@contextmanager
def no_sync(model: Any) -> Generator[None]:
    """Accumulate gradients on each rank, without all-reducing them."""
    if hasattr(model, "set_requires_gradient_sync"):  # FSDP2
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)
    else:
        with model.no_sync() if hasattr(model, "no_sync") else nullcontext():  # DDP
            yield


def to_float(value: Any) -> float:
    """A 0-dim tensor, sharded or not, as a float; None is 0. A collective."""
    return float(full_tensor(value)) if isinstance(value, Tensor) else float(value or 0)


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """A cheap checksum that differs once an update was lost or applied twice."""
    total = 0
    for place, tensor in enumerate(tensors, 1):
        bits = tensor.detach().contiguous().view(_BITS[tensor.element_size()])
        total += place * int(bits.sum(dtype=torch.int64))
    return str(total % 2**64)


def load_averages(optimizer: Any, state: dict[str, Any]) -> None:
    """`optimizer.load_state_dict` where the state holds local parts of sharded tensors, and without the
    warning about settings of the decay that change from step to step."""
    for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
        group.update({key: value for key, value in saved.items() if key.startswith("lp_")})
    optimizer.load_state_dict(state)
    for param, values in optimizer.state.items():
        for key, value in values.items():
            if is_sharded(param) and isinstance(value, Tensor) and value.ndim:
                values[key] = _like(param, value)


def _like(param: Any, part: Tensor) -> Tensor:
    """The tensor of which `part` is this process's part, sharded as `param` is."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part, param.device_mesh, param.placements, shape=param.shape, stride=param.stride()
    )
