"""`lpsparse report`: the one command whose --json takes a file."""

from pathlib import Path
from typing import Annotated

import typer

from lpsparse.cli.commands import show_report
from lpsparse.cli.output import print_json, print_result, teller, width, working
from lpsparse.errors import ExitCode, UsageError
from lpsparse.recipe import ReportStep
from lpsparse.settings import is_first, resolve

_HELP = """Measure sparsity and bytes from the files alone; exit 1 when a budget fails.

\b
Examples:
  lpsparse report sparse dense
  lpsparse report sparse --min-sparsity 0.8 --max-bytes 20000000
  lpsparse report sparse --json - | jq .prunable.sparsity"""


def register(app: typer.Typer) -> None:
    app.command("report", help=_HELP, no_args_is_help=True)(report)


def report(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder, weight file, index or hub id.")],
    base: Annotated[str | None, typer.Argument(metavar="BASE", help="The checkpoint it came from.")] = None,
    json_file: Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write report.json; - "
        "is stdout.")]
    = None,
    weights: Annotated[str | None, typer.Option(metavar="NAME", help="Weight file or index in MODEL that "
        "is meant.")] = None,
    include: Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Tensors counted as "
        "prunable.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Tensors not so counted.")] = None,
    min_sparsity: Annotated[str | None, typer.Option(metavar="FRACTION", help="Least sparsity of "
        "prunable weights.")]
    = None,
    max_bytes: Annotated[str | None, typer.Option(metavar="BYTES", help="Most bytes of the weight "
        "files.")] = None,
    max_quality_drop: Annotated[
        str | None, typer.Option(metavar="NUMBER", help="Most that the recorded quality may fall, in "
            "its own unit.")
    ] = None,
    threads: Annotated[str | None, typer.Option(metavar="INTEGER", help="Threads; the result is the same. "
        "Default: one a core.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print no messages.")] = False,
) -> None:  # fmt: skip
    from lpsparse.checkpoint.writer import check_report_file, write_beside
    from lpsparse.reporting import table
    from lpsparse.verbs import report_step

    given = {
        "model": model, "base": base, "weights": weights, "include": include, "exclude": exclude,
        "min_sparsity": min_sparsity, "max_bytes": max_bytes, "max_quality_drop": max_quality_drop,
        "threads": threads,
    }  # fmt: skip
    step = resolve(ReportStep, {key: value for key, value in given.items() if value not in (None, [])})
    if json_file is not None and json_file.startswith("--"):
        mend = f"give a FILE first, or - for stdout: --json - {json_file}"
        raise UsageError(217, f"--json {json_file}: a flag where a FILE is needed", mend=mend)
    if json_file not in (None, "-"):
        check_report_file(Path(json_file), (model, base))
    with working(quiet):
        found = report_step(step, teller(quiet))
    if json_file == "-":
        print_json(found.model_dump(mode="json"))
    elif json_file is not None:
        if is_first():
            write_beside(Path(json_file), found.model_dump(mode="json"))
        print_result(table.render(found, width()))
    else:
        show_report(found, as_json=False)
    if not found.passed:
        raise typer.Exit(ExitCode.VERDICT)
