"""Format text for people: cleaned, sized, shortened, in columns.

Standard library only, because error messages use it, too."""

import math
import re
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar
from unicodedata import combining, east_asian_width

_COLOR = re.compile(r"\x1b\[[0-9]*m")  # which takes no room
IN_JSON = "##\\u005b"  # for `##[`: the same string


def clean(text: str) -> str:
    """Replace control and format characters, which a terminal would obey, by '?'."""
    return "".join(char if char.isprintable() else "?" for char in text)


def harmless(text: str, order: str = "# #[", command: str = ": :") -> str:
    """Escape what GitHub's runner would run as a command: `order` replaces `##[` anywhere, and `command`
    replaces `::` at the start of a line."""
    return without_order(re.sub(r"(?m)^(\s*)::", rf"\1{command}", text), order)


def without_order(text: str, order: str) -> str:
    """Escape `##[` only, for text in which `::` is harmless."""
    return text.replace("##[", order)


def size(count: float) -> str:
    """Bytes with a unit, in three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < (1000 if unit == "B" else 999.5):
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def percent(share: float, digits: int = 2) -> str:
    """A share in percent. Only exact 0 and 1 are written as 0 % and 100 %."""
    written, least = f"{abs(100 * share):.{digits}f}", 10**-digits
    if share and float(written) == 0:
        return f"{'under ' if share > 0 else 'over -'}{least:.{digits}f} %"
    if abs(share) < 1 and float(written) == 100:
        written = f"{100 - least:.{digits}f}"
    return f"{'-' if share < 0 else ''}{written} %"


def cells(text: str) -> int:
    """Terminal columns of a text: two for a wide letter, none for a combining mark."""
    return len(text) if text.isascii() else sum(map(_cells, text))


def _cells(letter: str) -> int:
    return 0 if combining(letter) else 2 if east_asian_width(letter) in "WF" else 1


def shorten(name: str, width: int) -> str:
    """A name cut in its middle to `width` columns."""
    if cells(name) <= width:
        return name
    half = max(1, (width - 1) // 2)
    end = name[max(0, len(name) - half) :]
    while cells(end) > half and len(end) > 1:
        end = end[1:]
    start = name[: max(0, width - 1 - half)]
    while cells(start) > width - 1 - half:
        start = start[:-1]
    return f"{start}…{end}"


def fitted(text: str, width: int, hang: int = 2) -> str:
    """Wrap each line to `width` columns between words; continuation lines are indented by `hang` more."""
    lines = text.split("\n")
    long = [len(_COLOR.sub("", line)) > width for line in lines]
    each = zip(lines, long, strict=True)
    return "\n".join(_fitted(line, width, hang) if over else line for line, over in each)


def _fitted(line: str, width: int, hang: int) -> str:
    from textwrap import fill

    indent = " " * (len(line) - len(line.lstrip()) + hang)
    return fill(  # a name, path or flag stays whole
        line, max(width, 1), subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


_LEAST_NAME = 31  # letters by which a tensor can mostly be told; beside 99.99 % these are 40 columns
_CAN_GO = ("dtype", "", "pruning", "bytes", "weights", "shape")  # by their heads, what is missed least first


def columns(head: tuple[str, ...], body: list[tuple[str, ...]], width: int) -> list[str]:
    """Aligned columns: the first to the left, the others to the right.

    To fit, a last column without a heading (a remark) is shortened, then the first (a name), then columns are
    left out. If that is not enough, each row is its name and, below, one line per cell with its heading."""
    for gone in range(len(_CAN_GO) + 1):
        kept = [i for i, name in enumerate(head) if i == 0 or name not in _CAN_GO[:gone]]
        rows = [tuple(row[i] for i in kept) for row in (head, *body)]
        widths = _widths(rows, width)
        if widths is not None and len(kept) > 1:
            return [_row(row, widths) for row in rows]
    name = max(width, 2, _least_name(row[0] for row in body) if len(body) > 1 else 0)
    return [f"{head[0]}:", *(line for row in body for line in _stacked(head, row, width, name))]


def _widths(rows: list[tuple[str, ...]], width: int) -> list[int] | None:
    """The width of each column; None if they do not fit."""
    widths = [max(map(cells, column)) for column in zip(*rows, strict=True)]
    if sum(widths) + 2 * (len(widths) - 1) <= width:
        return widths
    over = sum(widths) + 2 * (len(widths) - 1) - width
    remark = 9 if rows[0][-1] == "" else widths[-1]  # numbers are shown whole or not at all
    for i, least in ((-1, remark), (0, _least_name(row[0] for row in rows))):
        less = max(0, min(over, widths[i] - least))
        widths[i], over = widths[i] - less, over - less
    return widths if over <= 0 else None


def _least_name(names: Iterable[str]) -> int:
    """The fewest columns, from _LEAST_NAME on, in which all shortened names stay different."""
    alike, width = set(names), _LEAST_NAME
    while True:
        shown: dict[str, list[str]] = {}
        for name in alike:
            shown.setdefault(shorten(name, width), []).append(name)
        alike = {name for some in shown.values() if len(some) > 1 for name in some}
        if not alike:
            return width
        width += 1


def _row(row: tuple[str, ...], widths: list[int]) -> str:
    name, *others = (shorten(cell, limit) for cell, limit in zip(row, widths, strict=True))
    others = [" " * (limit - cells(cell)) + cell for cell, limit in zip(others, widths[1:], strict=True)]
    return "  ".join([name + " " * (widths[0] - cells(name)), *others]).rstrip()


def _stacked(head: tuple[str, ...], row: tuple[str, ...], width: int, name: int) -> list[str]:
    room = max(map(len, head[1:]))
    cells = [(word, cell) for word, cell in zip(head[1:], row[1:], strict=True) if cell]
    lines = (f"  {word:<{room}}  {cell}" if word else f"  {cell}" for word, cell in cells)
    return [shorten(row[0], name), *(part for line in lines for part in fitted(line, width).split("\n"))]


_NUMBER = re.compile(r"(?<![^.])(?:0|[1-9]\d{0,8})(?![^.])")  # between dots
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Fold(Generic[T]):
    name: str
    rows: tuple[T, ...]


def folded(rows: Iterable[T], name: Callable[[T], str], alike: Callable[[T], Hashable]) -> list[Fold[T]]:
    """Rows whose names differ only in the numbers of their layers, together: layers.{0..31}.mlp.weight.

    Folds come in the order of their first rows. The rows of a fold are `alike`."""
    found: dict[Hashable, list[T]] = {}
    for row in rows:
        found.setdefault((_NUMBER.sub("#", name(row)), alike(row)), []).append(row)
    folds: list[Fold[T]] = []
    for some in found.values():
        together = _together([name(row) for row in some])
        folds += [Fold(together, tuple(some))] if together else [Fold(name(row), (row,)) for row in some]
    return folds


def _together(names: list[str]) -> str | None:
    """The name that stands for exactly these; None if there is no such name."""
    if len(names) == 1:
        return names[0]
    columns = zip(*(map(int, _NUMBER.findall(name)) for name in names), strict=True)
    numbers = [sorted(set(column)) for column in columns]
    if math.prod(map(len, numbers)) != len(names):
        return None
    ranges = [_ranges(each) for each in numbers]
    return _NUMBER.sub(lambda _: ranges.pop(0), names[0])


def _ranges(numbers: list[int]) -> str:
    """7, or {0..5,7}."""
    parts: list[str] = []
    for number in numbers:
        first, _, last = parts[-1].partition("..") if parts else ("", "", "")
        if parts and number == int(last or first) + 1:
            parts[-1] = f"{first}..{number}"
        else:
            parts.append(str(number))
    return parts[0] if len(numbers) == 1 else f"{{{','.join(parts)}}}"
