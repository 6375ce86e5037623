"""`lpsparse demo`: the main job on a bundled model, offline, with a rival at the same training budget."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lpsparse.cli.output import TrainingBar, print_json, print_result, teller, width
from lpsparse.errors import ExitCode, OutputError
from lpsparse.recipe import FinetuneStep, read_recipe
from lpsparse.reporting.text import columns, size

if TYPE_CHECKING:
    from lpsparse.reporting.measure import Report

RECIPE = Path(__file__).parents[1] / "bundled" / "demo.yaml"
_HELP = """Run finetune, prune and report on a bundled model, offline; exit 1 below its bounds.

\b
Examples:
  lpsparse demo
  lpsparse demo try --json"""


def register(app: typer.Typer) -> None:
    app.command("demo", help=_HELP)(demo)


def demo(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="Folder to make.")] = Path("lpsparse-demo"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print no messages and no progress.")] = False,
) -> None:
    from lpsparse import pipeline
    from lpsparse.verbs import finetune_step

    if folder.exists():
        raise OutputError(401, f"{folder}: exists already", mend="remove it, or give another DIR")
    say = teller(quiet)
    changes = {"out": str(folder)}
    with TrainingBar(quiet) as bar:
        done = pipeline.run(RECIPE, changes, say, bar.update)
        rival = _rival(pipeline.planned(read_recipe(RECIPE, changes), changes, RECIPE))
        say(f"[the rival] {pipeline.command_line('finetune', rival)}")
        beside = finetune_step(rival, say, bar.update)
    by_name = {Path(str(getattr(each.step, "out", each.name))).name: each.result for each in done}
    reports: dict[str, Any] = {"dense": by_name["dense"], "magnitude": beside, "lpsparse": by_name["sparse"]}
    rows = [_row(name, report) for name, report in reports.items()]
    final = by_name["report"]
    if as_json:
        print_json(
            {"table": rows, "passed": pipeline.passed(done), "report": str(folder / "sparse" / "report.json")}
        )
    else:
        _print(rows, final, folder)
    if not pipeline.passed(done):
        raise typer.Exit(ExitCode.VERDICT)


def _rival(steps: list[tuple[int, str, Any]]) -> FinetuneStep:
    """Gradual magnitude pruning with everything else as in the recipe's sparse fine-tune."""
    sparse = next(step for _, name, step in steps if name == "finetune" and step.target_sparsity is not None)
    return sparse.model_copy(update={"method": "gradual", "out": sparse.out.parent / "magnitude"})


def _row(name: str, report: "Report") -> dict[str, Any]:
    quality = report.quality[0]
    return {
        "model": name, quality.metric: quality.after, "zeros": report.prunable.zeros,
        "sparsity": report.prunable.sparsity, "dense_bytes": report.bytes.dense_bytes,
        "bitmask_bytes": report.bytes.bitmask_bytes,
    }  # fmt: skip


def _print(rows: list[dict[str, Any]], final: Any, folder: Path) -> None:
    body = [
        (
            row["model"], f"{row['loss']:.4f}", f"{row['zeros']:,} ({100 * row['sparsity']:.1f} %)",
            size(row["dense_bytes"]), size(row["bitmask_bytes"]),
        )
        for row in rows
    ]  # fmt: skip
    print_result("")
    print_result("\n".join(columns(("", "loss", "zeros of prunable", "dense", "packed"), body, width())))
    print_result(
        "loss: nats a token on held-out Shakespeare, lower is better; magnitude and lpsparse had equal steps"
    )
    for budget in final.budgets:
        print_result(
            f"{budget.name}: {budget.value:.4g}, limit {budget.limit:g}: "
            f"{'ok' if budget.passed else 'FAILED'}"
        )
    print_result(f"report: {folder / 'sparse' / 'report.json'}")
    print_result(
        f"next: lpsparse report {folder / 'sparse'}; lpsparse pack {folder / 'sparse'} {folder / 'packed'}"
    )
