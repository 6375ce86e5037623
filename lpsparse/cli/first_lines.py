"""The commands that are steps by their first lines alone, for `lpsparse --help`: to build the steps, and to
import pydantic for it, takes longer than all else of it."""

import ast
from pathlib import Path
from typing import NoReturn

import typer

_FILES = Path(__file__).parents[1] / "steps"
_STEPS = ("finetune", "prune", "pack", "unpack", "verify", "inspect", "push", "eval", "report")


def register(app: typer.Typer) -> None:
    """`commands` and `report` register the same, with their options."""
    nodes = (node for path in _FILES.glob("*.py") for node in ast.parse(path.read_bytes()).body)
    classes = {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}
    for name in _STEPS:
        app.command(name, help=ast.get_docstring(classes[f"{name.capitalize()}Step"]))(_run)


def _run() -> NoReturn:
    raise AssertionError("a command was given, and is not registered")
