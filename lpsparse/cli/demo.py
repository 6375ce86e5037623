"""`lpsparse demo`: the main job on a bundled model, offline, with a rival at the same training budget."""

import shlex
import signal
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from lpsparse.cli import signals
from lpsparse.cli.output import Json, Quiet, Verbose, Voice, has_color, print_json, print_result, width
from lpsparse.errors import ExitCode, OutputError
from lpsparse.reporting.text import columns, percent, size

if TYPE_CHECKING:
    from lpsparse.reporting.records import Report
    from lpsparse.steps.base import Step
    from lpsparse.steps.finetune import FinetuneStep

RECIPE = Path(__file__).parents[1] / "bundled" / "demo.yaml"


def demo(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="Folder to make.")] = Path("lpsparse-demo"),
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Exit 1 where the result is outside of the recipe's bounds.

    \b
    Examples:
      lpsparse demo
      lpsparse demo try --json"""
    from lpsparse import api
    from lpsparse.cli.bar import showing
    from lpsparse.parallel.progress import Brief
    from lpsparse.recipes import run
    from lpsparse.recipes.file import read_recipe
    from lpsparse.recipes.plan import planned

    if folder.exists() and not any(folder.glob("*.partial")):  # of one that was interrupted
        raise OutputError(401, f"{folder}: exists already", hint="remove it, or give another DIR")
    say = Voice(quiet, verbose).say
    changes = {"out": str(folder)}
    rival = _rival([link.step for link in planned(read_recipe(RECIPE, changes), changes, RECIPE)])
    command = run.command_line(rival)
    done: list[run.Done] = []
    with showing(Voice(quiet)), _children() as children:
        for each in run.run_each(RECIPE, changes, say):
            done.append(each)
            # Each trains on one thread: two fill two cores.
            if str(each.step.destination) == rival.model:
                say(Brief(f"[beside] {run.in_short('finetune', rival)}", f"[beside] {command}"))
                words = [sys.executable, "-m", *shlex.split(command), "--quiet", "--json"]
                children.append(subprocess.Popen(words, stdout=subprocess.DEVNULL))
        if children:
            say("waiting for the magnitude run")
        for child in children:
            if child.wait() != 0:  # it has said why, on the same stderr
                raise typer.Exit(child.returncode)
    by_name = {Path(each.step.destination or each.name).name: each.result for each in done}
    magnitude = api.report(rival.out)
    reports: dict[str, Any] = {
        "dense": by_name["dense"],
        "magnitude": magnitude,
        "lpsparse": by_name["sparse"],
    }
    rows = [_row(name, report) for name, report in reports.items()]
    final = by_name["report"]
    if as_json:
        print_json(
            {"table": rows, "passed": run.passed(done), "report": str(folder / "sparse" / "report.json")}
        )
    else:
        _print(rows, final, folder)
    if not run.passed(done):
        raise typer.Exit(ExitCode.VERDICT)


def _rival(steps: "list[Step]") -> "FinetuneStep":
    """Gradual magnitude pruning with everything else as in the recipe's sparse fine-tune, but for LAMP
    allocation, with which magnitudes do better on this model."""
    trained = (cast("FinetuneStep", step) for step in steps if step.trains)
    sparse = next(step for step in trained if step.target_sparsity is not None)
    changes = {"method": "gradual", "allocation": "lamp", "out": sparse.out.parent / "magnitude"}
    return sparse.model_copy(update=changes)


@contextmanager
def _children() -> Generator[list[subprocess.Popen[bytes]]]:
    """Processes that do not outlive us: an interrupt is passed on, so that they clean up too."""
    children = signals.started
    try:
        yield children
    finally:
        for child in children:
            if child.poll() is None:
                child.send_signal(signal.SIGINT)
            child.wait()
        children.clear()


def _row(name: str, report: "Report") -> dict[str, Any]:
    quality = report.quality[0]
    return {
        "model": name,
        quality.metric: quality.after,
        "zeros": report.prunable.zeros,
        "sparsity": report.prunable.sparsity,
        "dense_bytes": report.bytes.dense_bytes,
        "packed_bytes": report.bytes.packed_bytes,
    }


def _print(rows: list[dict[str, Any]], final: Any, folder: Path) -> None:
    from lpsparse.reporting import table

    body = [
        (
            row["model"],
            f"{row['loss']:.4f}",
            f"{row['zeros']:,} ({percent(row['sparsity'])})",
            size(row["dense_bytes"]),
            size(row["packed_bytes"]),
        )
        for row in rows
    ]
    print_result("")
    print_result(
        "\n".join(columns(("", "loss", "zeros of prunable", "dense", "packed, about"), body, width()))
    )
    print_result(
        "loss: nats per token on held-out Shakespeare, lower is better; both sparse models had equal steps"
    )
    print_result(f"report: {folder / 'sparse' / 'report.json'}")
    print_result(f"next: lpsparse report {folder / 'sparse'}")
    print_result(f"      lpsparse pack {folder / 'sparse'} {folder / 'packed'}")
    print_result("\n".join(table.budget_lines(final, width(), color=has_color())))
