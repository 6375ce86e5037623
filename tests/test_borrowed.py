"""Each undocumented name of another library is taken away: what is left does the same, if more slowly."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.cli import cli_environment
from support.files import ROOT
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedModel

import lpsparse
from lpsparse.borrowed import BORROWED, borrow
from lpsparse.checkpoint.hub import setting
from lpsparse.errors import ExitCode, LaunchError, UsageError
from lpsparse.parallel import launcher
from lpsparse.training import compiled
from lpsparse.training.names import turned_back

SOURCES = [ast.parse(path.read_text("utf-8")) for path in sorted((ROOT / "lpsparse").rglob("*.py"))]
BRIEF: dict[str, Any] = {"method": "dense", "steps": 2}


@pytest.fixture(params=sorted(BORROWED))
def taken(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A borrowed name that its library does not have any more."""
    name = request.param
    module, _, attribute = name.partition(":")
    if attribute:
        monkeypatch.delattr(f"{module}.{attribute}")
    else:
        monkeypatch.setitem(sys.modules, module, None)  # an import of it is an ImportError
    assert borrow(name) is None
    return name


def test_every_borrowed_name_has_a_fallback_that_works(
    taken: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = globals()[f"without_{taken.replace(':', '.').rpartition('.')[2].lstrip('_')}"]
    check(request, monkeypatch)


def without_reset_state(request: pytest.FixtureRequest, _: Any) -> None:
    net, out = (request.getfixturevalue(name) for name in ("net", "tmp_path"))
    made = lpsparse.finetune(out=out / "a", **net, **BRIEF)
    again = lpsparse.finetune(out=out / "b", **net, **BRIEF)
    assert made.prunable == again.prunable
    with pytest.raises(UsageError) as refused:
        lpsparse.finetune(out=out / "c", **net, **BRIEF, mixed_precision="bf16")
    assert refused.value.code == "LPS248"


def without_constants(_: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_CACHE", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert (setting("ENDPOINT"), setting("HF_HUB_OFFLINE")) == ("https://huggingface.co", False)
    assert setting("HF_HUB_DOWNLOAD_TIMEOUT") == 10
    monkeypatch.setenv("HF_HOME", "/elsewhere")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert (setting("HF_HUB_CACHE"), setting("HF_HUB_OFFLINE")) == ("/elsewhere/hub", True)


def without_mark_dynamic(*_: Any) -> None:
    compiled._compiled.cache_clear()
    kernel = compiled.compiled("fill", torch.ones(4), p=0.5)
    compiled._compiled.cache_clear()
    if kernel is None:
        pytest.skip("no compiler here")
    for size in (7, 4099):
        w, divisor = torch.linspace(-1, 1, size), torch.empty(size)
        kernel(divisor, w, torch.tensor([-1.5, 0.25, 1.0]))
        torch.testing.assert_close(divisor, 1 + 0.25 * w.abs() ** -1.5)


def without_elastic_launch(request: pytest.FixtureRequest, _: Any) -> None:
    net, out = (request.getfixturevalue(name) for name in ("net", "tmp_path"))
    lpsparse.finetune(out=out / "a", **net, **BRIEF, processes=2)
    assert (out / "a" / "lpsparse.json").is_file()
    with pytest.raises(LaunchError) as failed:
        launcher.launch(2, ["inspect", str(out / "missing")])
    assert failed.value.exit_code == ExitCode.RESOURCE


def without_revert_weight_conversion(request: pytest.FixtureRequest, _: Any) -> None:
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=3,
    )
    model = AutoModelForCausalLM.from_config(config)
    assert isinstance(model, PreTrainedModel)
    own = dict(model.state_dict())
    found = turned_back(model, own)
    request.getfixturevalue("monkeypatch").undo()
    wanted = turned_back(model, own)
    assert found.keys() == wanted.keys() and any("experts.2.w1" in name for name in found)
    assert all(found[name].equal(wanted[name]) for name in wanted)


def without_core(*_: Any) -> None:
    code = """
import sys, typer.core
del typer.core.TyperGroup
from lpsparse.cli import main
main(sys.argv[1:])
"""
    for words, code_wanted in ((["--help"], 0), (["inspect", "--help"], 0), (["no-such"], 2), (["--no"], 2)):
        ran = subprocess.run(
            [sys.executable, "-c", code, *words], env=cli_environment(), capture_output=True, text=True
        )
        assert (ran.returncode, "Traceback" in ran.stderr) == (code_wanted, False), ran.stderr
        assert ("error[LPS200]" in ran.stderr) == bool(code_wanted)


def _defined() -> Iterator[str]:
    for node in (node for tree in SOURCES for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr


def test_no_other_private_name_is_used() -> None:
    ours = set(_defined())
    used: set[str] = set()
    for node in (node for tree in SOURCES for node in ast.walk(tree)):
        if isinstance(node, ast.Attribute):
            used.add(node.attr)
        elif isinstance(node, ast.ImportFrom):
            used |= set(str(node.module).split("."))
    private = {name for name in used if name.startswith("_") and not name.endswith("__")}
    # os._exit is documented; of threads, interrupt_main is in _thread.
    assert private - ours == {"_exit"}


def test_private_names_are_not_hidden_from_the_type_checker() -> None:
    for path in sorted((ROOT / "lpsparse").rglob("*.py")):
        assert "reportPrivate" not in path.read_text("utf-8"), path
