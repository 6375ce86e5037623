"""Read what earlier runs wrote: a report.json, and the curves of a training."""

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lpsparse.checkpoint.files import METRICS, REPORT
from lpsparse.checkpoint.header import unique_json
from lpsparse.checkpoint.names import is_report_name
from lpsparse.errors import InputError
from lpsparse.reporting.records import Point, Report

_MOST_BYTES = 200_000_000  # 20,000 tensors are 20 MB


_VERSION = 1


def is_report(model: str) -> bool:
    """Whether MODEL is a report and not a checkpoint."""
    return is_report_name(model) and Path(model).is_file()


def read_report(path: Path) -> Report:
    """`path` may be a folder that lpsparse wrote, which has one.
    Raises InputError for what is missing, broken or of another version."""
    path = path / REPORT if path.is_dir() else path
    hint = "write it again: `lpsparse report MODEL --json FILE`"
    if not path.is_file():
        raise InputError(356, f"{path}: no such report", hint=hint)
    if path.stat().st_size > _MOST_BYTES:
        raise InputError(356, f"{path}: {path.stat().st_size:,} bytes are too many for a report", hint=hint)
    try:
        table = unique_json(path.read_bytes())
    except OSError as error:
        raise InputError(356, f"{path}: {error.strerror}", hint=hint) from error
    except ValueError as error:
        raise InputError(356, f"{path}: not valid JSON: {error}", hint=hint) from None
    version = table.get("schema_version") if isinstance(table, dict) else None
    if version != _VERSION:
        what = f"{path}: expected schema_version {_VERSION}, found {str(version)[:20]}"
        raise InputError(357, what, hint="upgrade lpsparse" if isinstance(version, int) else hint)
    try:
        found = Report.model_validate(table)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(356, f"{path}: {where}: {first['msg']}", hint=hint) from None
    if found.estimate is not None:
        raise InputError(356, f"{path}: of a dry run: there is no such model", hint="give the model itself")
    return found


_MOST_CURVE_BYTES = 200_000_000


_MOST_POINTS = 400  # a figure is not wider


def read_history(folder: Path | None) -> tuple[Point, ...]:
    """At most 400 points, evenly taken, the last one among them; none where nothing was trained.

    Raises InputError for a file that is too large or holds other lines.
    """
    path = folder / METRICS if folder is not None else None
    if path is None or not path.is_file():
        return ()
    hint = f"put the right file back, or delete {METRICS}: nothing else needs it"
    if path.stat().st_size > _MOST_CURVE_BYTES:
        raise InputError(355, f"{path}: {path.stat().st_size:,} bytes are too many for metrics", hint=hint)
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
        raise InputError(355, f"{path}: line {i + 1} is not a line of metrics", hint=hint) from None
