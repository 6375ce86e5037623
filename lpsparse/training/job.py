"""One fine-tune as a job: what made it, the folder in which it goes on after a stop, and its metrics.

Every process of a launched job calls these functions; process 0 writes.
"""

import hashlib
import json
from collections.abc import Callable, Generator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate import tracking

from lpsparse import __version__
from lpsparse.checkpoint.files import METRICS, write_text
from lpsparse.checkpoint.manifest import source_of
from lpsparse.checkpoint.open import Checkpoint
from lpsparse.checkpoint.transaction import output_folder, partial_of
from lpsparse.errors import StateError
from lpsparse.parallel import ranks
from lpsparse.parallel.environment import local_rank
from lpsparse.steps.finetune import FinetuneStep
from lpsparse.training.resume import States
from lpsparse.training.run import Progress

Say = Callable[[str], None]


OnStep = Callable[[Progress], None]


def made_by(step: FinetuneStep, source: Checkpoint, recipe: dict[str, Any]) -> dict[str, Any]:
    """What a state must share with a run to go on in it exactly. Raises StateError, on all processes, where
    one was given something else."""
    files = None
    if local_rank() == 0:  # it is read once a machine
        files = {record.name: record.sha256 for record in source_of(source).files}
    ranks.barrier()
    files = ranks.all_gather(files)[ranks.rank() - local_rank()]
    numbers = {"lpsparse": __version__, "torch": version("torch")}
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
        what = f"process {odd} has other options, another model or other data than process 0"
        raise StateError(707, what, hint="give every process the same")
    return found


def _code(spec: str | None) -> str | None:
    """What code that a person named is: its file by its hash, else by its name."""
    file = Path((spec or "").rpartition(":")[0])
    if file.suffix == ".py" and file.is_file():
        return hashlib.sha256(file.read_bytes()).hexdigest()
    return spec


@contextmanager
def training_folder(step: FinetuneStep) -> Generator[Path]:
    """OUT.partial, which process 0 makes and completes."""
    if ranks.rank() > 0:
        yield partial_of(step.out)
        return
    states = "drop" if step.resume == "never" else "resume"
    with output_folder(step.out, overwrite=step.overwrite, states=states) as folder:
        yield folder


def find_states(step: FinetuneStep, folder: Path, made: dict[str, Any], say: Say) -> States:
    """The run's states, and in `found` the one to go on from. Raises StateError where it cannot be used, and
    where the processes see different ones."""
    ranks.barrier()
    states = States(folder, made, keep=step.keep_last, shard=step.shard)
    states.find(step.resume, say)
    if ranks.first_different_rank(str(states.found and states.found[1]["step"])) is not None:
        what = f"{folder}: the processes do not find the same training state"
        raise StateError(710, what, hint="put OUT on a disk that all machines see")
    return states


@contextmanager
def recording(step: FinetuneStep, states: States, on_step: OnStep, say: Say) -> Generator[OnStep]:
    """A function that takes progress to the metrics, the tracker and `on_step`; nowhere but on process 0."""
    if ranks.rank() > 0:
        yield lambda progress: None
        return
    path = states.folder / METRICS
    fresh = path.with_name(f"{METRICS}.new")  # killed meanwhile, the next run finds the old lines
    write_text(fresh, "".join(_earlier(path, states)))
    fresh.replace(path)
    with path.open("a", encoding="utf-8") as log:
        tracker = Tracker(step.track, step.out, say) if step.track != "none" else None

        def record(progress: Progress) -> None:
            log.write(json.dumps({key: getattr(progress, key) for key in progress.__slots__}) + "\n")
            log.flush()
            if tracker is not None:
                tracker.log(progress)
            on_step(progress)

        try:
            yield record
        finally:
            if tracker is not None:
                tracker.close()


def _earlier(path: Path, states: States) -> list[str]:
    """The lines of the run that left the state that was found, up to that state."""
    if states.found is None:
        return []
    folder, state = states.found
    path = folder.parents[1] / path.name
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [line for line in lines if _step_of(line) <= state["step"]]


def _step_of(line: str) -> float:
    """The step of a line of metrics; of one that was cut off, more than any."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


_CLASSES = {"tensorboard": "TensorBoardTracker", "trackio": "TrackioTracker", "wandb": "WandBTracker"}


class Tracker:
    def __init__(self, name: str, out: Path, say: Callable[[str], None]) -> None:
        """`name` is a value of `--track`. Tensorboard's files go to `runs` beside `out`."""
        self.name, self.say = name, say
        self._inner: Any = None
        self._try(lambda: self._start(out))

    def _start(self, out: Path) -> None:
        options: dict[str, Any] = {"logging_dir": out.parent / "runs"} if self.name == "tensorboard" else {}
        inner = getattr(tracking, _CLASSES[self.name])(out.name, **options)
        inner.start()
        self._inner = inner

    def log(self, progress: Any) -> None:
        values = {key: getattr(progress, key) for key in progress.__slots__ if key not in ("step", "steps")}
        self._try(lambda: self._inner and self._inner.log(values, step=progress.step))

    def close(self) -> None:
        self._try(lambda: self._inner and self._inner.finish())

    def _try(self, act: Callable[[], Any]) -> None:
        try:
            act()
        except Exception as error:  # another's code, another's server
            self._inner = None
            reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
            self.say(f"--track {self.name} is given up ({reason}); metrics.jsonl goes on")
