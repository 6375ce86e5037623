"""Size against quality as one SVG: sparsity on the left, bytes on the right, limits of budgets dashed.

No script and nothing from outside; light or dark as the reader's system is. The same figures give the same
bytes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from lpsparse.reporting.text import clean, size
from lpsparse.reporting.ticks import between, step_of

_WIDTH, _HEIGHT, _TOP, _BOTTOM = 760, 380, 76, 320
_LEFT, _RIGHT = (70, 370), (440, 740)  # from and to, of the two panels
_LETTER, _LINE = 6.5, 12  # about what a letter of 11 px and a line of them take
_UNITS = {"loss": "nats", "accuracy": "fraction"}
# Okabe and Ito's blue and vermilion, which colour-blind readers tell apart; failed points are hollow, too.
# Words have a rim of the ground's colour, so that no line strikes through them.
_STYLE = """
  svg { background: #fff; color: #222; font: 12px sans-serif }
  text { fill: currentColor; stroke: #fff; stroke-width: 3px; paint-order: stroke }
  .axis { stroke: #888; fill: none } .grid { stroke: #e4e4e4 }
  .line { stroke: #0072b2; fill: none; stroke-width: 1.5 } .good { fill: #0072b2; stroke: #0072b2 }
  .bad { fill: #fff; stroke: #d55e00; stroke-width: 2 } .dense { fill: currentColor }
  .best { fill: none; stroke: #0072b2; stroke-width: 2 } .limit { stroke: #d55e00; stroke-dasharray: 5 4 }
  .small { font-size: 11px } .head { font-size: 14px; font-weight: bold }
  @media (prefers-color-scheme: dark) {
    svg { background: #161616; color: #e8e8e8 } text { stroke: #161616 }
    .grid { stroke: #333 } .line { stroke: #56b4e9 }
    .good { fill: #56b4e9; stroke: #56b4e9 } .best { stroke: #56b4e9 } .bad { fill: #161616; stroke: #e69f00 }
    .limit { stroke: #e69f00 }
  }
"""


@dataclass(frozen=True, slots=True)
class _Axis:
    low: float
    high: float
    start: float  # of the picture, where `low` is
    end: float

    def at(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        return between(self.low, self.high)


@dataclass(frozen=True, slots=True)
class _Point:
    sparsity: float
    size: float
    quality: float
    label: str
    kind: str  # good | bad | dense
    best: bool = False


def draw(found: dict[str, Any]) -> str:
    """The figure of what `sweep` found; where no quality was measured it says so."""
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
    left, right = _Axis(0, 1, *_LEFT), _Axis(0, most * 1.08, *_RIGHT)
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
    """A budget's limit and its words; none where no report has it."""
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


def _spread(values: Sequence[float]) -> _Axis:
    low, high = min(values), max(values)
    space = 0.12 * (high - low) or 0.1 * abs(high) or 1.0
    return _Axis(low - space, high + space, _BOTTOM, _TOP)


def _unit(most: float) -> tuple[float, str]:
    power = min(4, int(math.log10(max(most, 1)) // 3))
    return 1000.0**power, ("B", "kB", "MB", "GB", "TB")[power]


def _plain(axis: _Axis) -> Any:
    decimals = max(0, -math.floor(math.log10(step_of(axis.low, axis.high)) + 1e-9))
    return lambda value: f"{value:.{decimals}f}"


def _panel(x: _Axis, y: _Axis, name: str, words: Any) -> list[str]:
    marks: list[str] = []
    shown = _plain(y)
    for tick in y.ticks():
        marks.append(_line(x.start, y.at(tick), x.end, y.at(tick), "grid"))
        marks.append(_text(x.start - 6, y.at(tick) + 4, shown(tick), anchor="end"))
    for tick in x.ticks():
        marks.append(_line(x.at(tick), _BOTTOM, x.at(tick), _BOTTOM + 4, "axis"))
        marks.append(_text(x.at(tick), _BOTTOM + 18, words(tick), anchor="middle"))
    marks.append(f'<path class="axis" d="M{x.start:.1f} {_TOP}V{_BOTTOM}H{x.end:.1f}"/>')
    return [*marks, _text((x.start + x.end) / 2, _BOTTOM + 40, name, anchor="middle")]


def _limits(
    x: _Axis, y: _Axis, across: Sequence[tuple[float, str]], up: Sequence[tuple[float, str]]
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


def _curve(x: _Axis, y: _Axis, points: Sequence[tuple[float, _Point]]) -> list[str]:
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
    """Words by turns above and below their points, further away where others stand there already, and left
    out where there is no room at all."""
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
