"""Draw quality against sparsity, and the curves of a training against its steps."""

from dataclasses import dataclass

from markupsafe import Markup

from lpsparse.checkpoint.manifest import Quality
from lpsparse.reporting.charts import Axis
from lpsparse.reporting.html import svg
from lpsparse.reporting.html.parts import Figure, Table, View, coded, count, number, percent, plural, typeset
from lpsparse.reporting.records import Point, Report
from lpsparse.reporting.summary import CONFIDENCE, spread

_HEIGHT = 200
_LINE = 16  # pixels that a line of words takes
_UNDER = ("after", "allowed")  # points with their words under them
_Point = tuple[str, float | None, float, float | None]  # words, sparsity, value, standard error
_CSS = {"before": "dense", "after": "total", "baseline": "theirs", "allowed": "limit"}
_KEY = _CSS | {"allowed": "ring"}


def quality_view(report: Report) -> View:
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
    """The height of each point's words: above or below it, apart from all others, because all points are near
    on a narrow screen."""
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
    """A dot with its interval and value, or a line across if the sparsity is unknown."""
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


_CURVE_HEIGHT = 140
_MOST_ROWS = 100


@dataclass(frozen=True, slots=True)
class _Curve:
    name: str  # of Point's field
    title: str
    css: str


_CURVES = (
    _Curve("loss", "Loss", "c1"),
    _Curve("sparsity", "Sparsity", "c2"),
    _Curve("lambda_p", "Decay strength λ, log scale", "c3"),
    _Curve("lr", "Learning rate", "c4"),
)


def training_view(report: Report) -> View:
    title = "Training"
    if not report.training:
        return View(
            "training",
            title,
            ("No training run is recorded beside these weights: there is no metrics.jsonl.",),
        )
    points = report.training
    every = max(1, -(-len(points) // _MOST_ROWS))
    kept = [point for i, point in enumerate(points) if i % every == 0 or i == len(points) - 1]
    body = [
        (count(each.step), number(each.loss), percent(each.sparsity), number(each.lambda_p), number(each.lr))
        for each in kept
    ]
    rest = f"{len(kept)} of {len(points)} points; all are in report.json." if len(kept) < len(points) else ""
    table = Table("Training by step", ("step", "loss", "sparsity", "λ", "learning rate"), body, rest=rest)
    last = count(points[-1].step)
    words = f"{plural(len(points), 'point')} of the run, to step {last}; the loss is that of training."
    zero = any(point.lambda_p <= 0 for point in points)
    note = "λ is drawn where it is above zero: a log scale has no place for zero." if zero else ""
    drawings = tuple(_drawing(points, curve) for curve in _CURVES)
    return View("training", title, (words,), (Figure("Curves of the run", drawings, table, note=note),))


def _drawing(points: tuple[Point, ...], curve: _Curve) -> svg.Markup:
    pairs: list[tuple[int, float]] = [(point.step, getattr(point, curve.name)) for point in points]
    if curve.name == "lambda_p":
        pairs = [pair for pair in pairs if pair[1] > 0]
    name = f"curve-{curve.name.replace('_', '-')}"
    label = svg.tag("text", curve.title, x=0, y=12, class_="strong")
    if not pairs:
        none = svg.tag("text", "zero at every step", x=0, y=svg.TOP + 40)
        return svg.canvas(name, curve.title, "It is zero at every step.", svg.TOP + 60, [label, none], "plot")
    values = [value for _, value in pairs]
    axis = _axis(curve.name, values)
    low, high = points[0].step, max(points[-1].step, points[0].step + 1)
    shape = [((step - low) / (high - low), axis.within(value)) for step, value in pairs]
    words = percent if curve.name == "sparsity" else number
    ends, extremes = (values[0], values[-1]), (min(values), max(values))
    told = "From {} to {}; ".format(*map(words, ends)) + "between {} and {}.".format(*map(words, extremes))
    marks = [
        (value, percent(value, 0) if curve.name == "sparsity" else text)
        for value, text in svg.marked(axis, 4)
    ]
    parts = [*svg.grid(axis, _CURVE_HEIGHT, marks), svg.line(shape, _CURVE_HEIGHT, f"curve {curve.css}")]
    parts += svg.feet([(0, f"step {count(low)}"), (1, count(points[-1].step))], _CURVE_HEIGHT)
    group = svg.tag(
        "svg", *parts, y=16, overflow="visible", width="100%", height=svg.TOP + _CURVE_HEIGHT + 26
    )
    return svg.canvas(name, curve.title, told, svg.TOP + _CURVE_HEIGHT + 46, [label, group], "plot")


def _axis(name: str, values: list[float]) -> Axis:
    if name == "sparsity":
        return Axis(0, 1)
    if name == "lr":
        return Axis(0, max(*values, 1e-300) * 1.1)
    return svg.around_log(values) if name == "lambda_p" else svg.around(values)
