"""Quality at equal training budget: a recipe's sparse fine-tune by lpsparse and by its rivals, over seeds.

    python benchmarks/quality.py recipes/resnet20-cifar10.yaml --seeds 0,1,2 --sparsity 0.8 \
        --set model=resnet20-12fca82f.th --set data=./cifar10 ...

Runs the recipe's steps up to its last fine-tune once (the dense model), then that fine-tune for every
method, sparsity and seed with everything else equal, and measures each result on the recipe's `eval` split.
Finished runs are reused, so an interrupted table goes on where it stopped. Prints Markdown; writes
OUT/quality.json.
"""

import argparse
import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from lpsparse import api
from lpsparse.cli.bar import showing
from lpsparse.cli.output import Voice
from lpsparse.cli.recipes import overrides
from lpsparse.commands import evaluate, finetune
from lpsparse.recipes.file import read_recipe
from lpsparse.recipes.plan import planned
from lpsparse.recipes.run import is_finished
from lpsparse.steps.finetune import EvalStep, FinetuneStep


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--sparsity", default="")
    parser.add_argument("--methods", default="lp,gradual,one-shot")
    arguments = parser.parse_args()
    changes = overrides(arguments.set)
    read = read_recipe(arguments.recipe, changes)
    steps = [link.step for link in planned(read, changes, arguments.recipe)]
    sparse = next(step for step in reversed(steps) if isinstance(step, FinetuneStep))
    evaluation = next(step for step in reversed(steps) if isinstance(step, EvalStep))
    for step in steps[: steps.index(sparse)]:
        if isinstance(step, FinetuneStep):
            train(step)
    rows = [measured("dense", "", None, evaluation.model_copy(update={"model": sparse.model}))]
    wanted = arguments.sparsity.split(",") if arguments.sparsity else [str(sparse.target_sparsity)]
    for sparsity in wanted:
        for method in arguments.methods.split(","):
            for seed in map(int, arguments.seeds.split(",")):
                rows.append(run(sparse, evaluation, method, sparsity, seed))
                save(read.out, rows)
    print(table(rows))


def run(sparse: FinetuneStep, evaluation: EvalStep, method: str, sparsity: str, seed: int) -> dict[str, Any]:
    out = sparse.out.parent / "quality" / f"{method}-{sparsity}-{seed}"
    values = {**sparse.model_dump(), "method": method, "target_sparsity": sparsity, "seed": seed, "out": out}
    step = FinetuneStep.model_validate(values, by_name=True)
    train(step)
    return measured(method, sparsity, seed, evaluation.model_copy(update={"model": str(out)}))


def train(step: FinetuneStep) -> None:
    if is_finished(step):  # by these settings, on this data
        return
    step.out.parent.mkdir(parents=True, exist_ok=True)
    with showing(Voice()):
        finetune.finetune_step(step, print)


def measured(method: str, sparsity: str, seed: int | None, evaluation: EvalStep) -> dict[str, Any]:
    found = evaluate.evaluate_step(evaluation).as_data()
    report = api.report(evaluation.model, include=(), exclude=()) if method != "dense" else None
    share = None if report is None else report.prunable.sparsity
    return {"method": method, "sparsity": sparsity, "seed": seed, "zeros": share, **found, "model": method}


def save(out: Path, rows: list[dict[str, Any]]) -> None:
    (out / "quality.json").write_text(json.dumps(rows, indent=1) + "\n")


def table(rows: list[dict[str, Any]]) -> str:
    """Mean and sample standard deviation over seeds."""
    metric = "accuracy" if "accuracy" in rows[0] else "loss"
    lines = [f"| model | zeros of prunable | {metric} | loss | seeds |", "| --- | --- | --- | --- | --- |"]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["sparsity"], row["method"]), []).append(row)
    for (_, method), group in groups.items():
        zeros = "0" if group[0]["zeros"] is None else f"{100 * mean(row['zeros'] for row in group):.2f} %"
        figures = [
            spread([row[key] for row in group], 100 if key == "accuracy" else 1) for key in (metric, "loss")
        ]
        lines.append(f"| {method} | {zeros} | {figures[0]} | {figures[1]} | {len(group)} |")
    return "\n".join(lines)


def spread(values: list[float], scale: int) -> str:
    shown = f"{scale * mean(values):.{2 if scale > 1 else 4}f}"
    return shown if len(values) < 2 else f"{shown} ± {scale * stdev(values):.{2 if scale > 1 else 4}f}"


if __name__ == "__main__":
    main()
