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
    hint = f"put the right file back, or delete {METRICS}: nothing else needs it"
    if path.stat().st_size > _MOST_BYTES:
        raise InputError(355, f"{path}: {path.stat().st_size:,} bytes are no metrics", hint=hint)
    with path.open("rb") as file:
        count = sum(1 for _ in file)
        file.seek(0)
        step = max(1, -(-count // _MOST_POINTS))
        taken = ((i, line) for i, line in enumerate(file) if i % step == 0 or i == count - 1)
        return tuple(_point(path, i, line, hint) for i, line in taken)


def _point(path: Path, i: int, line: bytes, hint: str) -> Point:
    try:
        table: Any = json.loads(line)
        return Point.model_validate({key: table[key] for key in Point.model_fields})
    except (ValueError, KeyError, TypeError, RecursionError, ValidationError):
        raise InputError(355, f"{path}: line {i + 1} is no line of metrics", hint=hint) from None
