"""`lpsparse report`: what is shown of it, and the files that its views go to."""

from pathlib import Path

import typer

from lpsparse.cli.bar import working
from lpsparse.cli.commands import show_report
from lpsparse.cli.options import add_command
from lpsparse.cli.output import Voice, print_file, tell_runner
from lpsparse.errors import ExitCode, UsageError
from lpsparse.steps.report import ReportStep

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


def add(app: typer.Typer, name: str) -> None:
    add_command(app, name, _report, examples=_EXAMPLES, files=_FILES, full=True)


def _report(step: ReportStep, files: dict[str, str | None], voice: Voice) -> None:
    from lpsparse.commands.report import write_report
    from lpsparse.reporting.views import VIEWS

    asked = {view: file for view, file in files.items() if file is not None}
    _check(asked)
    with working(voice):
        written = {view: Path(file) for view, file in asked.items() if file != "-"}
        found = write_report(step, written, voice.say)
    for view, file in asked.items():
        if file == "-":
            print_file(VIEWS[view](found))
    if "-" not in asked.values():
        show_report(found, voice)
    tell_runner(found)
    if not found.passed:
        raise typer.Exit(ExitCode.VERDICT)


def _check(asked: dict[str, str]) -> None:
    """Raises UsageError for what is no name of a file, and for two views on stdout."""
    for view, file in asked.items():
        if file.startswith("--"):
            hint = f"give a FILE first, or - for stdout: --{view} - {file}"
            raise UsageError(217, f"--{view} {file}: a flag where a FILE is needed", hint=hint)
    if list(asked.values()).count("-") > 1:
        raise UsageError(292, "-: two views cannot go to one place", hint="give each its own FILE")
