"""Tensors whose names differ in the numbers of their layers alone, as one: layers.{0..31}.mlp.weight."""

import math
import re
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

_NUMBER = re.compile(r"(?<![^.])(?:0|[1-9]\d{0,8})(?![^.])")  # between dots
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Fold(Generic[T]):
    name: str
    rows: tuple[T, ...]


def folded(rows: Iterable[T], name: Callable[[T], str], alike: Callable[[T], Hashable]) -> list[Fold[T]]:
    """In the order of the first of each. Rows of one fold are `alike`, and of one name but for numbers."""
    found: dict[Hashable, list[T]] = {}
    for row in rows:
        found.setdefault((_NUMBER.sub("#", name(row)), alike(row)), []).append(row)
    folds: list[Fold[T]] = []
    for some in found.values():
        together = _together([name(row) for row in some])
        folds += [Fold(together, tuple(some))] if together else [Fold(name(row), (row,)) for row in some]
    return folds


def _together(names: list[str]) -> str | None:
    """The name that stands for these and no others; None where there is none."""
    if len(names) == 1:
        return names[0]
    columns = zip(*(map(int, _NUMBER.findall(name)) for name in names), strict=True)
    numbers = [sorted(set(column)) for column in columns]
    if math.prod(map(len, numbers)) != len(names):
        return None
    told = [_told(each) for each in numbers]
    return _NUMBER.sub(lambda _: told.pop(0), names[0])


def _told(numbers: list[int]) -> str:
    """7, or {0..5,7}."""
    parts: list[str] = []
    for number in numbers:
        first, _, last = parts[-1].partition("..") if parts else ("", "", "")
        if parts and number == int(last or first) + 1:
            parts[-1] = f"{first}..{number}"
        else:
            parts.append(str(number))
    return parts[0] if len(numbers) == 1 else f"{{{','.join(parts)}}}"
