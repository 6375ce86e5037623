"""Tensors whose names differ in the numbers of their layers alone, as one: layers.{0..31}.mlp.weight."""

import re
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # between dots
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
    return [Fold(_together([name(row) for row in some]), tuple(some)) for some in found.values()]


def _together(names: list[str]) -> str:
    numbers = zip(*(map(int, _NUMBER.findall(name)) for name in names), strict=True)
    told = [_told(sorted(set(each))) for each in numbers]
    return names[0] if len(names) == 1 else _NUMBER.sub(lambda _: told.pop(0), names[0])


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
