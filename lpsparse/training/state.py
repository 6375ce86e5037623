"""The state of a run on disk: all that a resumed run needs to end in the very bits of an uninterrupted one.

    OUT.partial/.lpsparse-state/step-00000120/
        state.json              what made it, counters, and the hashes of the rest
        rank-00000.safetensors  weights, buffers, averages, masks

Tensors and JSON, never pickle. A folder gets its name when it is complete and was read back; an older one is
deleted only after that. Data order and dropout are functions of seed and step (`order`), so no random state
is kept. Every process of a launched job calls these functions; rank 0 writes.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lpsparse.checkpoint.files import STATE, fsync, write_json
from lpsparse.checkpoint.manifest import source_of
from lpsparse.checkpoint.open import Checkpoint
from lpsparse.checkpoint.transaction import output_folder, partial_of
from lpsparse.errors import OutputError, StateError
from lpsparse.parallel import ranks
from lpsparse.parallel.environment import local_rank
from lpsparse.steps.finetune import FinetuneStep

VERSION = 2
_RECORD = "state.json"


# The release since which training has given the same bits, so that its states are resumed exactly. Raise
# it with every change of arithmetic or of what a state holds.
_SAME_BITS_SINCE = "0.1.0"


def made_by(step: FinetuneStep, source: Checkpoint, recipe: dict[str, Any]) -> dict[str, Any]:
    """What a state and a run must have in common for an exact resume. Raises StateError, on all ranks, where
    one was given something else."""
    files = None
    if local_rank() == 0:  # it is read once a machine
        files = {record.name: record.sha256 for record in source_of(source).files}
    ranks.barrier()
    files = ranks.all_gather(files)[ranks.rank() - local_rank()]
    numbers = {"lpsparse": _SAME_BITS_SINCE, "torch": version("torch")}
    versions = {name: ".".join(text.split(".")[:2]) for name, text in numbers.items()}
    found = {
        "recipe": recipe,
        "model": files,
        "versions": versions,
        "shard": step.shard,
        "code": {"model_fn": _code(step.model_fn), "optimizer": _code(step.optimizer)},
    }
    odd = ranks.first_different_rank(json.dumps(found, sort_keys=True))
    if odd is not None:
        what = f"rank {odd} has other options, another model or other data than rank 0"
        raise StateError(707, what, hint="give every process the same")
    return found


def _code(spec: str | None) -> str | None:
    """Identify code that a user named: a file by its hash, else by its name."""
    file = Path((spec or "").rpartition(":")[0])
    if file.suffix == ".py" and file.is_file():
        return hashlib.sha256(file.read_bytes()).hexdigest()
    return spec


@contextmanager
def training_folder(step: FinetuneStep) -> Generator[Path]:
    """OUT.partial, which rank 0 makes and completes."""
    if ranks.rank() > 0:
        yield partial_of(step.out)
        return
    states = "drop" if step.resume == "never" else "resume"
    with output_folder(step.out, overwrite=step.overwrite, states=states) as folder:
        yield folder


def find_states(
    step: FinetuneStep, folder: Path, made: dict[str, Any], say: Callable[[str], None]
) -> "States":
    """The run's states, and in `found` the one to resume from. Raises StateError where it cannot be used, and
    where the processes see different ones."""
    ranks.barrier()
    states = States(folder, made, keep=step.keep_last, shard=step.shard)
    states.find(step.resume, say)
    if ranks.first_different_rank(str(states.found and states.found[1]["step"])) is not None:
        what = f"{folder}: the ranks find different training states"
        raise StateError(710, what, hint="put OUT on a disk that all machines see")
    return states


def encode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON, its tensors put into `tensors`. Raises TypeError for what is neither."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = ranks.local_tensor(value.detach()).cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": name}
    if isinstance(value, dict):
        return {"pairs": [[key, encode(each, tensors)] for key, each in value.items()]}
    if isinstance(value, (list, tuple)):
        return [encode(each, tensors) for each in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{type(value).__name__} cannot be part of a state")


def decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `encode`; tuples have become lists."""
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]]
        return {key: decode(each, tensors) for key, each in value["pairs"]}
    return [decode(each, tensors) for each in value] if isinstance(value, list) else value


def moved(value: Any, device: torch.device) -> Any:
    """The same with its tensors on `device`."""
    if isinstance(value, dict):
        return {key: moved(each, device) for key, each in value.items()}
    if isinstance(value, list):
        return [moved(each, device) for each in value]
    return value.to(device) if isinstance(value, Tensor) else value


class States:
    """The states of one run: `folder` is OUT.partial; `made_by` is what has to be the same to resume."""

    def __init__(self, folder: Path, made_by: dict[str, Any], *, keep: int = 2, shard: bool = False) -> None:
        self.folder, self.made_by, self.keep = folder, made_by, keep
        self.shard = shard  # every process has a part of its own; else process 0 has it all
        self.found: tuple[Path, dict[str, Any]] | None = None

    def find(self, resume: str, say: Callable[[str], None]) -> None:
        """Look for the state to resume from: the newest complete one, or the folder `resume`. Raises
        StateError for one that this run could not resume from exactly."""
        if resume == "never":
            return
        if resume == "auto":
            self.found = _newest(self.folder, say)
            if self.found is None and self.last():
                say("no complete training state found; starting from step 0")
        else:
            self.found = self._named(Path(resume).resolve(), say)
        if self.found is not None:
            _check(*self.found, self.made_by)

    def _named(self, path: Path, say: Callable[[str], None]) -> tuple[Path, dict[str, Any]]:
        """The state that was asked for, or of another run's what this one has made of it since."""
        record = _whole(path)
        if record is None:
            what = "not a complete training state" if path.exists() else "no such folder"
            inside = [state.name for state in _completed(path)]
            hint = f"give {path / STATE / inside[0]}" if inside else "give auto, never or a state's folder"
            raise StateError(706, f"{path}: {what}", hint=hint)
        own = None if path.is_relative_to(self.folder.resolve()) else _newest(self.folder, say)
        return own if own is not None and own[1]["step"] > record["step"] else (path, record)

    def read(self) -> Any:
        """The state that was found, as it was saved by this process; None without."""
        return None if self.found is None else _read(*self.found)

    def last(self) -> int:
        """Steps of the newest state in the folder, 0 without."""
        names = [path.name for path in _completed(self.folder)]
        return int(names[0][5:]) if names else 0

    def save(self, step: int, state: Any) -> None:
        """Write the state after `step` steps, check it, then drop all but the last few. All processes call
        it. Raises OutputError."""
        final = self.folder / STATE / f"step-{step:08d}"
        fresh = final.with_name(final.name + ".partial")
        try:
            if ranks.rank() == 0:
                for left in (self.folder / STATE).glob("*.partial"):  # of a run that was killed
                    shutil.rmtree(left, ignore_errors=True)
                fresh.mkdir(parents=True)
            ranks.barrier()
            own = _write_part(fresh, state) if self.shard or ranks.rank() == 0 else None
            parts = [part for part in ranks.all_gather(own) if part is not None]
            if ranks.rank() == 0:
                self._complete(fresh, final, step, parts)
            ranks.barrier()
        except (OSError, SafetensorError) as error:
            shutil.rmtree(fresh, ignore_errors=True)
            reason = getattr(error, "strerror", None) or str(error)
            what = f"{getattr(error, 'filename', None) or fresh}: {reason}; earlier states are complete"
            hint = "free some space and run the same command again"
            raise OutputError(412, what, hint=hint) from error

    def _complete(self, fresh: Path, final: Path, step: int, parts: list[tuple[str, str, Any]]) -> None:
        record = {
            "version": VERSION,
            "step": step,
            "processes": ranks.world_size(),
            "made_by": self.made_by,
            "files": {name: sha256 for name, sha256, _ in parts},
            "trees": [tree for _, _, tree in parts],
        }
        write_json(fresh / _RECORD, {**record, "sha256": _digest(record)})
        fsync(fresh)
        shutil.rmtree(final, ignore_errors=True)
        fresh.rename(final)
        fsync(final.parent)
        before = [path for path in _completed(self.folder) if path.name <= final.name]
        for old in before[self.keep :]:  # this one first; what is newer is damaged, or was gone back from
            shutil.rmtree(old)


def _write_part(folder: Path, state: Any) -> tuple[str, str, Any]:
    """This process's file: its name, its sha256, and the rest of the state as JSON."""
    tensors: dict[str, Tensor] = {}
    tree = encode(state, tensors)
    name = f"rank-{ranks.rank():05d}.safetensors"
    save_file(tensors, folder / name)
    fsync(folder / name)
    _compare(folder / name, tensors)
    return name, _sha256(folder / name), tree


def _compare(path: Path, tensors: dict[str, Tensor]) -> None:
    """Raises OutputError when a file is not what was to be written."""
    read = load_file(path)
    if any(not _same_bits(tensor, read[name]) for name, tensor in tensors.items()):
        raise OutputError(408, f"{path}: was read back differently", hint="check the disk")


def _same_bits(first: Tensor, second: Tensor) -> bool:
    return torch.equal(first.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _completed(folder: Path) -> list[Path]:
    """The states that were completed, newest first."""
    found = (folder / STATE).glob("step-*")
    return sorted((path for path in found if path.name[5:].isdecimal()), reverse=True)


def _newest(folder: Path, say: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest state that is intact. Damaged ones are skipped with a message, never deleted."""
    for path in _completed(folder):
        record = _whole(path)
        if record is not None:
            return path, record
        say(f"{path}: damaged; skipped")
    return None


def _whole(path: Path) -> dict[str, Any] | None:
    try:
        record = json.loads((path / _RECORD).read_text(encoding="utf-8"))
        claimed = record.pop("sha256")
        if claimed != _digest(record):
            return None
        for name, digest in record["files"].items():
            if os.path.basename(name) != name or _sha256(path / name) != digest:
                return None
        return record
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _check(path: Path, record: dict[str, Any], made_by: dict[str, Any]) -> None:
    """Raises StateError, naming the first three differences, for a state that would not resume exactly."""
    hint = "give the same options, or start afresh with --resume never"
    if record["version"] != VERSION:
        what = f"{path}: has version {record['version']}; this lpsparse reads {VERSION}"
        raise StateError(703, what, hint=hint)
    given = {**made_by, "processes": ranks.world_size()}
    differences = list(_differences({**record["made_by"], "processes": record["processes"]}, given))
    if differences:
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        what = f"{path}: training state does not match this run: {'; '.join(differences[:3])}{more}"
        raise StateError(704, what, hint=hint)


def _differences(found: dict[str, Any], given: dict[str, Any], where: str = "") -> Any:
    for key in sorted({*found, *given}):
        old, new = found.get(key), given.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, f"{where}{key}.")
        elif old != new:
            yield f"{where}{key} was {old}, is {new}"


def _read(path: Path, record: dict[str, Any]) -> Any:
    """The state of this process. Raises StateError for a file that is no longer readable."""
    rank = ranks.rank() if len(record["trees"]) > 1 else 0
    name = f"rank-{rank:05d}.safetensors"
    try:
        return decode(record["trees"][rank], load_file(path / name))
    except (OSError, SafetensorError, KeyError, IndexError) as error:
        raise StateError(705, f"{path / name}: {error}", hint="start with --resume never") from None
