"""What a training run wrote while it went on: metrics.jsonl, as the points of its curves."""

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lpsparse.checkpoint.writer import METRICS
from lpsparse.errors import InputError
from lpsparse.reporting.records import Point

_MOST_BYTES = 200_000_000
_MOST_POINTS = 400  # a figure is not wider


def read_history(folder: Path | None) -> tuple[Point, ...]:
    """At most 400 points, evenly taken, the last one among them; none where nothing was trained.

    Raises InputError for a file that is too large or holds other lines.
    """
    path = folder / METRICS if folder is not None else None
    if path is None or not path.is_file():
        return ()
    mend = f"put the right file back, or delete {METRICS}: nothing else needs it"
    if path.stat().st_size > _MOST_BYTES:
        raise InputError(355, f"{path}: {path.stat().st_size:,} bytes are no metrics", mend=mend)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except ValueError:
        raise InputError(355, f"{path}: not UTF-8", mend=mend) from None
    step = max(1, -(-len(lines) // _MOST_POINTS))
    taken = [i for i in range(len(lines)) if i % step == 0 or i == len(lines) - 1]
    return tuple(_point(path, i, lines[i], mend) for i in taken)


def _point(path: Path, i: int, line: str, mend: str) -> Point:
    try:
        table: Any = json.loads(line)
        return Point.model_validate({key: table[key] for key in Point.model_fields})
    except (ValueError, KeyError, TypeError, RecursionError, ValidationError):
        raise InputError(355, f"{path}: line {i + 1} is no line of metrics", mend=mend) from None
