"""`lpsparse report`: show it, and write its views to files."""

from pathlib import Path

import typer

from lpsparse.cli.bar import working
from lpsparse.cli.commands import show_report
from lpsparse.cli.options import add_command
from lpsparse.cli.output import Voice, print_file, tell_runner
from lpsparse.errors import ExitCode, UsageError
from lpsparse.families import VIEWS
from lpsparse.steps.report import ReportStep

_EXAMPLES = """\
  lpsparse report sparse dense
  lpsparse report sparse dense --html report.html
  lpsparse report sparse --min-sparsity 0.8 --max-bytes 20MB --max-quality-drop 1%
  lpsparse report sparse --min-sparsity '*.mlp.*=0.9' --min-nm 2:4=1.0 --warn min-nm
  lpsparse report sparse --baseline main/report.json --max-regression 0.01
  lpsparse report sparse --json - | jq .prunable.sparsity
  lpsparse report sparse dense --markdown summary.md --junit budgets.xml --csv tensors.csv"""


def add(app: typer.Typer, name: str) -> None:
    files = {view: each.help for view, each in VIEWS.items()}
    add_command(app, name, _report, examples=_EXAMPLES, files=files, full=True)


def _report(step: ReportStep, files: dict[str, str | None], voice: Voice) -> None:
    from lpsparse.commands.report import write_report

    asked = {view: file for view, file in files.items() if file is not None}
    _check(asked)
    with working(voice):
        written = {view: Path(file) for view, file in asked.items() if file != "-"}
        found = write_report(step, written, voice.say)
    for view, file in asked.items():
        if file == "-":
            print_file(VIEWS[view].render(found))
    if "-" not in asked.values():
        show_report(found, voice)
    tell_runner(found)
    if not found.passed:
        raise typer.Exit(ExitCode.VERDICT)


def _check(asked: dict[str, str]) -> None:
    """Raises UsageError for a flag in the place of a FILE, and for two views on stdout."""
    for view, file in asked.items():
        if file.startswith("--"):
            hint = f"give a FILE, or - for stdout: --{view} report{VIEWS[view].suffix} {file}"
            raise UsageError(217, f"--{view}: expected a FILE, found {file}", hint=hint)
    if list(asked.values()).count("-") > 1:
        raise UsageError(292, "-: two views cannot both go to stdout", hint="give each its own FILE")
