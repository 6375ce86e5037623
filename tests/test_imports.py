"""The house of design section 4: imports point one way,
heavy packages keep to their rooms, only cli speaks."""

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.cli import cli_environment
from support.files import ROOT

from lpsparse.steps.finetune import FinetuneStep
from lpsparse.steps.resolve import resolve

PACKAGE = ROOT / "lpsparse"
MODULES = sorted(PACKAGE.rglob("*.py"))
HEAVY = {"torch", "transformers", "accelerate"}
# Room -> the rooms it may import from; its own is understood, and the root's version number is everyone's.
_BELOW_COMMANDS = {
    "training",
    "integrations",
    "hub",
    "pruning",
    "reporting",
    "checkpoint",
    "parallel",
    "steps",
    "errors",
}
MAY_IMPORT = {
    "errors": set[str](),
    "borrowed": set[str](),
    "families": set[str](),
    "safe_yaml": {"errors"},
    "parallel": {"errors"},
    "steps": {"parallel", "errors"},
    "checkpoint": {"parallel", "errors"},
    "pruning": {"checkpoint", "parallel", "errors"},
    "reporting": {"pruning", "checkpoint", "parallel", "steps", "safe_yaml", "errors"},
    "hub": {"checkpoint", "parallel", "errors"},
    "training": {"pruning", "checkpoint", "parallel", "steps", "errors"},
    "integrations": {"training", "checkpoint", "parallel", "steps", "errors"},
    "commands": _BELOW_COMMANDS,
    "recipes": _BELOW_COMMANDS | {"commands", "safe_yaml"},
    "api": _BELOW_COMMANDS | {"commands"},
    "cli": _BELOW_COMMANDS | {"api", "recipes", "commands"},
    "__main__": {"cli"},
    "__init__": {"integrations.hook"},  # standard library only
}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def identify(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("path", MODULES, ids=identify)
def test_imports_point_one_way(path: Path) -> None:
    room = room_of(path)
    allowed = MAY_IMPORT[room] | {room, "borrowed", "families", "__version__"}
    inner = {name.removeprefix("lpsparse.") for name in imported(path) if name.startswith("lpsparse.")}
    wrong = {name for name in inner if not any(f"{name}.".startswith(f"{each}.") for each in allowed)}
    assert not wrong


@pytest.mark.parametrize("path", MODULES, ids=identify)
def test_heavy_packages_stay_in_their_rooms(path: Path) -> None:
    found = {name.partition(".")[0] for name in imported(path)} & HEAVY
    room, name = room_of(path), identify(path)
    if name == "checkpoint/torchfile.py" or name.startswith("parallel/"):
        assert found <= {"torch"}
    elif room not in ("training", "integrations"):
        assert not found


def test_torch_distributed_is_imported_in_one_file_only() -> None:
    users = {identify(p) for p in MODULES if any(n.startswith("torch.distributed") for n in imported(p))}
    assert users == {"parallel/launcher.py", "parallel/ranks.py"}


@pytest.mark.parametrize("path", MODULES, ids=identify)
def test_only_cli_prints_or_exits(path: Path) -> None:
    speaks = {"print", "exit", "quit", "input"}
    speaks_of = {("sys", "exit"), ("os", "_exit"), ("sys", "stdout"), ("sys", "stderr")}
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in speaks:
            found.add(node.func.id)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found |= {node.attr} if (node.value.id, node.attr) in speaks_of else set()
    assert not found or room_of(path) == "cli"


def modules_after(code: str, *argv: object) -> set[str]:
    """Top-level packages loaded after running `code` with `argv`, in a fresh interpreter."""
    tail = "import sys, json; sys.stderr.write('\\n' + json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{tail}", *map(str, argv)],
        env=cli_environment(LPSPARSE_MIXED_PRECISION=None),  # settings of steps need pydantic
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return {name.partition(".")[0] for name in json.loads(done.stderr.splitlines()[-1])}


DEMO = PACKAGE / "bundled" / "demo.yaml"
RUN = """
import sys
from lpsparse.cli import main
try:
    main(sys.argv[1:])
except SystemExit as left:
    assert not left.code, left.code
"""


def test_import_lpsparse_loads_the_standard_library_only() -> None:
    before, after = modules_after(""), modules_after("import lpsparse")
    extra = after - before
    assert extra - set(sys.stdlib_module_names) == {"lpsparse"}


def test_help_loads_nothing_heavy() -> None:
    assert not modules_after(RUN, "--help") & {*HEAVY, "huggingface_hub", "jinja2", "yaml", "pydantic"}


def test_every_command_on_safetensors_runs_without_torch(tiny: Path, tmp_path: Path) -> None:
    pruned, packed = tmp_path / "pruned", tmp_path / "packed"
    commands = (
        ("prune", tiny, pruned, "--sparsity", "0.5"),
        ("report", pruned, tiny),
        ("inspect", tiny),
        ("verify", pruned),
        ("pack", pruned, packed),
        ("unpack", packed, tmp_path / "dense"),
        ("push", packed, "org/name", "--dry-run"),
        ("recipe", "check", DEMO),
    )
    for command in commands:
        writes = command[0] in ("prune", "pack", "unpack")  # a model card, with the hub's own classes
        assert not modules_after(RUN, *command) & (HEAVY if writes else {*HEAVY, "huggingface_hub"}), command[
            0
        ]


def test_prune_of_a_torch_file_loads_torch_and_no_models(tmp_path: Path) -> None:
    import torch

    torch.save({"a.weight": torch.ones(7, 13)}, tmp_path / "net.pt")
    loaded = modules_after(RUN, "prune", tmp_path / "net.pt", tmp_path / "out", "--sparsity", "0.5")
    assert "torch" in loaded
    assert not loaded & {"transformers", "accelerate"}


def test_a_module_of_your_own_is_trained_without_transformers(faulty: dict[str, Any], tmp_path: Path) -> None:
    words = resolve(FinetuneStep, {**faulty, "out": "o", "dry_run": True}).options()
    loaded = modules_after(RUN, "finetune", faulty["model"], tmp_path / "out", *words)
    assert "torch" in loaded and "transformers" not in loaded  # which takes a second to import
