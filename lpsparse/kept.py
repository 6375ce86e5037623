"""The reports that a run keeps in its OUT, and what becomes of those of an earlier run."""

import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from lpsparse.chain import Link
from lpsparse.checkpoint.writer import MANIFEST, REPORT
from lpsparse.errors import OutputError
from lpsparse.parallel.environment import is_rank_0
from lpsparse.steps.report import ReportStep

_KEPT = re.compile(r"report(-\d+)?\.json")
_OLD = ".old"


def check_free(out: Path) -> None:
    """Raises OutputError where OUT is itself what a step wrote: it has a report of its own."""
    if (out / MANIFEST).is_file():
        what = f"{out}: lpsparse wrote it, and it would not verify any more"
        raise OutputError(405, what, hint="choose another out")


def report_file(link: Link, links: Sequence[Link], out: Path) -> Path:
    """Where the report of a report step is kept: the last one in OUT/report.json, those before it in
    OUT/report-N.json, N the step's number from 1."""
    last = max(each.index for each in links if isinstance(each.step, ReportStep))
    return out / (REPORT if link.index == last else f"report-{link.index + 1}.json")


def earlier_reports(links: Sequence[Link], out: Path) -> list[Path]:
    """The reports that an earlier run kept, but those that this one reads before it writes them."""
    needed: set[Path] = set()
    written: set[Path] = set()
    for link in links:
        named = (Path(str(each)) for each in (link.model, getattr(link.step, "baseline", None)))
        needed |= {path / REPORT if path.is_dir() else path for path in named} - written
        if isinstance(link.step, ReportStep):
            written.add(report_file(link, links, out))
    found = {path.with_name(path.name.removesuffix(_OLD)) for path in out.glob("report*")}
    return sorted(path for path in found - needed if _KEPT.fullmatch(path.name))


@contextmanager
def set_aside(paths: Sequence[Path]) -> Generator[None]:
    """Those of these files that are there have `.old` behind their names until the work inside is done, and
    are deleted then: after work that failed nobody takes an earlier verdict for its own, and none is lost."""
    old = {path: path.with_name(path.name + _OLD) for path in paths} if is_rank_0() else {}
    try:
        for path, name in old.items():
            if path.is_file():
                path.replace(name)
    except OSError as error:
        raise OutputError(404, f"{error.filename}: {error.strerror}", hint="choose another out") from error
    yield
    for name in old.values():
        with suppress(OSError):  # the new ones are whole
            name.unlink()
