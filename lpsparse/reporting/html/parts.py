"""The parts of the page: views with words, figures and tables; the format of numbers and names."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from lpsparse.reporting import text

THIN = "\u202f"  # narrow no-break space: between thousands, and before a unit
MOST_ROWS = 200  # of a table
ELSEWHERE = "all are in report.json (--json FILE) and --csv FILE"
_LONGEST = 160  # letters of a name that are shown; its title has more
_LONGEST_TITLE = 1000

Cell = str | Markup


@dataclass(frozen=True, slots=True)
class Table:
    caption: str  # another one for every table of the page: it names the region
    head: tuple[str, ...]
    body: Sequence[tuple[Cell, ...]]
    words: tuple[int, ...] = (0,)  # columns of text; the others are numbers
    rest: str = ""  # where the rows are that are left out
    stacks: bool = False  # on a narrow screen each row is a list of its cells, for few rows alone


@dataclass(frozen=True, slots=True)
class Figure:
    title: str
    drawings: tuple[Markup, ...]
    table: Table
    legend: tuple[tuple[str, str], ...] = ()  # class of the mark, words
    note: str = ""


@dataclass(frozen=True, slots=True)
class View:
    name: str  # of its place in the page
    title: str
    words: tuple[Cell, ...] = ()
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()


def shown(value: object) -> str:
    """Text without control and format characters. Markup is ours and stays."""
    if isinstance(value, Markup):
        return value
    return THIN.join(text.clean(part) for part in str(value).split(THIN))


def named(name: str) -> Markup:
    """A name from a checkpoint, shortened in the middle if it is very long. Right-to-left letters do not
    affect the text beside it."""
    whole = shown(name)
    short = text.shorten(whole, _LONGEST)
    if short == whole:
        return filled("<bdi>{}</bdi>", whole)
    return filled('<bdi title="{}">{}</bdi>', text.shorten(whole, _LONGEST_TITLE), short)


def filled(template: str, *values: object) -> Markup:
    """Our template, filled with values that are cleaned and escaped unless they are Markup."""
    return Markup(template).format(*map(shown, values))


def coded(words: str) -> Markup:
    """Words, with text between backticks as code."""
    parts = words.split("`")
    return Markup().join(filled("<code>{}</code>" if i % 2 else "{}", part) for i, part in enumerate(parts))


def listed(names: Iterable[str], most: int = 5) -> Markup:
    """The first names, and the number of the others."""
    every = list(names)
    more = f" and {count(len(every) - most)} more" if len(every) > most else ""
    return Markup(", ").join(named(each) for each in every[:most]) + escape(more)


def count(number: float) -> str:
    return f"{number:,.0f}".replace(",", THIN)


def brief(number: float) -> str:
    """A short count for an axis."""
    for unit, one in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= one:
            return f"{number / one:.4g}{THIN}{unit}"
    return f"{number:.4g}"


def percent(share: float, digits: int = 2) -> str:
    return typeset(text.percent(share, digits))


def typeset(written: str) -> str:
    """Our figures with typographic minus signs and narrow spaces."""
    written = re.sub(r"e([+-]\d+)", lambda power: f"e{int(power[1])}", written)
    return written.replace(",", THIN).replace(" %", f"{THIN}%").replace("-", "−")


def size(number: float) -> str:
    """Bytes with a unit; negative ones were saved."""
    sign = "−" if number < 0 else ""
    return sign + text.size(abs(number)).replace(" ", THIN)


def number(value: float | None, digits: int = 4) -> str:
    """A value in few digits; a dash if it is unknown."""
    if value is None:
        return "–"
    return typeset(f"{value:.{digits}g}")


def exponent(value: float, digits: int) -> str:
    return typeset(f"{value:.{digits - 1}e}")


def plural(many: int, one: str) -> str:
    return f"{count(many)} {one}{'' if many == 1 else 's'}"
