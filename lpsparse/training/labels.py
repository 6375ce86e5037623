"""Which class is which number: one decision for all tasks, over all the data that is read.

A model that names its classes decides, by name. A head without names is numbered by the labels where they are
numbers, else by the order of all class folders. A fresh head gets the names of the data, in order.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lpsparse.checkpoint.open import Checkpoint
from lpsparse.errors import InputError

_NO_NAME = re.compile(r"LABEL_(\d+)")  # what transformers writes where nobody named the classes
_WHOLE = re.compile(r"([+-]?\d+)\.0*", re.ASCII)  # as pandas writes a whole number beside an empty cell
_SHOWN = 8


class Labelled(Protocol):
    """A row or an image: its class, and the place that an error can name."""

    @property
    def where(self) -> str: ...
    @property
    def label(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Classes:
    ids: Mapping[str, int]  # label -> number, for every label of the data
    fresh: tuple[str, ...] = ()  # names by number that a fresh head is given; none: config.json stays
    notes: tuple[str, ...] = ()  # how a head without names was numbered

    def changes(self) -> dict[str, Any]:
        """The entries of config.json that a fresh head changes."""
        if not self.fresh:
            return {}
        table = dict(enumerate(self.fresh))
        return {
            "num_labels": len(table),
            "id2label": table,
            "label2id": {name: i for i, name in table.items()},
        }


def label_of(where: str, value: Any) -> str:
    """A cell of a table as the name of a class. Raises InputError for several at once, and for none."""
    if isinstance(value, (list, tuple, dict)) or (
        isinstance(value, str) and re.match(r"\s*\[.*\]\s*$", value)
    ):
        what = f"{where}: the label is a list ({str(value)[:60]}), and a row has one class here"
        raise InputError(347, what, hint="name a column with one class a row with --label-field")
    text = str(value).strip()
    if value is None or not text or (isinstance(value, float) and math.isnan(value)):
        raise InputError(377, f"{where}: the label is empty", hint="fix or drop the row")
    return _plain(text)


def first_places(examples: Iterable[Labelled]) -> dict[str, str]:
    """Label -> where it stands first."""
    found: dict[str, str] = {}
    for each in examples:
        found.setdefault(each.label, each.where)
    return found


def config_names(config: Mapping[str, Any], checkpoint: Checkpoint) -> list[str]:
    """The names in config.json by their ids, which count from 0. Raises InputError where config.json is that
    of another task than choosing one class."""
    kind = config.get("problem_type")
    if kind not in (None, "single_label_classification"):
        what = (
            f"{checkpoint.name}: config.json: problem_type is {kind}, which is not trained or measured here"
        )
        raise InputError(347, what, hint="give a model that chooses one class of several")
    count: Any = config.get("num_labels", 2)
    count = count if type(count) is int else 2
    table = config.get("id2label") or {str(i): f"LABEL_{i}" for i in range(count)}
    if not isinstance(table, dict) or set(table) != {str(i) for i in range(len(table))}:
        what = f"{checkpoint.name}: config.json: expected id2label to map ids from 0"
        raise InputError(392, what, hint="fix config.json")
    return [str(table[str(i)]) for i in range(len(table))]


def number(
    places: Mapping[str, str],
    names: Sequence[str],
    checkpoint: Checkpoint,
    *,
    head: bool,
    folders: bool = False,
    told: Sequence[str] = (),
) -> Classes:
    """Classes of the labels in `places` (label -> where it stands first, over all splits).

    `names`: of the model by id, LABEL_0 and so on where it has none. `head`: whether the model has its head
    already. `folders`: the labels are the names of all class folders, whose order may number them. `told`:
    names that the data give to numbers.
    """
    if head and len(names) == 1:
        what = f"{checkpoint.name}: its head has one output, which is a score and no choice of a class"
        raise InputError(347, what, hint="give a model that chooses one class of several")
    named = any(_NO_NAME.fullmatch(name) is None for name in names)
    ids = _ids(names) if named else _by_number(places, len(names), folders)
    if named and told:
        ids |= _as_told(told, names, checkpoint)
    unknown = [label for label in places if label not in ids]
    if not unknown and (head or named):
        return Classes(ids)
    for label in unknown:
        _refuse_real(places[label], label)
    if not head:
        fresh = tuple(sorted(places, key=_order))
        if told and all(label in map(str, range(len(told))) for label in places):
            return Classes({str(i): i for i in range(len(told))}, tuple(told))
        return Classes({name: i for i, name in enumerate(fresh)}, fresh)
    if folders and not named:
        return _by_order(places, len(names), checkpoint)
    what = f"{places[unknown[0]]}: label {unknown[0]!r} is outside the model's set ({_listed(names)})"
    raise InputError(349, what, hint="fix the row, or start from a checkpoint without a head")


def check_rows(
    classes: Classes, train: Sequence[Labelled], held: Sequence[Labelled], *, shared: bool
) -> None:
    """Raises InputError for classes that cannot be learnt, or not be told apart. `shared`: `held` was set
    aside from the rows that train."""
    counts = Counter(each.label for each in ((*train, *held) if shared else train))
    if len(counts) == 1:
        what = f"{train[0].where}: all {counts.total()} rows to train on have the label {train[0].label!r}"
        raise InputError(388, what, hint="give rows of two classes or more")
    if not classes.fresh:  # what has learnt the classes already may meet one of them once
        return
    for each in (*train, *held):
        if shared and counts[each.label] == 1:
            what = f"{each.where}: the only row of class {each.label!r} cannot be trained on and held out"
            raise InputError(
                388, what, hint="give more rows of it, drop it, or give held-out data: --eval-data"
            )
        if each.label not in counts:
            what = (
                f"{each.where}: label {each.label!r}: no training row has it, so a new head cannot learn it"
            )
            raise InputError(388, what, hint="give training rows of it, or drop the row")


def unseen(train: Sequence[Labelled], places: Mapping[str, str]) -> tuple[str, ...]:
    """Notes about classes that no training row has."""
    lost = sorted(places.keys() - {each.label for each in train}, key=_order)
    return (f"no training row has the label {_listed(lost)}",) if lost else ()


def _plain(text: str) -> str:
    match = _WHOLE.fullmatch(text)
    return match[1] if match else text


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal()


def _order(label: str) -> tuple[bool, int, str]:
    whole = re.fullmatch(r"[+-]?\d{1,18}", label, re.ASCII)
    return (whole is None, int(label) if whole else 0, label)


def _ids(names: Sequence[str]) -> dict[str, int]:
    """By name, and by number where no name is a number itself."""
    ids = {} if any(map(_is_number, map(_plain, names))) else {str(i): i for i in range(len(names))}
    return ids | {_plain(name): i for i, name in enumerate(names)} | {name: i for i, name in enumerate(names)}


def _as_told(told: Sequence[str], names: Sequence[str], checkpoint: Checkpoint) -> dict[str, int]:
    """Number in the data -> output of the same name; none where the model has none of the names."""
    place = {name.casefold(): i for i, name in enumerate(names)}
    found = [place.get(name.casefold()) for name in told]
    if all(i is None for i in found):
        return {}
    lost = [f"{i} is {name!r}" for i, name in enumerate(told) if found[i] is None]
    if lost:
        what = f"{checkpoint.name}: label {lost[0]}, which is outside the model's set ({_listed(names)})"
        raise InputError(349, what, hint="give labels that the model knows, or a checkpoint without a head")
    return {str(i): output for i, output in enumerate(found) if output is not None}


def _by_number(places: Mapping[str, str], outputs: int, folders: bool) -> dict[str, int]:
    """The labels that are numbers of outputs; none where two are the same, or folders may count from 1."""
    found = {
        label: int(digits)
        for label in places
        if _is_number(digits := label.removeprefix("LABEL_")) and len(digits) < 10 and int(digits) < outputs
    }
    told = len(set(found.values())) == len(found) and (not folders or 0 in found.values())
    return found if told else {}


def _by_order(places: Mapping[str, str], outputs: int, checkpoint: Checkpoint) -> Classes:
    names = sorted(places, key=_order)
    if len(names) != outputs:
        what = f"{checkpoint.name}: has {outputs} outputs without names, and all splits have {len(names)} "
        what += f"class folders ({_listed(names)}): which is which is not known"
        hint = f"call the folders by number, 0 to {outputs - 1}, or add an empty one for each missing class"
        raise InputError(349, what, hint=hint)
    order = ", ".join(f"{i} {name}" for i, name in enumerate(names[:_SHOWN]))
    more = "" if len(names) <= _SHOWN else ", ..."
    note = f"the model does not name its classes: they are the folders of all splits in order ({order}{more})"
    return Classes({name: i for i, name in enumerate(names)}, notes=(note,))


def _refuse_real(where: str, label: str) -> None:
    """Raises InputError for a score: it orders, and classes do not."""
    try:
        value = float(label)
    except ValueError:
        return
    if math.isfinite(value) and not value.is_integer():
        what = f"{where}: the label {label} is a real number, and not a class: regression is not a task here"
        raise InputError(347, what, hint="name a column of classes with --label-field, or round the scores")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
