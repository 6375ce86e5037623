"""Report the steps of a run: to metrics.jsonl in OUT.partial, an experiment tracker, and the caller."""

import json
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import tracking

from lpsparse.checkpoint.files import METRICS, write_text
from lpsparse.parallel import ranks
from lpsparse.steps.finetune import FinetuneStep
from lpsparse.training.state import States

Say = Callable[[str], None]
_CLASSES = {"tensorboard": "TensorBoardTracker", "trackio": "TrackioTracker", "wandb": "WandBTracker"}


@dataclass(frozen=True, slots=True)
class Progress:
    """One optimizer step, for a bar or a log."""

    step: int  # steps done
    steps: int
    epoch: int
    loss: float  # mean since the last one
    lr: float
    lambda_p: float
    target: float  # sparsity that the plan asks for now
    sparsity: float  # exact zeros, as a share of the prunable weights
    near_zero: float  # as good as zero, likewise


OnStep = Callable[[Progress], None]


@contextmanager
def recording(step: FinetuneStep, states: States, on_step: OnStep, say: Say) -> Generator[OnStep]:
    """A function that takes progress to the metrics, the tracker and `on_step`; on rank 0 only."""
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
            self.say(f"--track {self.name} stopped ({reason}); metrics.jsonl continues")
