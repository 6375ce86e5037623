"""Draw patterns of zeros: N:M groups, and all-zero rows, columns, heads and blocks."""

from collections.abc import Sequence

from lpsparse.reporting.html import svg
from lpsparse.reporting.html.layers import grouped, in_order, largest, said_of_groups
from lpsparse.reporting.html.parts import Figure, Table, View, count, named, percent
from lpsparse.reporting.records import Report, TensorRow

_LANE = 34  # pixels that bars of a lane are high
_Counts = dict[str, tuple[int, int]]


def view(report: Report) -> View:
    title = "Patterns of zeros"
    totals: _Counts = {**report.n_m, **report.empty}
    if not totals:
        why = "no prunable tensor was looked through (a dry run counts zeros alone), or there is none"
        return View("patterns", title, (f"No patterns are known: {why}.",))
    said = (
        "An N:M group is met where of M neighbours in a row at most N are not zero; the others count what is "
        "all zero."
    )
    figures = [_totals(totals)]
    rows = [row for row in in_order(report.tensors) if row.prunable and row.detail]
    there = [name for name, (part, _) in totals.items() if part]
    if rows and there:
        figures.append(_by_layer(rows, there, totals))
    return View("patterns", title, (f"{said} Prunable tensors only.",), tuple(figures))


def _words(name: str) -> str:
    return f"{name} groups met" if ":" in name else f"{name} all zero"


def _css(name: str) -> str:
    return "total" if ":" in name else "less"


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _totals(totals: _Counts) -> Figure:
    shares = {name: _ratio(part, whole) for name, (part, whole) in totals.items()}
    bars = [svg.Row(_words(name), percent(share), 0, share, _css(name)) for name, share in shares.items()]
    body = [
        (_words(name), count(part), count(whole), percent(shares[name]))
        for name, (part, whole) in totals.items()
    ]
    told = "; ".join(f"{_words(name)} {percent(share)}" for name, share in shares.items())
    return Figure(
        "Over all prunable tensors",
        (svg.rows("patterns-all", "Patterns of zeros", told, bars),),
        Table("Patterns, over all prunable tensors", ("pattern", "so many", "of", "share"), body),
        (("total", "N:M groups"), ("less", "all zero")),
    )


def _of(row: TensorRow) -> _Counts:
    return {**row.detail.n_m, **row.detail.empty} if row.detail else {}


def _together(rows: Sequence[TensorRow], name: str) -> float:
    pairs = [_of(row).get(name, (0, 0)) for row in rows]
    return _ratio(sum(part for part, _ in pairs), sum(whole for _, whole in pairs))


def _by_layer(rows: list[TensorRow], there: list[str], totals: _Counts) -> Figure:
    groups = grouped(rows)
    drawings = tuple(_lane(i, name, groups) for i, name in enumerate(there))
    some, rest = largest(rows)
    names = list(totals)
    body = [(named(row.name), *(_cell(_of(row).get(name)) for name in names)) for row in some]
    none = [_words(name) for name in names if name not in there]
    note = f"Each strip goes from 0 to 100 %. {said_of_groups(len(rows), len(groups))}"
    note += f" None anywhere: {', '.join(none)}." if none else ""
    return Figure(
        "By layer, in model order",
        drawings,
        Table("Patterns by tensor", ("tensor", *map(_words, names)), body, rest=rest),
        note=note,
    )


def _cell(counts: tuple[int, int] | None) -> str:
    return "–" if counts is None else percent(_ratio(*counts))


def _lane(i: int, name: str, groups: list[list[TensorRow]]) -> svg.Markup:
    shares = [_together(group, name) for group in groups]
    most = max(shares)
    told = f"{_words(name)}: from {percent(min(shares))} to {percent(most)} by tensor."
    y = svg.TOP + _LANE
    parts = [
        svg.tag("text", _words(name), x=0, y=9, class_="strong"),
        svg.tag("text", f"at most {percent(most)}", x="100%", y=9, class_="end"),
        svg.tag("rect", x=0, y=svg.TOP, width="100%", height=_LANE, class_="track"),
        svg.columns(dict(enumerate(shares)), len(shares), _LANE, _css(name)),
        svg.tag("line", x1=0, x2="100%", y1=y, y2=y, class_="grid"),
    ]
    return svg.canvas(f"lane-{i}", _words(name), told, y + 10, parts, "rows")
