"""A report.json that was written before: read back as strictly as a checkpoint."""

from pathlib import Path

from pydantic import ValidationError

from lpsparse.checkpoint.header import unique_json
from lpsparse.checkpoint.names import is_report_name
from lpsparse.checkpoint.writer import REPORT
from lpsparse.errors import InputError
from lpsparse.reporting.records import Report

_MOST_BYTES = 200_000_000  # 20,000 tensors are 20 MB
_VERSION = 1


def is_report(model: str) -> bool:
    """Whether MODEL is a report and no checkpoint."""
    return is_report_name(model) and Path(model).is_file()


def read_report(path: Path) -> Report:
    """`path` may be a folder that lpsparse wrote, which has one.
    Raises InputError for what is missing, broken or of another version."""
    path = path / REPORT if path.is_dir() else path
    hint = "write it again: `lpsparse report MODEL --json FILE`"
    if not path.is_file():
        raise InputError(356, f"{path}: no such report", hint=hint)
    if path.stat().st_size > _MOST_BYTES:
        raise InputError(356, f"{path}: {path.stat().st_size:,} bytes are no report", hint=hint)
    try:
        table = unique_json(path.read_bytes())
    except OSError as error:
        raise InputError(356, f"{path}: {error.strerror}", hint=hint) from error
    except ValueError as error:
        raise InputError(356, f"{path}: not valid JSON: {error}", hint=hint) from None
    version = table.get("schema_version") if isinstance(table, dict) else None
    if version != _VERSION:
        what = f"{path}: no report of schema_version {_VERSION} (it has {str(version)[:20]})"
        raise InputError(357, what, hint="upgrade lpsparse" if isinstance(version, int) else hint)
    try:
        found = Report.model_validate(table)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(356, f"{path}: {where}: {first['msg']}", hint=hint) from None
    if found.estimate is not None:
        raise InputError(356, f"{path}: of a dry run: there is no such model", hint="report the model itself")
    return found
