"""What changed most and least beside BASE, and what came back from zero."""

from lpsparse.reporting.html import svg
from lpsparse.reporting.html.parts import (
    ELSEWHERE,
    Cell,
    Figure,
    Table,
    View,
    coded,
    count,
    filled,
    listed,
    named,
    number,
    percent,
    plural,
)
from lpsparse.reporting.records import Base, Change, Report, TensorRow
from lpsparse.reporting.words import LEFT_BEHIND

_MOST = 10
_Pair = tuple[TensorRow, Change]


def view(report: Report) -> View:
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
    return View("changes", title, (words, *_alone(base)), (_figure(moved, _table(ordered)),))


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


def _figure(moved: list[_Pair], table: Table) -> Figure:
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
    """Those that changed most and least by distance, and where most came back."""
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
