"""How large the weights are, before and after, and where the cut fell."""

import math

from markupsafe import Markup

from lpsparse.reporting.charts import Axis, ticks
from lpsparse.reporting.html import svg
from lpsparse.reporting.html.parts import Figure, Table, View, brief, count, exponent, number, plural
from lpsparse.reporting.records import Histogram, Report
from lpsparse.reporting.words import Sums, changes, one_threshold

_HEIGHT = 220
_Counts = dict[int, int]  # power of two -> weights


def view(report: Report) -> View:
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
    """Why there is no magnitude at which weights were cut."""
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
    many = last - first  # of which few may be there: work goes by those
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
    """A power of two as a number, where it is one that can be written."""
    if abs(power) > 1000:
        return f"2^{power}".replace("-", "−")
    return number(2.0**power, digits) if power > -10 else exponent(2.0**power, digits)
