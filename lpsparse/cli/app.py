"""What commands are registered with: a Typer with help in panels and the switches of the environment."""

from typing import Any

import typer

from lpsparse.parallel.environment import switched_on

try:
    from lpsparse.cli.panels import Command, Group
except ImportError:  # a Typer without the classes that these are made of: see `borrowed`
    Command = Group = None


class App(typer.Typer):
    def __init__(self, **options: Any) -> None:
        super().__init__(cls=Group, no_args_is_help=True, rich_markup_mode=None, **options)

    def command(self, name: str | None = None, **options: Any) -> Any:
        return super().command(name, cls=Command, context_settings={"default_map": _defaults()}, **options)


def _defaults() -> dict[str, Any]:
    """What the environment asks of every command."""
    switches = ("quiet", "verbose", "full")
    asked: dict[str, Any] = {name: True for name in switches if switched_on(f"LPSPARSE_{name.upper()}")}
    # Of report, --json is a file.
    return asked | ({"as_json": True, "json_file": "-"} if switched_on("LPSPARSE_JSON") else {})
