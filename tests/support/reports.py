"""Reports to draw."""

import re
from typing import Any

from lpsparse.checkpoint.manifest import FileRecord, Quality
from lpsparse.reporting.records import (
    Base,
    Budget,
    Bytes,
    Change,
    Detail,
    Histogram,
    Identity,
    KindRow,
    Made,
    Point,
    Report,
    Share,
    Spectrum,
    TensorRow,
    kind_of,
)

PARTS = (
    "attention.query",
    "attention.key",
    "attention.value",
    "attention.output.dense",
    "mlp.up_proj",
    "norm",
)


WEIGHTS = 7 * 13


def share(of: str, weights: int, zeros: int) -> Share:
    return Share(of=of, weights=weights, zeros=zeros, sparsity=zeros / weights if weights else 0.0)


def tensor(i: int, name: str, **changes: Any) -> TensorRow:
    """A matrix of 7 x 13 with some zeros; a norm is kept."""
    zeros = 0 if "norm" in name else (i * 37) % WEIGHTS
    detail = Detail(
        negative_zeros=0,
        subnormal=0,
        near_zero=1,
        nan=0,
        inf=0,
        smallest=0.001,
        largest=2.0,
        histogram=Histogram(first=-10, counts=(1, 2, 3)),
        n_m={"2:4": (i % 22, 21), "1:4": (0, 21)},
        empty={"rows": (i % 2, 7), "columns": (0, 13)},
        bound_bytes=200,
    )
    change = Change(
        cut=zeros,
        revived=i % 3,
        changed=5,
        largest_cut=0.01,
        smallest_kept=0.011,
        largest_change=0.5,
        at=7,
        before=0.1,
        after=0.6,
        distance=(i % 17) / 17,
    )
    given: dict[str, Any] = {
        "name": name,
        "dtype": "F32",
        "shape": (7, 13),
        "kind": kind_of(name, (7, 13)),
        "layout": "dense",
        "prunable": "norm" not in name,
        "reason": "a norm" if "norm" in name else "a matrix",
        "weights": WEIGHTS,
        "zeros": zeros,
        "sparsity": zeros / WEIGHTS,
        "nonfinite": 0,
        "stored_bytes": 364,
        "dense_bytes": 364,
        "detail": detail,
        "change": change,
        "spectrum": Spectrum(largest=2, smallest=0.5, condition=4),
    }
    return TensorRow(**(given | changes))


def tensors(many: int) -> tuple[TensorRow, ...]:
    names = (f"encoder.layers.{i // len(PARTS)}.{PARTS[i % len(PARTS)]}.weight" for i in range(many))
    return tuple(tensor(i, name) for i, name in enumerate(names))


def bare(rows: tuple[TensorRow, ...] = (), **changes: Any) -> Report:
    """A report with nothing that is optional."""
    cut = [row for row in rows if row.prunable]
    dense = sum(row.dense_bytes for row in rows)
    given: dict[str, Any] = {
        "model": "model",
        "layout": "dense",
        "opens_with": "any safetensors reader",
        "rule": "exact zeros",
        "prunable": share("prunable weights", len(cut) * WEIGHTS, sum(row.zeros for row in cut)),
        "all": share("all weights", len(rows) * WEIGHTS, sum(row.zeros for row in rows)),
        "bytes": Bytes(
            file_bytes=dense + 80,
            dense_bytes=dense,
            zero_bytes=4 * sum(row.zeros for row in rows),
            zero_share=0.4,
            bitmask_bytes=dense // 2,
        ),
        "tensors": rows,
        "nonfinite_tensors": (),
    }
    return Report(**(given | changes))


def full(rows: tuple[TensorRow, ...], **changes: Any) -> Report:
    """A report with all that there can be."""
    kinds = sorted({row.kind for row in rows})
    return bare(
        rows,
        **{
            "kinds": tuple(_kind(kind, rows) for kind in kinds),
            "n_m": {"1:4": (0, 21), "2:4": (9, 21)},
            "empty": {"columns": (0, 13), "rows": (3, 70)},
            "histogram": Histogram(first=-9, counts=(40, 900, 3000, 20)),
            "quality": (quality(),),
            "base": base(rows),
            "budgets": budgets(),
            "training": points(60),
            "baseline": "main/report.json",
            "made": made(),
            "not_measured": ("speed: none was timed",),
            "identity": Identity(base_sha256="ab" * 32, prunable_sha256="cd" * 32),
        }
        | changes,
    )


def _kind(kind: str, rows: tuple[TensorRow, ...]) -> KindRow:
    some = [row for row in rows if row.kind == kind]
    zeros = sum(row.zeros for row in some)
    return KindRow(
        kind=kind,
        tensors=len(some),
        prunable=sum(row.prunable for row in some),
        weights=len(some) * WEIGHTS,
        share=len(some) / len(rows),
        zeros=zeros,
        sparsity=zeros / (len(some) * WEIGHTS),
        stored_bytes=len(some) * 364,
    )


def quality(**changes: Any) -> Quality:
    given: dict[str, Any] = {
        "metric": "accuracy",
        "before": 0.91,
        "after": 0.905,
        "higher_is_better": True,
        "rows": 872,
        "split": "validation",
        "before_error": 0.0097,
        "after_error": 0.0099,
    }
    return Quality(**(given | changes))


def base(rows: tuple[TensorRow, ...]) -> Base:
    dense = 2 * sum(row.dense_bytes for row in rows)
    return Base(
        name="dense",
        is_source=True,
        prunable=share("prunable weights", len(rows) * WEIGHTS, 3),
        file_bytes=dense + 80,
        dense_bytes=dense,
        bytes_ratio=0.5,
        histogram=Histogram(first=-14, counts=(3, 9, 40, 200, 900, 2000, 4000, 3000, 20)),
        only_here=("here.weight",),
        only_there=("there.weight",),
        other_form=("form.weight",),
    )


def budgets() -> tuple[Budget, ...]:
    return (
        Budget(name="max-bytes", limit=2e7, value=2.2e7, margin=-2e6, passed=False),
        Budget(name="max-quality-drop", limit=0.01, value=None, level="warn", passed=False),
        Budget(name="min-sparsity", limit=0.3, value=0.45, margin=0.15, passed=True),
        Budget(name="min-sparsity", pattern="*.query.*", limit=0.4, value=0.45, margin=0.05, passed=True),
        Budget(name="max-layer-sparsity", limit=1, value=0.99, margin=0.01, passed=True, worst="a.weight"),
        Budget(name="accuracy of baseline", limit=0.9, baseline=0.91, value=0.905, margin=0.005, passed=True),
        Budget(name="sparsity of baseline", limit=0.4, baseline=0.44, value=0.45, margin=0.05, passed=True),
    )


def points(many: int) -> tuple[Point, ...]:
    return tuple(
        Point(
            step=10 * i,
            loss=3 / (1 + i),
            lr=1e-4 * (many - i),
            lambda_p=0 if i < 5 else 10.0 ** (-i / 20),
            sparsity=min(1, i / 40),
        )
        for i in range(many)
    )


def made() -> Made:
    return Made(
        lpsparse="0.1.0",
        source="dense",
        revision=None,
        base="org/dense",
        recipe={"prune": {"sparsity": "0.8", "seed": 7, "exclude": ["a"]}},
        files=(FileRecord(name="model.safetensors", size=7, sha256="ef" * 32),),
        notes=("a tied tensor",),
    )


def hostile(name: str) -> Report:
    """A name wherever a report can hold one."""
    rows = tuple(tensor(i, f"{name}.{part}") for i, part in enumerate(("weight", "norm", "q_proj.weight")))
    worst = Budget(
        name="min-sparsity", pattern=name, limit=0.5, value=0.4, margin=-0.1, passed=False, worst=name
    )
    of = Budget(name=f"{name} of baseline", limit=0.9, value=0.9, margin=0.0, passed=True)
    told = made().model_copy(
        update={"source": name, "base": name, "notes": (name,), "recipe": {name: {name: name}, "x": name}}
    )
    beside = base(rows).model_copy(update={"name": name, "only_here": (name,), "other_form": (name,)})
    return full(
        rows,
        model=name,
        base=beside,
        budgets=(worst, of),
        made=told,
        baseline=name,
        nonfinite_tensors=(name,),
        quality=(quality(metric=name, split=name),),
        rule=name,
        opens_with=name,
        not_measured=(name,),
    )


NAMES = {
    "ansi": "\x1b[2J\x1b[31mred",
    "newline": "a\nerror[LPS000]: fake",
    "return": "a\rb",
    "bell": "a\x07b",
    "c1": "a\x9b31mb",
    "bidi": "a\u202ebin\u202c",
    "nul": "a\0b",
    "script": "<script>alert(1)</script>",
    "markdown": "[x](http://x) `x` |x|",
    "formula": "=cmd|' /C calc'!A0",
    "path": "../../x",
}


FORBIDDEN = re.compile("[\0-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
