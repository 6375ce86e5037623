"""What the card of the base model says of its licence, language, data and task: copied, never invented.

The card is somebody else's text: a field that is not of the form that the hub documents is left out."""

import re
from pathlib import Path
from typing import Any

from lpsparse.errors import UsageError
from lpsparse.safe_yaml import read_yaml

_MOST_BYTES = 4_000_000  # of the file that are looked at; cards with tables of results have hundreds of kB
_MOST_TAKEN = 20_000  # letters of the fields that are wanted
_MOST_ITEMS = 200
_NAME = r"[A-Za-z0-9][\w.+-]{0,95}"
_ONE = {
    "license": _NAME,
    "license_name": _NAME,
    "pipeline_tag": r"[a-z][a-z0-9-]{0,59}",
    "license_link": rf"https://[\w./%#?=&+-]{{1,300}}|{_NAME}",
}
_MANY = {"language": r"[A-Za-z]{2,12}([-_][A-Za-z0-9]{1,8})*", "datasets": rf"{_NAME}(/{_NAME})?"}
_WANTED = re.compile(rf"^({'|'.join((*_ONE, *_MANY))}):.*\n(?:(?:[ \t-].*)?\n)*", re.MULTILINE)


def read_base_card(path: Path) -> dict[str, Any]:
    """The fields of its metadata that may be copied; none where there is no card, or no YAML in it."""
    found = _checked(_read(path))
    if "license" not in found:  # its name and link alone say nothing
        found = {key: value for key, value in found.items() if not key.startswith("license")}
    return found


def _read(path: Path) -> dict[Any, Any]:
    """The wanted fields of a card's metadata, as they are."""
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        text = file.read(_MOST_BYTES).decode("utf-8-sig", "replace").replace("\r\n", "\n")
    block = re.match(r"\s*---[ \t]*\n(.*?\n)---[ \t]*(\n|$)", text, re.DOTALL)
    taken = "".join(each.group() for each in _WANTED.finditer(block.group(1))) if block else ""
    if len(taken) > _MOST_TAKEN:
        return {}
    try:
        table = read_yaml(taken, path.name)
    except UsageError:
        return {}
    return table if isinstance(table, dict) else {}  # pyright: ignore[reportUnknownVariableType]


def _checked(table: dict[Any, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, pattern in _ONE.items():
        value = table.get(key)
        if isinstance(value, str) and re.fullmatch(pattern, value, re.ASCII):
            found[key] = value
    for key, pattern in _MANY.items():
        value = table.get(key)
        items: list[Any] = value if isinstance(value, list) else [value]
        items = [
            "no" if each is False and key == "language" else each for each in items
        ]  # Norwegian, to YAML
        given = [each for each in items[:_MOST_ITEMS] if isinstance(each, str)]
        given = [each for each in given if re.fullmatch(pattern, each, re.ASCII)]
        if given:
            found[key] = given
    return found
