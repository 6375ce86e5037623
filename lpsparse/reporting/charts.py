"""Axes, ticks and colours of every chart, and the figures that are SVG files: a model card's and a sweep's.

No script, font or file from outside. The same figures give the same bytes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from string import Template
from typing import Any

from lpsparse.reporting.records import Report, TensorRow
from lpsparse.reporting.text import clean, percent, size

# Okabe and Ito's palette, which colour-blind readers tell apart; the lighter tones are for dark pages.
BLUE, SKY, VERMILION, ORANGE, GREY = "#0072b2", "#56b4e9", "#d55e00", "#e69f00", "#b0b0b0"


@dataclass(frozen=True, slots=True)
class Axis:
    low: float
    high: float
    log: bool = False
    start: float = 0.0  # of the drawing, where `low` is
    end: float = 1.0

    def share(self, value: float) -> float:
        """Where a value lies between low (0) and high (1); it may lie outside."""
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log(max(value, low)), math.log(low), math.log(high)
        return (value - low) / (high - low)

    def at(self, value: float) -> float:
        """The place of a value in the drawing."""
        return self.start + self.share(value) * (self.end - self.start)

    def within(self, value: float) -> float:
        """The share of a value; one outside lies at the end."""
        return min(1.0, max(0.0, self.share(value)))


def step_of(low: float, high: float, most: int = 5) -> float:
    """The distance of ticks: 1, 2 or 5 times a power of ten, so that about `most` fit."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * each for each in (1, 2, 5, 10) if power * each >= rough * (1 - 1e-9))


def ticks(axis: Axis, most: int = 5) -> list[float]:
    """Round values on an axis; on a long log axis powers of ten."""
    if not axis.log:
        step = step_of(axis.low, axis.high, most)
        first, last = math.ceil(axis.low / step - 1e-9), math.floor(axis.high / step + 1e-9)
        return [i * step for i in range(first, last + 1)]
    first, last = math.ceil(math.log10(axis.low) - 1e-9), math.floor(math.log10(axis.high) + 1e-9)
    if last - first < 1:  # under two powers of ten: their halves and fifths too
        fine = (each * 10.0**power for power in range(first - 1, last + 1) for each in (1, 2, 5))
        return [value for value in fine if axis.low <= value <= axis.high]
    step = max(1, -(-(last - first + 1) // most))
    return [10.0**power for power in range(first, last + 1, step)]


FIGURE = "figures/sparsity.svg"
_BARS_WIDE, _BARS_HIGH, _BARS_LEFT, _BARS_TOP = 640, 160, 52, 24
_MOST_BARS = 320
_COLORS = {True: BLUE, False: GREY}  # prunable, kept


def sparsity_figure(report: Report) -> str:
    """The figure of a model card: one bar per tensor, in the order of the file. Many tensors share bars."""
    rows = [row for row in report.tensors if row.weights]
    step = max(1, -(-len(rows) // _MOST_BARS))
    bars = [rows[i : i + step] for i in range(0, len(rows), step)]
    wide = _BARS_WIDE / max(len(bars), 1)
    share = report.prunable
    zeros = f"{share.zeros:,} of {share.weights:,} prunable weights are zero"
    said = f"{zeros} ({percent(share.sparsity)})"
    each = "one tensor" if step == 1 else f"{step} tensors"
    right, low = _BARS_LEFT + _BARS_WIDE, _BARS_TOP + _BARS_HIGH
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {right + 16} {low + 40}" role="img" '
        'font-family="sans-serif" font-size="12">',
        f"<title>Sparsity by layer</title><desc>{said}; a bar is {each}, in the order of the file.</desc>",
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        *(_bar_of(bar, _BARS_LEFT + i * wide, wide) for i, bar in enumerate(bars)),
        *(_level(level) for level in (0, 50, 100)),
        f'<text x="{_BARS_LEFT}" y="{_BARS_TOP - 8}">{said}</text>',
        f'<rect x="{_BARS_LEFT}" y="{low + 14}" width="10" height="10" fill="{_COLORS[True]}"/>',
        f'<text x="{_BARS_LEFT + 16}" y="{low + 24}">prunable</text>',
        f'<rect x="{_BARS_LEFT + 90}" y="{low + 14}" width="10" height="10" fill="{_COLORS[False]}"/>',
        f'<text x="{_BARS_LEFT + 106}" y="{low + 24}">kept; a bar is {each}, in the order of the file</text>',
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _bar_of(rows: list[TensorRow], left: float, wide: float) -> str:
    high = _BARS_HIGH * sum(row.zeros for row in rows) / sum(row.weights for row in rows)
    color = _COLORS[any(row.prunable for row in rows)]
    place = (
        f'x="{left:.2f}" y="{_BARS_TOP + _BARS_HIGH - high:.2f}" width="{0.9 * wide:.2f}" height="{high:.2f}"'
    )
    return f'<rect {place} fill="{color}"/>'


def _level(level: int) -> str:
    y = _BARS_TOP + _BARS_HIGH * (100 - level) / 100
    line = (
        f'<line x1="{_BARS_LEFT}" x2="{_BARS_LEFT + _BARS_WIDE}" y1="{y:.1f}" y2="{y:.1f}" stroke="#808080"/>'
    )
    return f'{line}<text x="{_BARS_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{level} %</text>'


_WIDTH, _HEIGHT, _TOP, _BOTTOM = 760, 380, 76, 320
_LEFT, _RIGHT = (70, 370), (440, 740)  # from and to, of the two panels
_LETTER, _LINE = 6.5, 12  # about what a letter of 11 px and a line of them take
_UNITS = {"loss": "nats", "accuracy": "fraction"}
# Words have a rim of the ground's colour, so that no line strikes through them.
_STYLE = Template("""
  svg { background: #fff; color: #222; font: 12px sans-serif }
  text { fill: currentColor; stroke: #fff; stroke-width: 3px; paint-order: stroke }
  .axis { stroke: #888; fill: none } .grid { stroke: #e4e4e4 }
  .line { stroke: $blue; fill: none; stroke-width: 1.5 } .good { fill: $blue; stroke: $blue }
  .bad { fill: #fff; stroke: $vermilion; stroke-width: 2 } .dense { fill: currentColor }
  .best { fill: none; stroke: $blue; stroke-width: 2 } .limit { stroke: $vermilion; stroke-dasharray: 5 4 }
  .small { font-size: 11px } .head { font-size: 14px; font-weight: bold }
  @media (prefers-color-scheme: dark) {
    svg { background: #161616; color: #e8e8e8 } text { stroke: #161616 }
    .grid { stroke: #333 } .line { stroke: $sky }
    .good { fill: $sky; stroke: $sky } .best { stroke: $sky } .bad { fill: #161616; stroke: $orange }
    .limit { stroke: $orange }
  }
""").substitute(blue=BLUE, sky=SKY, vermilion=VERMILION, orange=ORANGE)


@dataclass(frozen=True, slots=True)
class _Point:
    sparsity: float
    size: float
    quality: float
    label: str
    kind: str  # good | bad | dense
    best: bool = False


def sweep_figure(found: dict[str, Any]) -> str:
    """The figure of a sweep: quality against sparsity on the left, against bytes on the right; limits of
    budgets dashed."""
    rows = [row for row in found["rows"] if row["after"] is not None]
    if not rows:
        words = "no quality was recorded"
        return _page("Size and quality", words, [_text(_LEFT[0], 90, words)])
    files = any(_limit(rows, "max-bytes")) or all(row["layout"] != "dense" for row in rows)
    points = [_point(row, "file_bytes" if files else "bitmask_bytes", found["smallest"]) for row in rows]
    dense = found["dense"]
    if dense["quality"] is not None:
        share = dense["zeros"] / max(1, dense["weights"])
        points.insert(0, _Point(share, dense["file_bytes"], dense["quality"], "dense", "dense"))
    better = "higher" if rows[0]["higher_is_better"] else "lower"
    metric = clean(str(rows[0]["metric"]))
    y_name = f"{metric} ({_UNITS.get(metric, 'its unit')}; {better} is better)"
    floor = _floor(rows, dense["quality"])
    y = _spread([point.quality for point in points] + [level for level, _ in floor])
    factor, unit = _unit(max(point.size for point in points))
    limits = [(level / factor, text) for level, text in _limit(rows, "max-bytes")]
    most = max([point.size / factor for point in points] + [level for level, _ in limits])
    left, right = Axis(0, 1, False, *_LEFT), Axis(0, most * 1.08, False, *_RIGHT)
    what = "weight files" if files else "weight files stored as bitmask"
    marks = [
        _text(_LEFT[0], 24, "Size and quality at each sparsity", "head"),
        _text(_LEFT[0], 44, y_name, "small"),
        *_panel(left, y, "sparsity of prunable weights (%)", lambda value: f"{100 * value:.0f}"),
        *_panel(right, y, f"{what} ({unit})", _plain(right)),
        *_limits(left, y, _limit(rows, "min-sparsity"), floor),
        *_limits(right, y, limits if files else [], [(level, "") for level, _ in floor]),
        *_curve(left, y, [(point.sparsity, point) for point in points]),
        *_curve(right, y, [(point.size / factor, point) for point in points]),
    ]
    said = (
        f"{point.label}: {point.size / factor:.3g} {unit}, {metric} {point.quality:.4f}{_verdict(point)}"
        for point in points
    )
    return _page(f"{y_name} against sparsity and size of {what}", "; ".join(said), marks)


def _verdict(point: _Point) -> str:
    if point.best:
        return " (the smallest that meets the budgets)"
    return " (fails a budget)" if point.kind == "bad" else ""


def _point(row: dict[str, Any], key: str, smallest: str | None) -> _Point:
    share = row["zeros"] / max(1, row["weights"])
    kind = "good" if row["passed"] else "bad"
    label = f"{100 * row['sparsity']:g} %"
    return _Point(share, row[key], row["after"], label, kind, row["folder"] == smallest)


def _limit(rows: Sequence[dict[str, Any]], name: str) -> list[tuple[float, str]]:
    """A budget's limit and its words; none if no report has it."""
    words = size if name == "max-bytes" else "{:g}".format
    return [(each["limit"], f"{name} {words(each['limit'])}") for each in _budgets(rows, name)]


def _budgets(rows: Sequence[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The first budget of that name, of the whole model."""
    return [each for each in rows[0]["budgets"] if each["name"] == name][:1]


def _floor(rows: Sequence[dict[str, Any]], dense: float | None) -> list[tuple[float, str]]:
    """The quality that a drop from the dense model may reach."""
    if dense is None:
        return []
    sign = -1 if rows[0]["higher_is_better"] else 1
    name = "max-quality-drop"
    return [
        (dense + sign * each["limit"] * abs(dense), f"{name} {100 * each['limit']:g} %")
        if each.get("relative")
        else (dense + sign * each["limit"], f"{name} {each['limit']:g}")
        for each in _budgets(rows, name)
    ]


def _spread(values: Sequence[float]) -> Axis:
    low, high = min(values), max(values)
    space = 0.12 * (high - low) or 0.1 * abs(high) or 1.0
    return Axis(low - space, high + space, False, _BOTTOM, _TOP)


def _unit(most: float) -> tuple[float, str]:
    power = min(4, int(math.log10(max(most, 1)) // 3))
    return 1000.0**power, ("B", "kB", "MB", "GB", "TB")[power]


def _plain(axis: Axis) -> Callable[[float], str]:
    decimals = max(0, -math.floor(math.log10(step_of(axis.low, axis.high)) + 1e-9))
    return lambda value: f"{value:.{decimals}f}"


def _panel(x: Axis, y: Axis, name: str, words: Callable[[float], str]) -> list[str]:
    marks: list[str] = []
    shown = _plain(y)
    for tick in ticks(y):
        marks.append(_line(x.start, y.at(tick), x.end, y.at(tick), "grid"))
        marks.append(_text(x.start - 6, y.at(tick) + 4, shown(tick), anchor="end"))
    for tick in ticks(x):
        marks.append(_line(x.at(tick), _BOTTOM, x.at(tick), _BOTTOM + 4, "axis"))
        marks.append(_text(x.at(tick), _BOTTOM + 18, words(tick), anchor="middle"))
    marks.append(f'<path class="axis" d="M{x.start:.1f} {_TOP}V{_BOTTOM}H{x.end:.1f}"/>')
    return [*marks, _text((x.start + x.end) / 2, _BOTTOM + 40, name, anchor="middle")]


def _limits(
    x: Axis, y: Axis, across: Sequence[tuple[float, str]], up: Sequence[tuple[float, str]]
) -> list[str]:
    marks: list[str] = []
    for level, words in across:
        marks.append(_line(x.at(level), _TOP, x.at(level), _BOTTOM, "limit"))
        marks.append(_text(x.at(level), _TOP - 6, words, "small", "middle"))
    for level, words in up:
        marks.append(_line(x.start, y.at(level), x.end, y.at(level), "limit"))
        if words:
            marks.append(_text(x.start + 6, y.at(level) - 5, words, "small"))
    return marks


def _curve(x: Axis, y: Axis, points: Sequence[tuple[float, _Point]]) -> list[str]:
    places = [(x.at(value), y.at(point.quality), point) for value, point in points]
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b, _ in places)
    marks = [f'<polyline class="line" points="{path}"/>']
    for a, b, point in places:
        if point.kind == "dense":
            marks.append(f'<rect class="dense" x="{a - 4:.1f}" y="{b - 4:.1f}" width="8" height="8"/>')
        else:
            marks.append(f'<circle class="{point.kind}" cx="{a:.1f}" cy="{b:.1f}" r="4"/>')
        if point.best:
            marks.append(f'<circle class="best" cx="{a:.1f}" cy="{b:.1f}" r="8"/>')
    return marks + _labels([(a, b, point.label) for a, b, point in places])


def _labels(places: Sequence[tuple[float, float, str]]) -> list[str]:
    """Words above and below their points in turn, further away from others, and left out if there is no
    room."""
    marks: list[str] = []
    taken: list[tuple[float, float, float]] = []  # middle, foot and half of the width
    for i, (x, y, words) in enumerate(places):
        half = _LETTER * len(words) / 2
        order = (-12, 21, -25, 34, -38, -51) if i % 2 == 0 else (21, -12, 34, -25, -38, -51)
        free = (
            y + shift
            for shift in order
            if all(abs(x - a) > half + wide or abs(y + shift - b) > _LINE for a, b, wide in taken)
        )
        foot = next(free, None)
        if foot is not None:
            taken.append((x, foot, half))
            marks.append(_text(x, foot, words, "small", "middle"))
    return marks


def _line(x: float, y: float, to_x: float, to_y: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x:.1f}" y1="{y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}"/>'


def _text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    of = f' class="{kind}"' if kind else ""
    return f'<text{of} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _page(title: str, said: str, marks: Sequence[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" '
    head += f'height="{_HEIGHT}" role="img" aria-labelledby="title desc">'
    about = f'<title id="title">{escape(title)}</title>\n<desc id="desc">{escape(said)}</desc>'
    return "\n".join((head, about, f"<style>{_STYLE}</style>", *marks, "</svg>")) + "\n"
