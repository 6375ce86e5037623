"""The keywords of the public functions are the settings of their steps. Run this file to write them anew."""

from decimal import Decimal
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from lpsparse.families import VIEWS
from lpsparse.steps import options
from lpsparse.steps.base import about
from lpsparse.steps.table import COMMANDS, step_of

HEAD = '''"""Keywords of the public functions, for editors and type checkers: made from the steps by
tests/steps/test_options.py, which holds them true."""

from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Literal, TypedDict

'''
WORDS: dict[Any, str] = {Decimal: "float | str | Decimal", Path: "str | Path", NoneType: "None"}
OWN = ("component", "dry_run")  # that change what a function returns, so it has them itself
NAMED = ("finetune", "prune", "pack", "unpack", "eval", "report", "inspect", "push")


def words_of(annotation: Any) -> str:
    if get_origin(annotation) is Annotated:
        return words_of(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return " | ".join(dict.fromkeys(words_of(part) for part in get_args(annotation)))
    if get_origin(annotation) is Literal:
        return f"Literal[{', '.join(repr(each) for each in get_args(annotation))}]".replace("'", '"')
    if get_origin(annotation) is tuple:
        inner = words_of(get_args(annotation)[0])
        return f"{inner} | Sequence[{inner}]"
    return WORDS.get(annotation, annotation.__name__)


def render() -> str:
    parts = [HEAD]
    for name in NAMED:
        kind: type[BaseModel] = step_of(name)
        parts.append(f"\nclass {name.capitalize()}Options(TypedDict, total=False):\n")
        parts += [
            f"    {field}: {words_of(info.annotation)}\n"
            for field, info in kind.model_fields.items()
            if about(kind)[field].panel != "Arguments" and field not in OWN
        ]
        parts += [f"    {view}: str | Path\n" for view in (VIEWS if name == "report" else ())]
        parts.append("\n")
    return "".join(parts).rstrip() + "\n"


def test_the_keywords_are_the_settings() -> None:
    assert Path(options.__file__).read_text("utf-8") == render()


def test_every_command_with_settings_has_keywords() -> None:
    assert {name for name, command in COMMANDS.items() if command.step} == {*NAMED, "recover", "verify"}


if __name__ == "__main__":
    Path(options.__file__).write_text(render(), "utf-8")
