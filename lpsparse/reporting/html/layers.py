"""Draw the sparsity of each tensor in model order, and of each layer type."""

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from markupsafe import Markup

from lpsparse.reporting.charts import Axis
from lpsparse.reporting.html import svg
from lpsparse.reporting.html.parts import (
    ELSEWHERE,
    MOST_ROWS,
    Figure,
    Table,
    View,
    count,
    named,
    number,
    percent,
    plural,
    size,
)
from lpsparse.reporting.records import KINDS, Budget, Report, TensorRow

MOST_BARS = 400
_HEIGHT = 240
_NAME = 400  # letters that decide the order
_LIMITS = ("min-sparsity", "max-layer-sparsity")


def in_order(tensors: Sequence[TensorRow]) -> list[TensorRow]:
    """Embeddings first, head last, numbers in names by value. Checkpoints often sort names as text."""
    return sorted(tensors, key=lambda row: (_rank(row.kind), _natural(row.name[:_NAME]), row.name))


def _rank(kind: str) -> int:
    return {"embedding": 0, "head": 2}.get(kind, 1)


def _natural(name: str) -> tuple[tuple[int, int, str], ...]:
    parts = re.split(r"([0-9]+)", name)
    return tuple(
        (1, len(part.lstrip("0")), part.lstrip("0")) if i % 2 else (0, 0, part)
        for i, part in enumerate(parts)
    )


def grouped(ordered: Sequence[TensorRow]) -> list[list[TensorRow]]:
    """At most MOST_BARS groups of neighbours."""
    step = max(1, -(-len(ordered) // MOST_BARS))
    return [list(ordered[i : i + step]) for i in range(0, len(ordered), step)]


def said_of_groups(tensors: int, groups: int) -> str:
    if tensors == groups:
        return "One bar is one tensor."
    each = -(-tensors // groups)
    many = count(tensors)
    return f"One bar is up to {count(each)} neighbours together: {many} tensors are too many for a bar each."


def css_of(kind: str) -> str:
    return f"k{KINDS.index(kind)}" if kind in KINDS else f"k{len(KINDS) - 1}"


def largest(tensors: Sequence[TensorRow]) -> tuple[list[TensorRow], str]:
    """The tensors with the most weights, in the given order, and a note about the others."""
    if len(tensors) <= MOST_ROWS:
        return list(tensors), ""
    kept = {row.name for row in sorted(tensors, key=lambda row: (-row.weights, row.name))[:MOST_ROWS]}
    rest = f"The {MOST_ROWS} largest of {count(len(tensors))} tensors; {ELSEWHERE}."
    return [row for row in tensors if row.name in kept], rest


def view(report: Report) -> View:
    title = "Sparsity by layer"
    if not report.tensors:
        return View("layers", title, ("The checkpoint holds no tensors.",))
    ordered = in_order(report.tensors)
    drawn = [row for row in ordered if row.prunable or row.zeros]
    left = len(ordered) - len(drawn)
    words = ["In model order: embeddings first, head last, numbers in names by value."]
    if left:
        words.append(
            f"The figure leaves out {plural(left, 'tensor')} that pruning keeps and that hold no zeros."
        )
    if not drawn:
        return View(
            "layers",
            title,
            (*words, "No tensor is prunable or holds a zero."),
            tables=(_table(ordered), *_spectra(ordered)),
        )
    figure = _figure(report, drawn, _table(ordered))
    return View("layers", title, (" ".join(words),), (figure,), _spectra(ordered))


def _spectra(ordered: list[TensorRow]) -> tuple[Table, ...]:
    """Singular values, if they were asked for."""
    some, rest = largest([row for row in ordered if row.spectrum])
    body = [
        (
            named(row.name),
            number(row.spectrum.largest),
            number(row.spectrum.smallest),
            number(row.spectrum.condition),
        )
        for row in some
        if row.spectrum
    ]
    head = ("tensor", "largest", "smallest", "condition")
    return (Table("Singular values", head, body, rest=rest),) if body else ()


def _table(ordered: list[TensorRow]) -> Table:
    some, rest = largest(ordered)
    body = [
        (
            named(row.name),
            row.kind,
            "prunable" if row.prunable else f"kept: {row.reason}",
            row.dtype,
            "×".join(map(str, row.shape)) or "one value",
            count(row.weights),
            count(row.zeros),
            percent(row.sparsity),
            size(row.stored_bytes),
        )
        for row in some
    ]
    head = ("tensor", "type", "pruning", "dtype", "shape", "weights", "zeros", "sparsity", "stored")
    return Table(
        "Every tensor and its zeros" if not rest else "Tensors and their zeros",
        head,
        body,
        words=(0, 1, 2, 3),
        rest=rest,
    )


def _figure(report: Report, drawn: list[TensorRow], table: Table) -> Figure:
    groups = grouped(drawn)
    limits = [each for each in report.budgets if each.name in _LIMITS]
    axis = Axis(0, 1)
    parts = svg.grid(axis, _HEIGHT, [(each / 4, percent(each / 4, 0)) for each in range(5)])
    parts += [_bar(i, group, len(groups)) for i, group in enumerate(groups)]
    lines = [line for budget in limits for line in _limit(budget, groups)]
    lines += svg.level(svg.up(axis, report.prunable.sparsity, _HEIGHT), "global")
    parts += [*lines[::2], *lines[1::2]]  # rims under all lines, which may lie on one another
    parts += svg.feet([(0, "first"), (1, "last tensor")], _HEIGHT)
    told = (
        f"{len(groups)} bars; prunable weights together are {percent(report.prunable.sparsity)} zero. "
        + said_of_groups(len(drawn), len(groups))
    )
    kinds = [kind for kind in KINDS if any(row.kind == kind for row in drawn)]
    legend = [(css_of(kind), f"{kind}: {_of_kind(drawn, kind)}") for kind in kinds]
    legend.append(("global", f"all prunable weights: {percent(report.prunable.sparsity)}"))
    legend += [("limit", _words(each)) for each in limits]
    colour = " Its colour is the type of most of its weights." if len(groups) < len(drawn) else ""
    drawing = svg.canvas("by-layer", "Sparsity by layer", told, svg.TOP + _HEIGHT + 26, parts, "plot")
    return Figure(
        "Zeros of each tensor, in model order",
        (drawing,),
        table,
        tuple(legend),
        note=said_of_groups(len(drawn), len(groups)) + colour,
    )


def _share(rows: Sequence[TensorRow]) -> float:
    weights = sum(row.weights for row in rows)
    return sum(row.zeros for row in rows) / weights if weights else 0.0


def _of_kind(rows: Sequence[TensorRow], kind: str) -> str:
    some = [row for row in rows if row.kind == kind]
    return f"{plural(len(some), 'tensor')}, {percent(_share(some))}"


def _bar(i: int, group: list[TensorRow], many: int) -> Markup:
    share = _share(group)
    weights: dict[str, int] = {}
    for row in group:
        weights[row.kind] = weights.get(row.kind, 0) + row.weights
    kind = max(weights, key=lambda each: weights[each])
    last = "" if len(group) == 1 else f" … {svg.shortened(group[-1].name)}"
    title = svg.tag("title", f"{svg.shortened(group[0].name)}{last}: {percent(share)}")
    wide = 1 / many
    return svg.tag(
        "rect",
        title,
        x=svg.across(i * wide + 0.1 * wide),
        width=svg.across(0.8 * wide),
        class_=css_of(kind),
        y=svg.TOP + _HEIGHT * (1 - share),
        height=_HEIGHT * share,
    )


def _limit(budget: Budget, groups: list[list[TensorRow]]) -> list[Markup]:
    """A line across the figure, or, for a pattern, across the bars with matching tensors."""
    y = svg.up(Axis(0, 1), budget.limit, _HEIGHT)
    if budget.pattern is None:
        return svg.level(y, "limit")
    pattern, many = budget.pattern, len(groups)
    some = [i for i, group in enumerate(groups) if any(fnmatchcase(row.name, pattern) for row in group)]
    return [line for i in some for line in svg.level(y, "limit", i / many, (i + 1) / many)]


def _words(budget: Budget) -> str:
    of = "" if budget.pattern is None else f" for {svg.shortened(budget.pattern)}"
    return f"budget {budget.name}{of}: {percent(budget.limit)}"


def kinds_view(report: Report) -> View:
    title = "Layer types"
    if not report.kinds:
        return View("types", title, ("There is no table of layer types in this report.",))
    bars = [
        svg.Row(row.kind, percent(row.sparsity), 0, row.sparsity, css_of(row.kind)) for row in report.kinds
    ]
    body = [
        (
            row.kind,
            count(row.tensors),
            count(row.prunable),
            count(row.weights),
            percent(row.share),
            count(row.zeros),
            percent(row.sparsity),
            size(row.stored_bytes),
        )
        for row in report.kinds
    ]
    head = ("type", "tensors", "prunable", "weights", "of all weights", "zeros", "sparsity", "stored")
    told = "; ".join(f"{row.kind} {percent(row.sparsity)}" for row in report.kinds)
    figure = Figure(
        "Zeros of each type",
        (svg.rows("by-type", "Sparsity by layer type", told, bars),),
        Table("Each type in numbers", head, body),
    )
    return View(
        "types", title, ("Types are guessed from names; what is cut does not depend on them.",), (figure,)
    )
