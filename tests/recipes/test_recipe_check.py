"""`recipe check`: what would fail in a run fails before it, and nothing is written."""

import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from support.cli import Ran, failed
from support.files import PRUNABLE_WEIGHTS, ROOT, tree_hash
from support.models import BUNDLED, built

from lpsparse import check_recipe
from lpsparse.recipes import run
from lpsparse.reporting.records import Report

Cli = Callable[..., Ran]
TUNE = {"task": "causal-lm", "steps": 2, "max_length": 16}
HEAD = {"task": "text-classification", "steps": 2, "target_sparsity": 0.5}


def write(folder: Path, *steps: dict[str, Any], **top: Any) -> str:
    table = {"model": "tiny", "out": "made", "data": "text.txt", **top, "steps": list(steps)}
    (folder / "r.yaml").write_text(yaml.safe_dump(table))
    return "r.yaml"


@pytest.fixture
def here(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tiny.parent)
    (tiny.parent / "text.txt").write_text("Once upon a time. " * 40)
    return tiny.parent


def test_a_sound_recipe_gets_a_line_a_step_and_nothing_is_written(here: Path, cli: Cli) -> None:
    write(
        here, {"finetune": TUNE}, {"prune": {"sparsity": 0.5}}, {"pack": {}}, {"verify": None}, {"report": {}}
    )
    before = tree_hash(here)
    ran = cli("recipe", "check", "r.yaml")
    assert (ran.rc, ran.stderr) == (0, "")
    assert [f"{i} " in ran.stdout for i in range(1, 6)] == [True] * 5 and "r.yaml: ok" in ran.stdout
    assert tree_hash(here) == before


def test_json_of_a_check_has_needs_of_every_step(here: Path, cli: Cli) -> None:
    write(here, {"finetune": TUNE}, {"prune": {"sparsity": 0.5}})
    found = json.loads(cli("recipe", "check", "r.yaml", "--json").stdout)
    assert [each["prunable_weights"] for each in found["steps"]] == [PRUNABLE_WEIGHTS] * 2
    assert found["disk_bytes"] == sum(each["disk_bytes"] for each in found["steps"]) > 0
    assert found["memory_bytes"] >= found["steps"][0]["memory_bytes"] >= 16 * PRUNABLE_WEIGHTS


def test_a_report_counts_what_the_step_before_it_chose_as_the_run_does(here: Path) -> None:
    cut = {"sparsity": 0.5, "exclude": ["*layers.0.mlp*"]}
    every = {"report": {"include": ["*.attn.weight", "*.mlp.weight"]}}
    recipe = write(here, {"prune": cut}, {"pack": {}}, {"report": {}}, every)
    new = [each["prunable_weights"] for each in check_recipe(recipe)["steps"]]
    ran = [each.result for each in run.run(recipe)]
    assert new == [3 * 91, None, 3 * 91, 4 * 91]
    assert [each.prunable.weights for each in ran if isinstance(each, Report)] == [273, 273, 273, 364]
    assert [each["prunable_weights"] for each in check_recipe(recipe)["steps"]] == new  # of finished ones


WRONG: dict[str, tuple[tuple[dict[str, Any], ...], int, list[str]]] = {
    "a pattern": (({"prune": {"sparsity": 0.5, "include": "*mpl*"}},), 2, ["steps[0].prune", ".mlp.weight"]),
    "freeze": (({"finetune": {**TUNE, "freeze": "layer.0.*"}},), 2, ["--freeze", "tensor: layers.0"]),
    "report": (({"report": {"exclude": ["none*"]}},), 2, ["none*", "matches no tensor"]),
    "later": (({"pack": {}}, {"prune": {"sparsity": 0.5, "exclude": "x"}}), 2, ["steps[1].prune"]),
    "n_m": (({"prune": {"n_m": "2:4"}},), 2, ["7 rows of 13"]),
    "setting": (({"prune": {"sparsity": 2}},), 2, ["sparsity"]),
    "data": (({"finetune": {**TUNE, "data": "gone.txt"}},), 3, ["gone.txt", "no such data"]),
    "kind": (({"finetune": {**TUNE, "task": "image-classification"}},), 3, ["text.txt", "not data of"]),
    "model": (({"pack": {"model": "gone"}},), 3, ["gone"]),
    "base": (({"pack": {}}, {"report": {"base": "gone"}}), 3, ["steps[1].report", "gone"]),
    "budget": (({"report": {"min_sparsity": "*mpl*=0.5"}},), 2, ["LPS290", "*mpl*=0.5", "steps[0].report"]),
    "budget of n_m": (({"report": {"min_nm": ["none*=2:4=1"]}},), 2, ["LPS290", "none*=2:4=1"]),
    "baseline": (({"report": {"baseline": "gone.json"}},), 3, ["gone.json", "no such report"]),
    "no report": (({"report": {"baseline": "text.txt"}},), 3, ["text.txt", "not valid JSON"]),
    "baseline made later": (({"report": {"baseline": "2-pack"}}, {"pack": {}}), 3, ["no such report"]),
    "source": (({"pack": {}}, {"verify": {"source": "gone"}}), 3, ["gone"]),
    "verify": (({"verify": None},), 3, ["lpsparse did not write it"]),
    "inside": (({"pack": {"out": "../tiny/x"}},), 4, ["lies inside the input"]),
    "held out": (({"finetune": {**TUNE, "eval_data": "text.txt"}},), 2, ["trains on"]),
    "code": (({"finetune": {**TUNE, "model_fn": "net.py:build"}},), 2, ["net.py: no such file"]),
}


@pytest.mark.parametrize(("steps", "rc", "words"), WRONG.values(), ids=WRONG.keys())
def test_what_a_run_would_refuse_is_refused_with_its_step(
    steps: tuple[dict[str, Any], ...], rc: int, words: list[str], here: Path, cli: Cli
) -> None:
    said = failed(cli("recipe", "check", write(here, *steps)), rc)
    assert [word for word in words if word not in said] == []


@pytest.mark.parametrize("baseline", ["cut", "made/cut", "made/cut/report.json", "made/report-2.json"])
def test_a_baseline_that_an_earlier_step_makes_is_there_in_a_run(baseline: str, here: Path) -> None:
    steps = ({"prune": {"sparsity": 0.5, "out": "cut"}}, {"report": {}}, {"report": {"baseline": baseline}})
    write(here, *steps)
    assert len(check_recipe("r.yaml")["steps"]) == 3
    assert run.passed(run.run("r.yaml"))


@pytest.mark.parametrize("model", ["made/report-2.json", "old.json"])
def test_a_report_step_may_be_of_a_report_that_is_there_or_made(model: str, here: Path, cli: Cli) -> None:
    assert cli("report", "tiny", "--json", "old.json").rc == 0
    write(
        here, {"prune": {"sparsity": 0.5}}, {"report": {}}, {"report": {"model": model, "max_bytes": "1MB"}}
    )
    found = check_recipe("r.yaml")["steps"][2]
    assert (found["model"], found["state"], found["disk_bytes"]) == (model, "looks", 0)
    assert found["prunable_weights"] == (PRUNABLE_WEIGHTS if model == "old.json" else None)
    assert run.passed(run.run("r.yaml"))


REPORTS: dict[str, tuple[dict[str, Any], int, str]] = {
    "measured": ({"spectra": True}, 2, "LPS291"),
    "base": ({"base": "tiny"}, 2, "LPS291"),
    "pattern": ({"min_sparsity": "none*=0.1"}, 2, "LPS290"),
    "baseline": ({"baseline": "gone"}, 3, "LPS356"),
    "broken": ({"model": "broken.json"}, 3, "LPS356"),
    "other": ({"model": "other.json"}, 3, "LPS357"),
    "gone": ({"model": "gone.json"}, 3, "gone.json"),
}


@pytest.mark.parametrize(("more", "rc", "word"), REPORTS.values(), ids=REPORTS.keys())
def test_what_a_report_of_a_report_would_refuse_is_refused(
    more: dict[str, Any], rc: int, word: str, here: Path, cli: Cli
) -> None:
    assert cli("report", "tiny", "--json", "old.json").rc == 0
    (here / "broken.json").write_text("{")
    (here / "other.json").write_text('{"schema_version": 2}')
    write(here, {"report": {"model": "old.json", **more}})
    assert word in failed(cli("recipe", "check", "r.yaml"), rc)
    assert word in failed(cli("run", "r.yaml", "--quiet"), rc)


def test_a_report_is_not_compared_with_a_folder_of_several_checkpoints(here: Path) -> None:
    shutil.copy(here / "tiny" / "model.safetensors", here / "tiny" / "other.safetensors")
    (here / "tiny" / "model.safetensors").rename(here / "tiny" / "one.safetensors")
    prune = {"prune": {"sparsity": 0.5, "weights": "one.safetensors"}}
    write(here, prune, {"report": {"min_sparsity": 0.5}}, {"report": {"base": "tiny/one.safetensors"}})
    assert len(check_recipe("r.yaml")["steps"]) == 3
    found = [each.result for each in run.run("r.yaml")][1:]
    assert [isinstance(each, Report) and each.base is not None for each in found] == [False, True]


def test_a_folder_in_the_way_is_refused_and_one_that_is_finished_is_not(here: Path, cli: Cli) -> None:
    write(here, {"prune": {"sparsity": 0.5, "out": "cut"}}, {"pack": {"out": "packed"}})
    run.run("r.yaml")
    assert [each["state"] for each in check_recipe("r.yaml")["steps"]] == ["finished", "finished"]
    shutil.rmtree(here / "made" / "packed")
    found = check_recipe("r.yaml")["steps"]
    assert [each["state"] for each in found] == ["finished", "new"] and found[0]["disk_bytes"] == 0
    assert "overwrite=true" in failed(cli("recipe", "check", "r.yaml", "--set", "prune.sparsity=0.6"), 4)
    (here / "made" / "packed").mkdir()
    assert "exists already" in failed(cli("recipe", "check", "r.yaml"), 4)


def test_a_replaced_step_asks_the_steps_after_it_to_be_replaced_too(here: Path, cli: Cli) -> None:
    write(here, {"prune": {"sparsity": 0.5}}, {"pack": {}})
    run.run("r.yaml")
    words = ["recipe", "check", "r.yaml", "--set", "prune.sparsity=0.6", "--set", "prune.overwrite=true"]
    assert "2-pack" in failed(cli(*words), 4)
    assert cli(*words, "--set", "pack.overwrite=true").rc == 0


def test_a_disk_too_small_for_all_steps_together_is_exit_4(
    here: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(here, {"prune": {"sparsity": 0.5}}, {"pack": {}})
    one = check_recipe("r.yaml")["steps"][0]["disk_bytes"]
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(0, 0, int(1.5 * one)))
    assert "for the earlier steps" in failed(cli("recipe", "check", "r.yaml"), 4)


def test_names_that_a_new_head_may_change_are_told_and_not_refused(here: Path) -> None:
    (here / "rows.csv").write_text("text,label\na,1\nb,0\n")
    shutil.copytree(BUNDLED, here / "lm")
    tune = {"finetune": {"task": "text-classification", "data": "rows.csv"}}
    write(here, tune, {"prune": {"sparsity": 0.5, "exclude": ["score.*"]}}, model="lm")
    assert check_recipe("r.yaml")["steps"][1]["notes"] == [
        "score.*: matches no tensor yet; the new head may give it one"
    ]


def test_a_hub_id_is_not_downloaded_and_offline_it_is_exit_8(
    here: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(here / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    write(here, {"prune": {"sparsity": 0.5}}, model="org/name")
    failed(cli("recipe", "check", "r.yaml"), 8)
    write(here, {"finetune": TUNE}, data="org/rows")
    assert check_recipe("r.yaml")["steps"][0]["notes"] == [
        "data org/rows: not in the local cache; `run` downloads it"
    ]


# Every recipe that is shipped, with small local models of its kind

RECIPES = [*sorted((ROOT / "recipes").glob("*.yaml")), BUNDLED.parent / "demo.yaml"]


@pytest.fixture
def stand_ins(tiny_bert: Path, table: Path, tmp_path: Path) -> dict[str, dict[str, str]]:
    """By recipe, a model and data to `--set`, of the kind that it is for."""
    import torch

    state = built(
        tmp_path / "net.py", (ROOT / "recipes" / "resnet20.py").read_text() + "build = resnet20\n", seed=1
    )
    torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, tmp_path / "r.th")
    (tmp_path / "images").mkdir()
    for split in ("train", "test"):
        pixels = np.zeros((20, 32, 32, 3), np.uint8)
        np.savez(tmp_path / "images" / f"{split}.npz", x=pixels, y=np.arange(20) % 10)
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time. " * 400)
    return {
        "minilm-sst2.yaml": {"model": str(tiny_bert), "data": str(table)},
        "resnet20-cifar10.yaml": {"model": str(tmp_path / "r.th"), "data": str(tmp_path / "images")},
        "stories260k-shakespeare.yaml": {"data": str(text)},
    }


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_shipped_recipe_checks_with_local_models(
    recipe: Path, stand_ins: dict[str, dict[str, str]], tmp_path: Path, cli: Cli
) -> None:
    given = stand_ins.get(recipe.name, {}) | {"out": str(tmp_path / "made")}
    words = [word for key, value in given.items() for word in ("--set", f"{key}={value}")]
    ran = cli("recipe", "check", recipe, *words)
    assert (ran.rc, ran.stderr) == (0, "") and f"{recipe.name}: ok" in ran.stdout
    assert not (tmp_path / "made").exists()


HEADED: dict[str, tuple[dict[str, Any], ...]] = {
    "report": ({"report": {"min_sparsity": 0.5}},),
    "report with patterns": ({"report": {"exclude": ["classifier.*"], "min_sparsity": "bert.*.weight=0.1"}},),
    "prune and recover": (
        {"prune": {"sparsity": 0.5, "exclude": ["classifier.*"]}},
        {"recover": {"task": HEAD["task"]}},
        {"pack": {}},
        {"report": {"base": "tuned"}},
        {"verify": {}},
    ),
}


@pytest.mark.parametrize("steps", HEADED.values(), ids=HEADED.keys())
def test_steps_after_one_that_adds_a_head_count_what_the_step_before_them_chose(
    steps: tuple[dict[str, Any], ...], tiny_bert: Path, table: Path, here: Path
) -> None:
    tune = {"finetune": {**HEAD, "out": "tuned"}}
    write(here, tune, *steps, model=str(tiny_bert), data=str(table))
    found = [each["prunable_weights"] for each in check_recipe("r.yaml")["steps"]]
    assert {number for number in found if number is not None} == {found[0]} and found[0] > 1000


def test_the_report_of_a_recipe_compares_with_the_table_that_was_cut(tmp_path: Path, cli: Cli) -> None:
    import torch

    state = {"a.weight": torch.arange(1.0, 92).reshape(7, 13)}
    torch.save({"params": state, "params_ema": {"a.weight": torch.ones(7, 13)}}, tmp_path / "net.pth")
    recipe = tmp_path / "r.yaml"
    cut = {"prune": {"sparsity": 0.5, "key": "params"}}
    recipe.write_text(json.dumps({"model": "net.pth", "out": "made", "steps": [cut, {"report": {}}]}))
    for command in (("recipe", "check"), ("run",)):
        ran = cli(
            *command, recipe, "--set", f"model={tmp_path / 'net.pth'}", "--set", f"out={tmp_path / 'made'}"
        )
        assert ran.rc == 0, ran.stderr
    assert "45 set to zero" in ran.stdout + ran.stderr
    cut["prune"]["key"] = "other"
    recipe.write_text(json.dumps({"model": "net.pth", "out": "made", "steps": [cut]}))
    given = ["--set", f"model={tmp_path / 'net.pth'}", "--set", f"out={tmp_path / 'again'}"]
    assert cli("recipe", "check", recipe, *given).rc == 2
