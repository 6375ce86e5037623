"""What processes tell one another, and starting them. The only file that uses torch.distributed.

One process is the same code: every function then answers at once. A function that says "of all" or "all
processes" is a collective: all of them call it, or none.
"""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed, nn

from lpsparse.borrowed import borrow
from lpsparse.checkpoint.threads import Processes, among
from lpsparse.errors import (
    ExitCode,
    LaunchError,
    LpsparseError,
    ResourceError,
    UsageError,
    is_out_of_memory,
)

T = TypeVar("T")

_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
_PATIENCE = 24 * 3600  # seconds that processes which were asked to stop have to end their step and save
_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)
_MEETING = timedelta(minutes=10)  # that processes have to find one another
_patient: Any = None  # a process group without a time limit to speak of
MISSED = 604  # code of the error of a process that waited for one that is gone or late
_TOGETHER = 2.0  # seconds: failures so near to the first one may be its cause


def _is_one() -> bool:
    return not distributed.is_available() or not distributed.is_initialized()


def rank() -> int:
    return 0 if _is_one() else distributed.get_rank()


def ranks() -> int:
    return 1 if _is_one() else distributed.get_world_size()


def _device() -> torch.device:
    """Where the process group takes its tensors."""
    on_cpu = "gloo" in distributed.get_backend() or "cpu" in str(distributed.get_backend_config())
    return torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())


def sums(numbers: Sequence[float]) -> list[float]:
    """The sum over all processes of each number, in float64."""
    if _is_one():
        return list(numbers)
    held = torch.tensor(numbers, dtype=torch.float64, device=_device())
    distributed.all_reduce(held)
    return held.tolist()


def summed(counts: Tensor) -> Tensor:
    """The sum over all processes of an integer tensor."""
    if _is_one():
        return counts
    held = counts.to(_device())
    distributed.all_reduce(held)
    return held.to(counts.device)


def most(numbers: Sequence[float]) -> list[float]:
    """The largest over all processes of each number."""
    if _is_one():
        return list(numbers)
    held = torch.tensor(numbers, dtype=torch.float64, device=_device())
    distributed.all_reduce(held, distributed.ReduceOp.MAX)
    return held.tolist()


def gathered(value: Any) -> list[Any]:
    """`value` of every process, by rank. Small things: they travel as Python objects between our own."""
    if _is_one():
        return [value]
    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, value)
    return found


def of_first(make: Callable[[], T]) -> T:
    """What `make` gives on process 0, on all processes, however long it takes; a LpsparseError of it, too."""
    if _is_one():
        return make()
    found: T | None = None
    error: LpsparseError | None = None
    if rank() == 0:
        try:
            found = make()
        except LpsparseError as raised:
            error = raised
    found, told = gathered_late((found, error))[0]
    if told is not None:
        raise error or told
    return cast("T", found)


def gathered_late(value: Any) -> list[Any]:
    """`gathered`, however long one of them works before it has its value."""
    wait()
    return gathered(value)


@contextmanager
def together() -> Generator[None]:
    """Share the work on checkpoints inside among the processes of a launched job, which all come here: each
    reads, cuts and writes its part, process 0 alone makes and renames OUT, and all get the result.

    Over gloo, or the group that is there, which stays: a launcher's store remembers where it was, and another
    could not meet. Raises ResourceError when a process is gone, UsageError when the launcher has not said
    where to meet.
    """
    if _is_one():
        _meet()
    with missing_others():
        make_patient()
        with among(Processes(rank(), ranks(), gathered_late, of_first)):
            yield
        wait()


def _meet() -> None:
    try:
        distributed.init_process_group("gloo", timeout=_MEETING)
    except ValueError as error:  # WORLD_SIZE without MASTER_ADDR
        raise UsageError(
            257, f"several processes: {error}", hint="start them with torchrun or srun"
        ) from error
    except RuntimeError as error:
        line = str(error).strip().partition("\n")[0][:200]
        what = f"process {os.environ.get('RANK')}: the others did not come: {line}"
        raise ResourceError(MISSED, what, hint="see what ended the other processes") from error


def make_patient() -> None:
    """What `wait` needs. All processes call it, early: only one that was met is missed when it dies."""
    global _patient
    if not _is_one() and _patient is None:
        _patient = distributed.new_group(backend="gloo", timeout=timedelta(days=30))


def wait() -> None:
    """Until all processes have come here, however long one of them works alone (writing, tokenising)."""
    make_patient()
    if not _is_one():
        distributed.barrier(_patient)


def _is_of_waiting(error: RuntimeError) -> bool:
    """torch has a class for NCCL's; gloo's errors, its barrier's too, are plain and name their source."""
    known = isinstance(error, distributed.DistError)
    return known or any(word in str(error) for word in ("gloo", "Connection", "ProcessGroup", "barrier"))


@contextmanager
def missing_others(doing: str = "") -> Generator[None]:
    """Raises ResourceError for an error of what waited for a process that is gone or late; others pass."""
    try:
        yield
    except RuntimeError as error:
        if _is_one() or is_out_of_memory(error) or not _is_of_waiting(error):
            raise
        line = str(error).strip().partition("\n")[0][:200]
        what = f"process {rank()}: {doing}{type(error).__name__}: {line}"
        hint = "see what ended the other processes (--debug shows where this one was)"
        raise ResourceError(MISSED, what, hint=hint) from error


def share_buffers(model: nn.Module) -> None:
    """Give all processes the buffers (running statistics) of process 0, which are those that are written."""
    if not _is_one():
        for buffer in model.buffers():
            distributed.broadcast(buffer, 0)


def average_(tensors: Sequence[Tensor]) -> None:
    """Replace each 1-D tensor by its mean over all processes, in place; alone, leave them."""
    if not tensors or _is_one():
        return
    flat = torch.cat(list(tensors))
    distributed.all_reduce(flat)
    means = flat.div_(distributed.get_world_size()).split([len(tensor) for tensor in tensors])
    for tensor, mean in zip(tensors, means, strict=True):
        tensor.copy_(mean)


def odd_one(value: str) -> int | None:
    """The first process, on all of them, whose value is not that of process 0; None where all are alike."""
    found = gathered(value)
    return next((i for i, each in enumerate(found) if each != found[0]), None)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, on the same memory; any other tensor is its own."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # pyright: ignore[reportAttributeAccessIssue]


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "to_local")  # a DTensor, whose import takes a second


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every process, which all call it; what is not sharded is its own."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # pyright: ignore[reportAttributeAccessIssue]


def spread(
    model: nn.Module, device: torch.device, blocks: Iterable[nn.Module] = (), *, shard: bool, bf16: bool
) -> None:
    """Bring `model` to `device` with the values of process 0 on all processes; those of the others may be on
    the meta device until then.

    With `shard` each keeps its part of the first dimension of every parameter (FSDP2), to be gathered block
    by block; beside these parts no process but the first has more than one block's parameters at a time.
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
    share_buffers(model)


def _receive(module: nn.Module, device: torch.device) -> None:
    """The parameters of process 0 that are not sharded yet; tied ones stay tied."""
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


def share_again(model: Any) -> None:
    """After a forward pass without a backward one: FSDP2 leaves the outermost parameters whole, in the place
    of those that train."""
    if hasattr(model, "reshard"):
        model.reshard()


@contextmanager
def without_sync(model: Any) -> Generator[None]:
    """Backward passes whose gradients only add up on each process."""
    if hasattr(model, "set_requires_gradient_sync"):  # FSDP2
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)
    else:
        with model.no_sync() if hasattr(model, "no_sync") else nullcontext():  # DDP
            yield


def number(value: Any) -> float:
    """A 0-dim tensor, sharded or not, as a number; nothing is 0. All processes call it."""
    return float(whole(value)) if isinstance(value, Tensor) else float(value or 0)


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """Different for tensors that a lost or doubled update has made different; cheap."""
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


def launch(processes: int, arguments: list[str]) -> None:
    """Run `python -m lpsparse ARGUMENTS` in that many processes on this machine, and wait for them.

    Raises LaunchError with the exit code of the process that failed first, and ResourceError for one that
    was killed.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    launcher = borrow("torch.distributed.launcher.api:elastic_launch")
    if launcher is None:
        _torchrun(processes, arguments)
        return
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig

    logs = Path(tempfile.mkdtemp(prefix="lpsparse-ranks-"))
    # torch 2.10 gives processes that were asked to stop 30 seconds, and cannot be told otherwise.
    known = {each.name for each in fields(LaunchConfig)}
    patience: dict[str, Any] = {"shutdown_timeout": _PATIENCE} if "shutdown_timeout" in known else {}
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, run_id=str(os.getpid()), max_restarts=0,
        rdzv_backend="c10d", rdzv_endpoint="localhost:0", local_addr="localhost",
        logs_specs=DefaultLogsSpecs(log_dir=str(logs), redirects=Std.OUT),
        signals_to_handle="SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", **patience,
    )  # fmt: skip
    _quiet_elastic()
    try:
        with _same_handlers_after():
            launcher(config, sys.executable)("-u", "-m", "lpsparse", *arguments)
    except ChildFailedError as error:
        raise _first_failure(error.failures) from None
    except SignalException as error:
        stop = error.sigval == signal.SIGINT
        raise LaunchError(ExitCode.INTERRUPT if stop else ExitCode.RESUMABLE) from None
    finally:
        shutil.rmtree(logs, ignore_errors=True)


@contextmanager
def _same_handlers_after() -> Generator[None]:
    """torch's launcher leaves its handlers of signals behind, which raise SignalException wherever they find
    the program, at its very end too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None and signal.getsignal(number) != handler:
                signal.signal(number, handler)


def _torchrun(processes: int, arguments: list[str]) -> None:
    """`launch` by torch's own command, which does not pass on the exit code of what failed."""
    words = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m", "lpsparse"]
    if subprocess.run([sys.executable, *words, *arguments], stdout=subprocess.DEVNULL).returncode:
        raise LaunchError(ExitCode.RESOURCE)


def end_with_launcher() -> None:
    """Have this process asked to stop when its launcher is killed, which cannot ask any more."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # Linux sends it once for every thread of the dying parent: one that may be repeated.
        end_with_parent(signal.SIGUSR1)


def end_with_parent(number: int) -> None:
    """Get signal `number` when the process that started this one is gone. Only Linux can do that."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, int(number))


def _quiet_elastic() -> None:
    import logging

    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed"):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def _first_failure(failures: dict[int, Any]) -> LaunchError | ResourceError:
    """What ended the run: a process that was killed before one that then missed it."""
    earliest = min(failure.timestamp for failure in failures.values())
    near = sorted(
        (each for each in failures.values() if each.timestamp <= earliest + _TOGETHER),
        key=lambda each: (each.exitcode >= 0 or each.exitcode == -signal.SIGTERM, each.local_rank),
    )
    first = near[0]
    if first.exitcode < 0 and first.exitcode != -signal.SIGTERM:
        name = signal.Signals(-first.exitcode).name
        what = f"process {first.local_rank} was ended by {name}; the others were stopped"
        hint = "run the same command again: it goes on from the last training state, if there is one"
        return ResourceError(603, what, hint=hint)
    failed = [each for each in near if each.exitcode > 0]
    # What misses another process says so, and what the launcher then stops ends as if it were asked to.
    after = (ExitCode.RESUMABLE, ExitCode.INTERRUPT)
    causes = (each for each in failed if each.exitcode not in after and _said(each, "code") != f"LPS{MISSED}")
    cause = next(causes, first)
    code = ExitCode(cause.exitcode) if cause.exitcode in list(ExitCode) else ExitCode.RESOURCE
    said = _said(cause, "message")
    if not said:
        said = f"process {cause.local_rank} ended with exit code {cause.exitcode}"
    elif cause.local_rank == 0:
        said = ""  # it spoke for itself
    return LaunchError(code, said=said)


def _said(failure: Any, key: str) -> str:
    """What the command line of a process that failed wrote of it, if it did."""
    said = str(failure.error_file_data.get(key, ""))
    return "" if said == "<NONE>" else said  # elastic's own word
