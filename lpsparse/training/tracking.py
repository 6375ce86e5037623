"""--track: the lines of the metrics also go to an experiment tracker, through accelerate's adapters.

A tracker that is missing, down or full never stops a run: it is said once, and metrics.jsonl has it all.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import tracking

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
