"""A command's options are its step's fields: names, help,
defaults and checks are written once, in `recipe`."""

import inspect
from collections.abc import Callable, Mapping
from types import UnionType
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from lpsparse.cli.output import QUIET, VERBOSE, Voice
from lpsparse.steps.base import POSITIONAL, REPEATED, OneOf, Step, flag, other_names
from lpsparse.steps.resolve import resolve

_EPILOG = (
    "Each option can also be set as LPSPARSE_NAME, such as LPSPARSE_JSON=1; a flag wins (`lpsparse help "
    "environment`)."
)
Show = Callable[[Any, Any, Voice], None]  # (step, as JSON or the files asked for, what is said)
_METAVARS = {
    "min_sparsity": "LIMIT",
    "max_bytes": "LIMIT",
    "max_quality_drop": "LIMIT",
    "max_layer_sparsity": "LIMIT",
    "min_nm": "LIMIT",
    "warn": "BUDGET",
}


def add_command(
    app: typer.Typer,
    name: str,
    kind: type[Step],
    show: Show,
    *,
    examples: str,
    files: Mapping[str, str] | None = None,
    full: bool = False,
) -> None:
    """Register `name`, which builds a step of `kind` from its options and gives it to `show`. `files` are the
    names and help of options that each take a FILE to write; without them `--json` is a switch. `full`: it
    has `--full`."""

    def body(**values: Any) -> None:
        voice = Voice(values.pop("quiet"), values.pop("verbose"), values.pop("full", False))
        asked = {each: values.pop(f"{each}_file") for each in files} if files else values.pop("as_json")
        given = {key: value for key, value in values.items() if value is not None and value != []}
        show(resolve(kind, given), asked, voice)

    others = other_names(kind.model_fields)
    parameters = [
        _parameter(key, info, [flag(name) for name, of in others.items() if of == key])
        for key, info in kind.model_fields.items()
    ]
    parameters.sort(key=lambda item: POSITIONAL.index(item.name) if item.name in POSITIONAL else 9)
    if files is None:
        parameters += [_switch("as_json", "--json", "Print the result as one JSON object on stdout.")]
    parameters += [_file(each, text) for each, text in (files or {}).items()]
    if full:
        parameters += [_switch("full", "--full", "Show every tensor, and patterns of zeros.")]
    parameters += [_switch("quiet", *QUIET), _switch("verbose", *VERBOSE)]
    body.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
    body.__annotations__ = {item.name: item.annotation for item in parameters}
    body.__doc__ = f"{kind.__doc__}\n\n\b\nExamples:\n{examples}"
    app.command(name, epilog=_EPILOG)(body)


def _switch(name: str, *words: str) -> inspect.Parameter:
    """A flag; its names and, last, its help are `words`."""
    annotation = Annotated[bool, typer.Option(*words[:-1], help=words[-1])]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)


def _file(name: str, text: str) -> inspect.Parameter:
    option = typer.Option(f"--{name}", help=text, metavar="FILE", show_default=False)
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(f"{name}_file", kind, default=None, annotation=Annotated[str | None, option])


def _parameter(key: str, info: FieldInfo, others: list[str]) -> inspect.Parameter:
    text, annotation = info.description or "", info.annotation
    if key in POSITIONAL:
        argument = typer.Argument(help=text, metavar=key.upper(), show_default=False)
        kind = str if info.is_required() else str | None
        default = inspect.Parameter.empty if info.is_required() else None
        return inspect.Parameter(
            key, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, argument]
        )
    text += _default_in_words(info)
    if annotation is bool:
        option, wanted = (
            typer.Option(f"{flag(key)}/--no-{flag(key)[2:]}", help=text, show_default=False),
            bool | None,
        )
    elif key in REPEATED:
        option, wanted = (
            typer.Option(flag(key), help=text, metavar=_METAVARS.get(key, "GLOB"), show_default=False),
            list[str] | None,
        )
    else:
        family = [name for part in info.metadata if isinstance(part, OneOf) for name in part.names]
        choices = family or _choices(annotation)
        option, wanted = (
            typer.Option(
                flag(key),
                *others,
                help=text,
                metavar="|".join(family) or _metavar(annotation),
                show_default=False,
                autocompletion=(lambda: choices) if choices else None,
            ),
            str | None,
        )
    return inspect.Parameter(
        key, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[wanted, option]
    )


def _default_in_words(info: FieldInfo) -> str:
    value = info.default
    if info.is_required():
        return " [required]"
    if value is None or value == () or value is False:
        return ""
    if value is True:
        return " [default: on]"
    shown = ",".join(f"{part:g}" for part in value) if isinstance(value, tuple) else value
    return f" [default: {shown}]"


def _choices(annotation: Any) -> list[str]:
    """The values that a shell can complete."""
    inner = [annotation, *get_args(annotation)]
    return [str(choice) for part in inner if get_origin(part) is Literal for choice in get_args(part)]


def _metavar(annotation: Any) -> str:
    """What may stand there: the choices, or the kind of value."""
    if get_origin(annotation) is Literal:
        return "|".join(str(choice) for choice in get_args(annotation))
    if get_origin(annotation) in (Union, UnionType):
        inner = [part for part in get_args(annotation) if part is not type(None)]
        return "|".join(dict.fromkeys(_metavar(part) for part in inner))
    if get_origin(annotation) is Annotated:
        return _metavar(get_args(annotation)[0])
    if get_origin(annotation) is tuple:
        return "NUMBERS"
    names = {"int": "INTEGER", "float": "NUMBER", "Decimal": "NUMBER", "Path": "PATH", "str": "TEXT"}
    return names.get(cast("type", annotation).__name__, "TEXT")
