"""Draw SVG as wide as its place, with text of one size: horizontal lengths are percent, vertical ones pixels.
Colours are classes of style.css, for light, dark and paper."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from lpsparse.reporting.charts import Axis, ticks
from lpsparse.reporting.html.parts import number, shown
from lpsparse.reporting.text import shorten

TOP = 14  # room for the letters of the highest tick
WIDE = 1000  # units across of lines and outlines, which know no percent
_MOST = 1e300  # room above it would overflow


@dataclass(frozen=True, slots=True)
class Row:
    """A bar with its words above it."""

    label: str
    value: str
    start: float  # share of the width
    end: float
    css: str
    title: str = ""


def tag(name: str, /, *inside: str, **attributes: str | float) -> Markup:
    """An element. Everything except Markup is cleaned and escaped."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(shown(_plain(value)))}"'
        for key, value in attributes.items()
    )
    body = "".join(escape(shown(each)) for each in inside)
    return Markup(f"<{name}{given}>{body}</{name}>" if inside else f"<{name}{given}/>")


def _plain(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")


def across(share: float) -> str:
    return f"{100 * share:.2f}".rstrip("0").rstrip(".") + "%"


def canvas(
    name: str, title: str, description: str, height: float, parts: Iterable[Markup], css: str
) -> Markup:
    """The drawing itself. `name` is its own in the page."""
    return tag(
        "svg",
        tag("title", title, id=f"{name}-title"),
        tag("desc", description, id=f"{name}-desc"),
        *parts,
        class_=css,
        role="img",
        aria_labelledby=f"{name}-title {name}-desc",
        width="100%",
        height=height,
    )


def rows(name: str, title: str, description: str, bars: Sequence[Row]) -> Markup:
    """Bars under one another, each with its label to the left and its value to the right."""
    parts: list[Markup] = []
    for i, bar in enumerate(bars):
        y = 40 * i
        parts += [
            tag("text", bar.label, x=0, y=y + 13, class_="strong"),
            tag("text", bar.value, x="100%", y=y + 13, class_="end"),
            tag("rect", x=0, y=y + 19, width="100%", height=9, rx=2, class_="track"),
        ]
        if bar.end > bar.start:
            wide = across(max(bar.end - bar.start, 0.002))
            words = [tag("title", bar.title)] if bar.title else []
            parts.append(
                tag("rect", *words, x=across(bar.start), y=y + 19, width=wide, height=9, rx=2, class_=bar.css)
            )
    return canvas(name, title, description, 40 * len(bars), parts, "rows")


def grid(axis: Axis, height: float, marks: Sequence[tuple[float, str]]) -> list[Markup]:
    """Horizontal lines at the marks of a vertical axis, with their words to the left."""
    parts: list[Markup] = []
    for value, words in marks:
        y = up(axis, value, height)
        parts.append(tag("line", x1=0, x2="100%", y1=y, y2=y, class_="grid"))
        parts.append(tag("text", words, x=-8, y=y + 4, class_="end"))
    return parts


def feet(marks: Sequence[tuple[float, str]], height: float) -> list[Markup]:
    """Words under the plot, at shares of its width."""
    found: list[Markup] = []
    for share, words in marks:
        css = "start" if share < 0.03 else "end" if share > 0.97 else "middle"
        found.append(tag("text", words, x=across(share), y=TOP + height + 18, class_=css))
    return found


def up(axis: Axis, value: float, height: float) -> float:
    return TOP + height * (1 - axis.within(value))


def stretched(height: float, *paths: Markup) -> Markup:
    """Paths in units of WIDE across, drawn as wide as the plot."""
    return tag(
        "svg",
        *paths,
        x=0,
        y=TOP,
        width="100%",
        height=height,
        viewBox=f"0 0 {WIDE} {height:g}",
        preserveAspectRatio="none",
    )


def line(points: Sequence[tuple[float, float]], height: float, css: str) -> Markup:
    """A line through points, both shares of the plot; a single one is a dot."""
    if len(points) == 1:
        ((x, y),) = points
        return tag("circle", cx=across(x), cy=TOP + height * (1 - y), r=4, class_=css)
    drawn = " ".join(f"{_plain(WIDE * x)},{_plain(height * (1 - y))}" for x, y in points)
    return stretched(height, tag("polyline", points=drawn, class_=css))


def columns(heights: Mapping[int, float], many: int, height: float, css: str) -> Markup:
    """Bars at some of `many` places, without gaps, as one path that takes few bytes."""
    each = WIDE / max(many, 1)
    drawn = "".join(
        f"M{_plain(i * each)} {height:g}V{_plain(height * (1 - share))}H{_plain((i + 1) * each)}V{height:g}z"
        for i, share in sorted(heights.items())
        if share > 0
    )
    return stretched(height, tag("path", d=drawn, class_=css))


def marked(axis: Axis, most: int = 5) -> list[tuple[float, str]]:
    return [(value, number(value)) for value in ticks(axis, most)]


def around(values: Sequence[float]) -> Axis:
    """A linear axis with a little room around its values."""
    low, high = max(min(values), -_MOST), min(max(values), _MOST)
    room = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
    return Axis(low - room, high + room)


def around_log(values: Sequence[float]) -> Axis:
    """A log axis around positive values, over a power of ten at least."""
    low, high = max(min(values), 1 / _MOST), min(max(values), _MOST)
    return Axis(low, high, log=True) if high >= 10 * low else Axis(low / 3.2, high * 3.2, log=True)


def shortened(name: str) -> str:
    """A name that fits beside a value on a narrow screen."""
    return shorten(shown(name.removesuffix(".weight")), 34)


def level(y: float, css: str, left: float = 0, right: float = 1) -> list[Markup]:
    """A horizontal line with a rim that separates it from the bars below it."""
    return [tag("line", x1=across(left), x2=across(right), y1=y, y2=y, class_=each) for each in ("rim", css)]


def upright(share: float, height: float, css: str) -> list[Markup]:
    """A vertical line from the bottom of the plot to its top."""
    x = across(share)
    return [tag("line", x1=x, x2=x, y1=TOP, y2=TOP + height, class_=each) for each in ("rim", css)]
