"""Quality against sparsity: the points that are known, each with its interval."""

from markupsafe import Markup

from lpsparse.checkpoint.manifest import Quality
from lpsparse.reporting.html import svg
from lpsparse.reporting.html.parts import Figure, Table, View, coded, count, number, percent, typeset
from lpsparse.reporting.records import Report
from lpsparse.reporting.words import CONFIDENCE, spread

_HEIGHT = 200
_Point = tuple[str, float | None, float, float | None]  # words, sparsity, value, standard error
_CSS = {"before": "dense", "after": "total", "baseline": "limit"}
_KEY = _CSS | {"baseline": "ring"}


def view(report: Report) -> View:
    title = "Quality against sparsity"
    if not report.quality:
        return View(
            "quality", title,
            (coded("No quality is recorded of these weights: `finetune` records it, `eval` measures it."),),
        )  # fmt: skip
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
    limits = {budget.name: budget.limit for budget in report.budgets}
    allowed = limits.get(f"{each.metric} of baseline")
    if allowed is not None:
        found.append(("baseline", limits.get("sparsity of baseline"), allowed, None))
    return found


def _figure(report: Report, i: int) -> Figure:
    each = report.quality[i]
    points = _points(report, each)
    ends = [value + side * CONFIDENCE * (error or 0) for _, _, value, error in points for side in (-1, 0, 1)]
    axis = svg.around(ends)
    parts = svg.grid(axis, _HEIGHT, svg.marked(axis, 6))
    for point in points:
        parts += _drawn(point, axis)
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
    )  # fmt: skip


def _words(words: str) -> str:
    return "baseline, less what it allows" if words == "baseline" else words


def _at(sparsity: float | None) -> str:
    return "not known" if sparsity is None else percent(sparsity)


def _drawn(point: _Point, axis: svg.Axis) -> list[Markup]:
    """A dot with its interval and value, or a line across where the sparsity is not known."""
    words, sparsity, value, error = point
    y, css = svg.up(axis, value, _HEIGHT), _CSS[words]
    if sparsity is None:
        label = svg.tag("text", f"{words} {number(value)}, sparsity not known", x=4, y=y - 6)
        return [svg.tag("line", x1=0, x2="100%", y1=y, y2=y, class_=css), label]
    x = svg.across(sparsity)
    parts: list[Markup] = []
    if error is not None:
        low, high = (svg.up(axis, value + side * CONFIDENCE * error, _HEIGHT) for side in (-1, 1))
        parts.append(svg.tag("line", x1=x, x2=x, y1=low, y2=high, class_=f"bar {css}"))
    parts.append(svg.tag("circle", cx=x, cy=y, r=5.5, class_=css))
    end = sparsity > 0.5 or words == "baseline"  # which may lie near after
    lower = words != "before"
    place = {"x": x, "y": y + (18 if lower else -9), "dx": -10 if end else 10}
    css = "end strong" if end else "strong"
    parts.append(svg.tag("text", f"{words} {number(value)}", class_=css, **place))
    return parts
