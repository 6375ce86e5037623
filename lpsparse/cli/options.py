"""A command's options are its step's settings: names, help and defaults are written once, in steps/."""

import inspect
from collections.abc import Callable, Mapping
from types import UnionType
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from lpsparse.cli.output import FULL, JSON, QUIET, VERBOSE, Voice
from lpsparse.steps.base import OneOf, about, about_of, flag, is_repeated
from lpsparse.steps.resolve import resolve
from lpsparse.steps.table import COMMANDS, step_of

_EPILOG = (
    "Environment variables set options too, such as LPSPARSE_JSON=1; a flag wins (`lpsparse help "
    "environment`)."
)
Show = Callable[[Any, Any, Voice], None]  # (step, as JSON or the files asked for, what is said)


def add_command(
    app: typer.Typer,
    name: str,
    show: Show,
    *,
    examples: str,
    files: Mapping[str, str] | None = None,
    full: bool = False,
) -> None:
    """Register `name`, which builds its step from the options and gives it to `show`. `files` are the names
    and help of options that each take a FILE to write; without them `--json` is a switch. `full`: it has
    `--full`."""
    kind = step_of(name)

    def body(**values: Any) -> None:
        voice = Voice(values.pop("quiet"), values.pop("verbose"), values.pop("full", False))
        asked = {each: values.pop(f"{each}_file") for each in files} if files else values.pop("as_json")
        values.pop("help_all", None)
        given = {key: value for key, value in values.items() if value is not None and value != []}
        show(resolve(kind, given), asked, voice)

    known = about(kind)
    fields = sorted(  # arguments first, then what must be given
        kind.model_fields.items(),
        key=lambda item: (known[item[0]].panel != "Arguments", not item[1].is_required()),
    )
    parameters = [_parameter(key, info) for key, info in fields]
    parameters += [_named("as_json", bool, JSON)] if files is None else []
    parameters += [_file(each, text) for each, text in (files or {}).items()]
    parameters += [_named("full", bool, FULL)] if full else []
    parameters += [_named("quiet", bool, QUIET), _named("verbose", bool, VERBOSE)]
    if any(each.advanced for each in known.values()):
        parameters.append(_named("help_all", bool, _HELP_ALL))
    body.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
    body.__annotations__ = {item.name: item.annotation for item in parameters}
    app.command(name, help=f"{COMMANDS[name].help}\n\n\b\nExamples:\n{examples}", epilog=_EPILOG)(body)


def _show_all(context: typer.Context, asked: bool) -> None:
    """Print the help with the advanced options, and end."""
    if asked and not context.resilient_parsing:
        for parameter in context.command.params:
            cast("Any", parameter).hidden = False
        typer.echo(context.get_help())
        raise typer.Exit()


_HELP_ALL = typer.Option(
    "--help-all",
    help="Show this with all options.",
    is_eager=True,
    callback=_show_all,
    rich_help_panel="Other",
    show_default=False,
)


def _named(name: str, kind: Any, option: Any, default: Any = False) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option]
    )


def _file(name: str, text: str) -> inspect.Parameter:
    option = typer.Option(
        f"--{name}", help=text, metavar="FILE", show_default=False, rich_help_panel="Reporting"
    )
    return _named(f"{name}_file", str | None, option, None)


def _parameter(key: str, info: FieldInfo) -> inspect.Parameter:
    text, known = info.description or "", about_of(info)
    if known.panel == "Arguments":
        argument = typer.Argument(help=text, metavar=key.upper(), show_default=False)
        required = info.is_required()
        default = inspect.Parameter.empty if required else None
        return _named(key, str if required else str | None, argument, default)
    common: dict[str, Any] = {
        "help": text + _default_in_words(info),
        "show_default": False,
        "rich_help_panel": known.panel,
        "hidden": known.advanced,
    }
    names = (flag(key), *(flag(alias) for alias in known.aliases))
    if info.annotation is bool:
        switches = [f"{name}/--no-{name[2:]}" for name in names] if info.default else list(names)
        if not info.default:  # it can be switched off again, over the environment; help need not say so
            switches[0] += f"/--no-{names[0][2:]}"
        return _named(key, bool | None, typer.Option(*switches, **common), None)
    if is_repeated(info):
        option = typer.Option(*names, metavar=known.metavar or "GLOB", **common)
        return _named(key, list[str] | None, option, None)
    family = [name for part in info.metadata if isinstance(part, OneOf) for name in part.names]
    choices = family or _choices(info.annotation)
    option = typer.Option(
        *names,
        metavar="|".join(family) or _metavar(info.annotation),
        autocompletion=(lambda: choices) if choices else None,
        **common,
    )
    return _named(key, str | None, option, None)


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
    names = {"int": "N", "float": "NUMBER", "Decimal": "NUMBER", "Path": "PATH", "str": "TEXT"}
    return names.get(cast("type", annotation).__name__, "TEXT")
