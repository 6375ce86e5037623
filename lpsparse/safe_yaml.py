"""YAML from outside, read as plain data: a small text is never let become a large or slow one."""

from collections.abc import Iterable
from typing import Any, cast

from lpsparse.errors import UsageError

_MOST_NESTED = 20  # levels


def read_yaml(text: str, where: str) -> Any:
    """Raises UsageError, which begins with `where`, for what is broken, an alias, deep, or a key twice."""
    import yaml

    try:
        _check_tokens(where, yaml.scan(text))
        _check_keys(where, yaml.compose(text, Loader=yaml.SafeLoader))
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none
        why = str(error).splitlines()[0]
        raise UsageError(205, f"{where}: not valid YAML: {why}", hint="fix the file") from None


def _check_tokens(where: str, tokens: Iterable[Any]) -> None:
    """Refuse what makes a small file large (aliases) or its reader slow (nesting)."""
    depth = 0
    for token in tokens:
        kind = type(token).__name__
        if kind == "AliasToken":
            raise UsageError(205, f"{where}: YAML aliases are not accepted", hint="write the value out")
        depth += kind.endswith("StartToken") - kind.endswith("EndToken")
        if depth > _MOST_NESTED:
            raise UsageError(205, f"{where}: nested more than {_MOST_NESTED} deep", hint="fix the file")


def _check_keys(where: str, node: Any) -> None:
    """Refuse a key that stands twice in a table: YAML would quietly take the last."""
    seen: set[str] = set()
    for entry in getattr(node, "value", None) or ():
        if isinstance(entry, tuple):  # of a table; a list has its nodes themselves
            key, value = cast("tuple[Any, Any]", entry)
            if isinstance(key.value, str) and key.value in seen:
                line = key.start_mark.line + 1
                raise UsageError(205, f"{where}: line {line}: {key.value!r} stands twice", hint="keep one")
            seen.add(str(key.value))
            _check_keys(where, value)
        elif not isinstance(entry, str):
            _check_keys(where, entry)
