"""`lpsparse report`: what is shown of it, and the files that its views go to."""

from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from lpsparse.cli.bar import working
from lpsparse.cli.commands import show_report
from lpsparse.cli.options import add_command
from lpsparse.cli.output import Voice, as_data, print_file, tell_runner
from lpsparse.errors import ExitCode, UsageError
from lpsparse.launch import is_first
from lpsparse.recipe import ReportStep

if TYPE_CHECKING:
    from lpsparse.reporting.records import Report

_EXAMPLES = """\
  lpsparse report sparse dense
  lpsparse report sparse dense --html report.html
  lpsparse report sparse --min-sparsity 0.8 --max-bytes 20MB --max-quality-drop 1%
  lpsparse report sparse --min-sparsity '*.mlp.*=0.9' --min-nm 2:4=1.0 --warn min-nm
  lpsparse report sparse --baseline main/report.json --max-regression 0.01
  lpsparse report sparse --json - | jq .prunable.sparsity
  lpsparse report sparse dense --markdown summary.md --junit budgets.xml --csv tensors.csv"""
_FILES = {
    "json": "Write report.json; - is stdout.",
    "html": "Write the report as one page with figures, without script; - is stdout.",
    "markdown": "Write Markdown, as a CI job's summary shows it.",
    "comment": "Write the same for a comment on a pull request, with a mark to find it by.",
    "junit": "Write JUnit XML: a test case a budget and check.",
    "csv": "Write all figures of each tensor as a table.",
}


def _json(report: "Report") -> str:
    return as_data(report.model_dump_json(indent=1, ensure_ascii=True)) + "\n"


def _html(report: "Report") -> str:
    from lpsparse.reporting.html.page import render

    return render(report)


def _markdown(report: "Report") -> str:
    from lpsparse.reporting import markdown

    return markdown.render(report)


def _comment(report: "Report") -> str:
    from lpsparse.reporting import markdown

    return markdown.comment(report)


def _junit(report: "Report") -> str:
    from lpsparse.reporting import junit

    return junit.render(report)


def _csv(report: "Report") -> str:
    from lpsparse.reporting import spreadsheet

    return spreadsheet.render(report)


_VIEWS: dict[str, Callable[["Report"], str]] = {
    "json": _json, "html": _html, "markdown": _markdown, "comment": _comment, "junit": _junit, "csv": _csv,
}  # fmt: skip


def register(app: typer.Typer) -> None:
    add_command(app, "report", ReportStep, _report, examples=_EXAMPLES, files=_FILES, full=True)


def _report(step: ReportStep, files: dict[str, str | None], voice: Voice) -> None:
    from lpsparse.checkpoint.writer import check_report_file, write_beside
    from lpsparse.verbs import report_step

    asked = {view: file for view, file in files.items() if file is not None}
    _check(asked)
    for file in asked.values():
        if file != "-":
            read = (step.model, step.base, None if step.baseline is None else str(step.baseline))
            check_report_file(Path(file), read)
    left = [Path(file) for file in asked.values() if file != "-"]
    with _no_earlier(left):
        with working(voice):
            found = report_step(step, voice.say)
        for view, file in asked.items():
            text = _VIEWS[view](found)
            if file == "-":
                print_file(text)
            elif is_first():
                write_beside(Path(file), text)
                left.remove(Path(file))
    if "-" not in asked.values():
        show_report(found, voice)
    tell_runner(found)
    if not found.passed:
        raise typer.Exit(ExitCode.VERDICT)


@contextmanager
def _no_earlier(left: list[Path]) -> Generator[None]:
    """Where there is no report, what an earlier run left in these files is not taken for its: it gets `.old`
    behind its name."""
    try:
        yield
    except BaseException:
        for path in left if is_first() else ():
            with suppress(OSError):
                if path.is_file():
                    path.replace(path.with_name(path.name + ".old"))
        raise


def _check(asked: dict[str, str]) -> None:
    """Raises UsageError for files that cannot all be written."""
    for view, file in asked.items():
        if file.startswith("--"):
            hint = f"give a FILE first, or - for stdout: --{view} - {file}"
            raise UsageError(217, f"--{view} {file}: a flag where a FILE is needed", hint=hint)
    twice = [file for file in asked.values() if list(asked.values()).count(file) > 1]
    if twice:
        raise UsageError(292, f"{twice[0]}: two views cannot go to one place", hint="give each its own FILE")
