"""Training as it went: loss, decay strength, learning rate and sparsity against step."""

from dataclasses import dataclass

from lpsparse.reporting.charts import Axis
from lpsparse.reporting.html import svg
from lpsparse.reporting.html.parts import Figure, Table, View, count, number, percent, plural
from lpsparse.reporting.records import Point, Report

_HEIGHT = 140
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


def view(report: Report) -> View:
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
    parts = [*svg.grid(axis, _HEIGHT, marks), svg.line(shape, _HEIGHT, f"curve {curve.css}")]
    parts += svg.feet([(0, f"step {count(low)}"), (1, count(points[-1].step))], _HEIGHT)
    group = svg.tag("svg", *parts, y=16, overflow="visible", width="100%", height=svg.TOP + _HEIGHT + 26)
    return svg.canvas(name, curve.title, told, svg.TOP + _HEIGHT + 46, [label, group], "plot")


def _axis(name: str, values: list[float]) -> Axis:
    if name == "sparsity":
        return Axis(0, 1)
    if name == "lr":
        return Axis(0, max(*values, 1e-300) * 1.1)
    return svg.around_log(values) if name == "lambda_p" else svg.around(values)
