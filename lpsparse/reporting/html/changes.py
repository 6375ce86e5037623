"""Draw how large weights are before and after the cut, and which tensors changed most beside BASE."""

import math

from markupsafe import Markup

from lpsparse.reporting.charts import Axis, ticks
from lpsparse.reporting.html import svg
from lpsparse.reporting.html.parts import (
    ELSEWHERE,
    Cell,
    Figure,
    Table,
    View,
    brief,
    coded,
    count,
    exponent,
    filled,
    listed,
    named,
    number,
    percent,
    plural,
)
from lpsparse.reporting.records import Base, Change, Histogram, Report, TensorRow
from lpsparse.reporting.summary import LEFT_BEHIND, Sums, changes, one_threshold

_HEIGHT = 220
_Counts = dict[int, int]  # power of two -> weights


def magnitudes_view(report: Report) -> View:
    title = "Magnitudes"
    ours = _counts(report.histogram)
    theirs = _counts(report.base.histogram if report.base else None)
    if not ours and not theirs:
        why = "no prunable weight is a finite value other than zero, or only zeros were counted"
        return View("magnitudes", title, (f"There is no histogram: {why}.",))
    words = ["Both axes are logarithmic: a bar is the prunable weights from one power of two to the next."]
    if report.base is None:
        words.append("No BASE was given, so there is only after.")
    sums = changes(report)
    cut, kept = (None, None) if sums is None else (sums.cut_to, sums.kept_from)
    if sums is not None and cut is not None and kept is not None:
        words.append(_gap(cut, kept, bool(one_threshold(sums))))
    elif sums is not None and cut is None:
        words.append(f"{_no_cut(sums)}, so no threshold is drawn.")
    return View("magnitudes", title, (" ".join(words),), (_figure(ours, theirs, cut, kept),))


def _no_cut(sums: Sums) -> str:
    """The reason why no threshold is drawn."""
    if not sums.tensors:
        return "No tensor was compared with BASE"
    if not sums.cut:
        return "No weight that is not zero in BASE is zero here"
    return f"{plural(sums.cut, 'weight')} cut, none of them prunable and finite in BASE"


def _counts(histogram: Histogram | None) -> _Counts:
    if histogram is None:
        return {}
    return {histogram.first + i: many for i, many in enumerate(histogram.counts) if many}


def _gap(cut: float, kept: float, one: bool) -> str:
    ends = f"{number(cut, 6)} is the largest that was cut, {number(kept, 6)} the smallest kept"
    said = f"Of BASE's magnitudes, {ends}: "
    return said + ("one threshold parts them." if one else "there was not one threshold for all.")


def _figure(ours: _Counts, theirs: _Counts, cut: float | None, kept: float | None) -> Figure:
    powers = [*ours, *theirs]
    first, last = min(powers), max(powers) + 1
    high = max((*ours.values(), *theirs.values()))
    axis = Axis(0.7, max(high, 10) * 1.3, log=True)
    many = last - first  # few of them may hold weights, and only those take time
    parts = svg.grid(axis, _HEIGHT, [(value, brief(value)) for value in ticks(axis, 4)])
    parts.append(
        svg.columns({i - first: axis.within(each) for i, each in ours.items()}, many, _HEIGHT, "total")
    )
    if theirs:
        parts.append(_outline({i - first: axis.within(each) for i, each in theirs.items()}, many))
    for value, css in ((cut, "cut"), (kept, "kept")):
        parts += _threshold(value, first, last, css) if value else []
    step = max(1, -(-(last - first) // 3))  # four of them stand apart on a narrow screen
    marks = [((i - first) / (last - first), _power(i, 2)) for i in range(first, last + 1, step)]
    parts += svg.feet(marks, _HEIGHT)
    legend = [("total", "after")] + ([("outline", "before (BASE)")] if theirs else [])
    legend += [("cut", f"largest that was cut: {number(cut, 6)}")] if cut else []
    legend += [("kept", f"smallest that was kept: {number(kept, 6)}")] if kept else []
    told = f"From {_power(first, 2)} to {_power(last, 2)}; the tallest bar is {count(high)} weights."
    body = [
        (
            f"{_power(i, 3)} to {_power(i + 1, 3)}",
            count(theirs.get(i, 0)) if theirs else "–",
            count(ours.get(i, 0)),
        )
        for i in sorted({*ours, *theirs})
    ]
    drawing = svg.canvas("histogram", "Magnitudes", told, svg.TOP + _HEIGHT + 26, parts, "plot")
    table = Table("Weights by magnitude", ("magnitude", "before", "after"), body)
    return Figure("Prunable weights by magnitude", (drawing,), table, tuple(legend))


def _outline(heights: dict[int, float], many: int) -> Markup:
    points = [(0.0, 0.0)]
    for i, high in sorted(heights.items()):
        left, right = i / many, (i + 1) / many
        points += [] if i - 1 in heights else [(left, 0.0)]
        points += [(left, high), (right, high)]
        points += [] if i + 1 in heights else [(right, 0.0)]
    return svg.line([*points, (1.0, 0.0)], _HEIGHT, "outline")


def _threshold(value: float, first: int, last: int, css: str) -> list[Markup]:
    share = min(1.0, max(0.0, (math.log2(value) - first) / (last - first)))
    return svg.upright(share, _HEIGHT, css)


def _power(power: int, digits: int) -> str:
    """A power of two as a number, if a float can hold it."""
    if abs(power) > 1000:
        return f"2^{power}".replace("-", "−")
    return number(2.0**power, digits) if power > -10 else exponent(2.0**power, digits)


_MOST = 10
_Pair = tuple[TensorRow, Change]


def changes_view(report: Report) -> View:
    title = "Largest and smallest changes"
    base = report.base
    if base is None:
        why = coded("No BASE was given: `lpsparse report MODEL BASE` compares value by value.")
        return View("changes", title, (why,))
    pairs = [(row, row.change) for row in report.tensors if row.change is not None]
    if not pairs:
        why = "No tensor was compared: none of floats has its name and shape in BASE, or this is a dry run."
        return View("changes", title, (why, *_alone(base)))
    cut, revived, changed = (
        sum(getattr(each, key) for _, each in pairs) for key in ("cut", "revived", "changed")
    )
    words = (
        f"{plural(len(pairs), 'tensor')} compared: {plural(cut, 'value')} cut, {count(revived)} back from "
        f"zero, {count(changed)} changed otherwise."
    )
    ordered = sorted(pairs, key=lambda pair: (-(pair[1].distance or 0.0), pair[0].name))
    moved = [pair for pair in ordered if pair[1].distance]
    if not moved:
        words += " No distance is above zero."
        return View("changes", title, (words, *_alone(base)), tables=(_table(ordered),))
    return View("changes", title, (words, *_alone(base)), (_moved_figure(moved, _table(ordered)),))


def _alone(base: Base) -> tuple[Cell, ...]:
    groups = (
        ("Only in this checkpoint", base.only_here),
        ("Only in BASE", base.only_there),
        ("Of another shape", base.other_form),
    )
    missed = [(words, _without(names, base.left_behind)) for words, names in groups]
    left = (f"Left behind ({LEFT_BEHIND})", base.left_behind)
    return tuple(_said(words, names) for words, names in (*missed, left) if names)


def _without(names: tuple[str, ...], others: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in names if name not in others)


def _said(words: str, names: tuple[str, ...]) -> Cell:
    return filled("{}: {}.", words, listed(names))


def _moved_figure(moved: list[_Pair], table: Table) -> Figure:
    most, least = moved[:_MOST], moved[_MOST:][-_MOST:]
    top = max(each.distance or 0.0 for _, each in most)
    bars = [_bar(pair, top, "less") for pair in most] + [_bar(pair, top, "dense") for pair in least]
    told = f"The most, {svg.shortened(moved[0][0].name)}, moved by {percent(moved[0][1].distance or 0.0)}."
    legend = [("less", f"the {len(most)} that moved most")]
    if least:
        legend.append(("dense", f"the {len(least)} that moved least, of those that moved at all"))
    return Figure(
        "How far tensors moved",
        (svg.rows("moved", "Relative change of tensors", told, bars),),
        table,
        tuple(legend),
        note="Distance: root of the sum of squared changes over that of BASE's squares.",
    )


def _bar(pair: _Pair, top: float, css: str) -> svg.Row:
    row, change = pair
    moved = change.distance or 0.0
    return svg.Row(
        svg.shortened(row.name), percent(moved), 0, moved / top, css, f"{row.name[:300]}: {percent(moved)}"
    )


def _table(ordered: list[_Pair]) -> Table:
    """The tensors that changed most and least by distance, and those with most revived weights."""
    ends = ordered if len(ordered) <= 4 * _MOST else [*ordered[: 2 * _MOST], *ordered[-2 * _MOST :]]
    back = sorted((pair for pair in ordered if pair[1].revived), key=lambda pair: -pair[1].revived)[:_MOST]
    shown = [*ends, *(pair for pair in back if pair not in ends)]
    body = [
        (
            named(row.name),
            "–" if each.distance is None else percent(each.distance),
            count(each.cut),
            count(each.revived),
            count(each.changed),
            number(each.largest_change),
            "–" if each.at is None else count(each.at),
            "–" if each.at is None else f"{number(each.before)} → {number(each.after)}",
        )
        for row, each in shown
    ]
    many = count(len(ordered))
    rest = f"{len(shown)} of {many} tensors: the ends, and those with most revived zeros; {ELSEWHERE}."
    head = ("tensor", "distance", "cut", "revived", "changed", "largest change", "at value", "before → after")
    return Table("Changes by tensor", head, body, rest=rest if len(shown) < len(ordered) else "")
