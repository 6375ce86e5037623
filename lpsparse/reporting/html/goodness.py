"""Quality against sparsity: the points that are known, each with its interval."""

from markupsafe import Markup

from lpsparse.checkpoint.manifest import Quality
from lpsparse.reporting.charts import Axis
from lpsparse.reporting.html import svg
from lpsparse.reporting.html.parts import Figure, Table, View, coded, count, number, percent, typeset
from lpsparse.reporting.records import Report
from lpsparse.reporting.words import CONFIDENCE, spread

_HEIGHT = 200
_LINE = 16  # pixels that a line of words takes
_UNDER = ("after", "allowed")  # points with their words under them
_Point = tuple[str, float | None, float, float | None]  # words, sparsity, value, standard error
_CSS = {"before": "dense", "after": "total", "baseline": "theirs", "allowed": "limit"}
_KEY = _CSS | {"allowed": "ring"}


def view(report: Report) -> View:
    title = "Quality against sparsity"
    if not report.quality:
        return View(
            "quality",
            title,
            (coded("No quality is recorded of these weights: `finetune` and `eval --save` record it."),),
        )
    words = (
        "Upright lines are 95 % intervals: 1.96 standard errors to either side, examples (tokens) taken as "
        "independent. They tell of chance in the choice of examples, not in training.",
    )
    return View("quality", title, words, tuple(_figure(report, i) for i in range(len(report.quality))))


def _points(report: Report, each: Quality) -> list[_Point]:
    base = report.base
    found: list[_Point] = []
    if each.before is not None:
        is_base = base is not None and (base.is_source or each.of_base is not None)
        known = base.prunable.sparsity if base is not None and is_base else None
        found.append(("before", known, each.before, each.before_error))
    found.append(("after", report.prunable.sparsity, each.after, each.after_error))
    budgets = {budget.name: budget for budget in report.budgets}
    good, sparse = budgets.get(f"{each.metric} of baseline"), budgets.get("sparsity of baseline")
    if good is None:
        return found
    own = None if sparse is None else sparse.baseline, good.baseline
    allowed = None if sparse is None else sparse.limit, good.limit
    if own[1] is not None:  # a report.json may be older than this figure
        found.append(("baseline", own[0], own[1], None))
    return found if own == allowed else [*found, ("allowed", *allowed, None)]


def _figure(report: Report, i: int) -> Figure:
    each = report.quality[i]
    points = _points(report, each)
    ends = [value + side * CONFIDENCE * (error or 0) for _, _, value, error in points for side in (-1, 0, 1)]
    axis = svg.around(ends)
    parts = svg.grid(axis, _HEIGHT, svg.marked(axis, 6))
    for point, foot in zip(points, _feet(points, axis), strict=True):
        parts += _drawn(point, axis, foot)
    parts += svg.feet([(share / 4, percent(share / 4, 0)) for share in range(5)], _HEIGHT)
    better = "higher is better" if each.higher_is_better else "lower is better"
    told = "; ".join(f"{words} {number(value)} at {_at(sparsity)}" for words, sparsity, value, _ in points)
    body = [
        (_words(words), _at(sparsity), number(value), "–" if error is None else typeset(spread(error)))
        for words, sparsity, value, error in points
    ]
    name = f"{each.metric} on {each.split}" + (f" ({i + 1})" if len(report.quality) > 1 else "")
    return Figure(
        f"{name}, {better}",
        (svg.canvas(f"quality-{i}", name, told, svg.TOP + _HEIGHT + 26, parts, "plot"),),
        Table(f"Quality: {name}", ("point", "sparsity", each.metric, "95 % interval"), body),
        tuple((_KEY[words], _words(words)) for words, _, _, _ in points),
        note=f"Across: sparsity of the prunable weights. Measured on {count(each.rows)} of {each.split}.",
    )


def _words(words: str) -> str:
    return "baseline, less what it allows" if words == "allowed" else words


def _at(sparsity: float | None) -> str:
    return "not known" if sparsity is None else percent(sparsity)


def _feet(points: list[_Point], axis: Axis) -> list[float]:
    """Where the words of each point stand: over or under it, and none beside those of another, since on a
    narrow screen all points are near."""
    found = [
        svg.up(axis, value, _HEIGHT) + (-6 if sparsity is None else 18 if words in _UNDER else -9)
        for words, sparsity, value, _ in points
    ]
    order = sorted(range(len(points)), key=found.__getitem__)
    least, most = 0.0, svg.TOP + _HEIGHT + 0.0
    for i in order:
        found[i] = max(found[i], least)
        least = found[i] + _LINE
    for i in reversed(order):
        found[i] = min(found[i], most)
        most = found[i] - _LINE
    return found


def _drawn(point: _Point, axis: Axis, foot: float) -> list[Markup]:
    """A dot with its interval and value, or a line across where the sparsity is not known."""
    words, sparsity, value, error = point
    y, css = svg.up(axis, value, _HEIGHT), _CSS[words]
    if sparsity is None:
        label = svg.tag("text", f"{words} {number(value)}, sparsity not known", x=4, y=foot)
        return [svg.tag("line", x1=0, x2="100%", y1=y, y2=y, class_=css), label]
    x = svg.across(sparsity)
    parts: list[Markup] = []
    if error is not None:
        low, high = (svg.up(axis, value + side * CONFIDENCE * error, _HEIGHT) for side in (-1, 1))
        parts.append(svg.tag("line", x1=x, x2=x, y1=low, y2=high, class_=f"bar {css}"))
    parts.append(svg.tag("circle", cx=x, cy=y, r=5.5, class_=css))
    end = sparsity > 0.5 or words in ("baseline", "allowed")  # which may lie near after
    place = {"x": x, "y": foot, "dx": -10 if end else 10}
    css = "end strong" if end else "strong"
    parts.append(svg.tag("text", f"{words} {number(value)}", class_=css, **place))
    return parts
