"""Recipes: what a step takes, recovery, the resolved recipe, the schema, and what is refused."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from support.cli import BROKEN, Ran, cli_environment, failed
from support.files import ROOT, tree_hash
from support.models import SMALL

import lpsparse
from lpsparse import LpsparseError
from lpsparse.commands.results import Verification
from lpsparse.recipes import run
from lpsparse.recipes.file import read_recipe
from lpsparse.recipes.outputs import RESOLVED, resolved
from lpsparse.recipes.plan import Link, planned, trained_from
from lpsparse.reporting.records import Report

Cli = Callable[..., Ran]
RECOVER = {**SMALL, "threads": 1}


def write(path: Path, *steps: dict[str, Any], **top: Any) -> Path:
    path.write_text(yaml.safe_dump({"model": "tiny", "out": "made", **top, "steps": list(steps)}))
    return path


@pytest.fixture
def here(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tiny.parent)
    return tiny.parent


def links_of(path: Path, **overrides: str) -> list[Link]:
    changes = {key.replace("__", "."): value for key, value in overrides.items()}
    return planned(read_recipe(path, changes), changes, path)


# What a step takes


def test_a_step_may_take_the_result_of_an_earlier_step_by_its_name(here: Path) -> None:
    steps = ({"prune": {"sparsity": 0.5, "out": "half"}}, {"prune": {"sparsity": 0.8, "out": "most"}})
    branch = {"pack": {"model": "half"}}
    found = links_of(write(here / "r.yaml", *steps, branch, {"report": {"base": "most"}}))
    assert [link.model for link in found] == ["tiny", "made/half", "made/half", "made/3-pack"]
    assert (found[3].origin, found[3].step.model_dump()["base"]) == ("tiny", "made/most")


def test_a_report_is_compared_with_the_model_that_its_own_chain_began_with(here: Path) -> None:
    steps = ({"prune": {"sparsity": 0.5}}, {"report": {}}, {"pack": {"model": "other"}}, {"report": {}})
    found = links_of(write(here / "r.yaml", *steps))
    assert [link.step.model_dump().get("base") for link in found] == [None, "tiny", None, "other"]


def test_a_model_of_a_step_that_only_looks_does_not_change_the_chain(here: Path) -> None:
    steps = ({"report": {"model": "other"}}, {"pack": {}})
    assert [link.model for link in links_of(write(here / "r.yaml", *steps))] == ["other", "tiny"]


def test_what_a_report_is_compared_with_is_said(here: Path, cli: Cli) -> None:
    write(here / "r.yaml", {"prune": {"sparsity": 0.5}}, {"report": {}})
    assert "  bytes are compared with tiny\n" in cli("run", "r.yaml").stderr
    tuned = {"finetune": {"task": "causal-lm", "data": "x", "out": "tuned", "model": "dense"}}
    found = links_of(write(here / "s.yaml", tuned, {"pack": {}}, {"report": {}}))
    assert trained_from(found[2], found) == "dense"


@pytest.mark.parametrize("out", ["half", "half/inside", "."])
def test_two_results_in_one_folder_are_refused(out: str, here: Path, cli: Cli) -> None:
    write(here / "r.yaml", {"prune": {"sparsity": 0.5, "out": "half"}}, {"pack": {"out": out}})
    assert "are inside one another" in failed(cli("run", "r.yaml"), 2)
    assert not (here / "made").exists()


def test_a_step_that_would_write_nothing_is_refused(here: Path, cli: Cli) -> None:
    write(here / "r.yaml", {"prune": {"sparsity": 0.5, "dry_run": True}}, {"pack": {}})
    assert "recipe check" in failed(cli("run", "r.yaml"), 2)


@pytest.mark.parametrize("value", ["${HOME}/m", "a${X}", "~/m", "~", "~me/m", "$HOME/m", "$HOME"])
def test_a_variable_in_a_value_is_refused_and_never_expanded(value: str, here: Path, cli: Cli) -> None:
    for model, flags in ((value, []), ("tiny", ["--set", f"out={value}"])):
        write(here / "r.yaml", {"prune": {"sparsity": 0.5}}, model=model)
        assert f"{value!r}: variables and ~ are not expanded" in failed(cli("run", "r.yaml", *flags), 2)
    assert sorted(path.name for path in here.iterdir()) == ["r.yaml", "tiny"]


@pytest.mark.parametrize("pattern", ["*weight$", "a~b", "$", "*$x*"])
def test_a_dollar_in_a_pattern_is_a_dollar(pattern: str, here: Path) -> None:
    found = links_of(write(here / "r.yaml", {"prune": {"sparsity": 0.5, "exclude": [pattern]}}))
    assert found[0].step.model_dump()["exclude"] == (pattern,)


# Recovery


def test_recover_trains_and_holds_every_zero_of_the_cut_model(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    steps = ({"prune": {"sparsity": 0.5, "out": "cut"}}, {"recover": {**RECOVER, "out": "back"}})
    write(path, *steps, {"verify": {}}, model="bundled:stories260k", out=str(tmp_path / "made"))
    done = lpsparse.run(path)
    assert isinstance(done[2].result, Verification) and done[2].result.ok
    before, after = (lpsparse.load(tmp_path / "made" / name) for name in ("cut", "back"))
    assert all(bool(((before[name] == 0) == (after[name] == 0)).all()) for name in before)
    assert any(bool((before[name] != after[name]).any()) for name in before)
    assert lpsparse.run(path)[1].skipped


def test_what_a_recovery_won_back_is_no_measure_of_what_the_cut_cost(tmp_path: Path, cli: Cli) -> None:
    steps = (
        {"finetune": {**RECOVER, "method": "dense", "out": "dense"}},
        {"prune": {"sparsity": 0.9, "out": "cut", "allow_empty": True}},
    )
    again = ({"recover": {**RECOVER, "out": "back"}}, {"report": {"base": "dense", "max-quality-drop": 0.1}})
    write(tmp_path / "r.yaml", *steps, *again, model="bundled:stories260k", out=str(tmp_path / "made"))
    done = lpsparse.run(tmp_path / "r.yaml")
    dense, recovered, report = (done[i].result for i in (0, 2, 3))
    assert isinstance(dense, Report) and isinstance(recovered, Report) and isinstance(report, Report)
    assert recovered.quality[0].of_cut
    assert report.quality[0].before == dense.quality[0].after != recovered.quality[0].before
    assert not report.budgets[0].passed and report.budgets[0].margin is not None
    alone = cli("report", tmp_path / "made" / "back", "--max-quality-drop", "5")
    assert alone.rc == 1
    assert "not recorded" in alone.stdout and "since it was cut" in alone.stdout


def test_recover_is_a_finetune_that_a_person_can_type(here: Path) -> None:
    settings = {"task": "causal-lm", "data": "text.txt", "steps": 7}
    write(here / "r.yaml", {"prune": {"sparsity": 0.5}}, {"recover": settings})
    link = links_of(here / "r.yaml", recover__lr="0.002")[1]
    line = run.command_line(link.step)
    assert line.startswith("lpsparse finetune made/1-prune made/2-recover --task causal-lm")
    assert "--method dense --keep-zeros" in line and "--lr 0.002" in line


def test_recover_holds_the_zeros_of_what_was_cut_by_patterns(here: Path) -> None:
    cut = {"sparsity": 0.5, "include": ["*embed*"], "exclude": ["*0*"]}
    settings = {"task": "causal-lm", "data": "text.txt"}
    write(here / "r.yaml", {"prune": cut}, {"pack": {}}, {"recover": settings})
    link = links_of(here / "r.yaml")[2]
    assert (link.step.model_dump()["include"], link.step.model_dump()["exclude"]) == (("*embed*",), ("*0*",))


@pytest.mark.parametrize("wrong", [{"method": "lp"}, {"keep_zeros": False}, {"target_sparsity": 0.5}])
def test_recover_does_nothing_else(wrong: dict[str, Any], here: Path, cli: Cli) -> None:
    write(here / "r.yaml", {"recover": {"task": "causal-lm", "data": "text.txt", **wrong}})
    failed(cli("run", "r.yaml"), 2)


# The resolved recipe


def folders(path: Path) -> dict[str, str]:
    return {name: digest for name, digest in tree_hash(path).items() if name != RESOLVED}


def test_the_resolved_recipe_makes_the_same_bytes_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tuned = {"finetune": {**SMALL, "steps": 4, "target_sparsity": 0.3, "lambda": 2, "out": "tuned"}}
    steps = (tuned, {"prune": {"sparsity": 0.5}}, {"pack": {}}, {"report": {"base": "tuned"}})
    write(tmp_path / "r.yaml", *steps, model="bundled:stories260k")
    lpsparse.run("r.yaml", {"finetune.lr": "0.002", "prune.sparsity": "0.50", "out": str(tmp_path / "made")})
    text = (tmp_path / "made" / RESOLVED).read_text()
    assert str(tmp_path) not in text and "lr: 0.002" in text and "lambda: 2.0" in text
    lpsparse.run(tmp_path / "made" / RESOLVED, {"out": "again"})
    assert folders(tmp_path / "again") == folders(tmp_path / "made")
    assert (tmp_path / "again" / RESOLVED).read_text().replace("out: again", "out: made") == text


def test_a_run_of_the_resolved_recipe_in_its_place_finds_everything_finished(here: Path) -> None:
    write(here / "r.yaml", {"prune": {"n_m": "2:4", "exclude": "*attn*"}}, {"pack": {"model": "tiny"}})
    with pytest.raises(LpsparseError):  # 7 columns are not made of 4
        run.run("r.yaml")
    write(here / "r.yaml", {"prune": {"below": 0.1}}, {"pack": {"model": "tiny"}}, {"verify": None})
    run.run("r.yaml")
    text = (here / "made" / RESOLVED).read_text()
    assert [each.skipped for each in run.run(here / "made" / RESOLVED)] == [True, True, False]
    assert (here / "made" / RESOLVED).read_text() == text


@pytest.mark.parametrize(("revision", "model"), [("a" * 40, f"org/name@{'a' * 40}"), (None, "org/name")])
def test_the_resolved_recipe_names_the_revision_of_a_hub_id(
    revision: str | None, model: str, here: Path
) -> None:
    write(here / "r.yaml", {"prune": {"sparsity": 0.5}}, {"report": {}})
    run.run("r.yaml")
    manifest = json.loads((here / "made/1-prune/lpsparse.json").read_text())
    manifest["source"]["revision"] = revision
    (here / "made/1-prune/lpsparse.json").write_text(json.dumps(manifest))
    read = read_recipe(here / "r.yaml", {"model": "org/name"})
    text = resolved(read, planned(read, {}, here / "r.yaml"))
    table = yaml.safe_load(text)
    assert (table["model"], table["steps"][1]["report"]["base"]) == (model, model)
    assert ("no revision is named" in text) == (revision is None)


def test_a_recipe_that_fails_leaves_no_resolved_recipe(here: Path, cli: Cli) -> None:
    write(here / "r.yaml", {"prune": {"sparsity": 0.5}}, {"report": {"base": "gone"}})
    assert cli("run", "r.yaml").rc == 3
    assert [path.name for path in (here / "made").iterdir()] == ["1-prune"]


def test_a_run_that_was_killed_in_its_second_step_goes_on_there(tmp_path: Path) -> None:
    settings = {**RECOVER, "steps": 400, "save_every": 1, "out": "back"}
    path = write(
        tmp_path / "r.yaml",
        {"prune": {"sparsity": 0.5, "out": "cut"}},
        {"recover": settings},
        model="bundled:stories260k",
    )
    words = [sys.executable, "-m", "lpsparse", "run", str(path)]
    run = subprocess.Popen(words, cwd=tmp_path, env=cli_environment(), stderr=subprocess.PIPE, text=True)
    partial = tmp_path / "made" / "back.partial"
    while not (partial / ".lpsparse-state" / "step-00000003").is_dir() and run.poll() is None:
        time.sleep(0.05)
    run.send_signal(signal.SIGKILL)
    run.communicate(timeout=60)
    first = tree_hash(tmp_path / "made" / "cut")
    words += ["--set", "recover.max_time=0.0001"]  # it stops as soon as it has gone on
    again = subprocess.run(words, cwd=tmp_path, env=cli_environment(), capture_output=True, text=True)
    assert again.returncode == 75, again.stderr
    assert "finished already: made/cut" in again.stderr and "resuming at step" in again.stderr
    assert tree_hash(tmp_path / "made" / "cut") == first


# The reports that a run keeps


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("report*"))


@pytest.mark.parametrize("change", [{"report.base": "gone"}, {"model": "gone"}, {"prune.overwrite": "false"}])
def test_a_run_that_fails_leaves_no_report_that_could_be_its_own(change: dict[str, str], here: Path) -> None:
    write(here / "r.yaml", {"report": {}}, {"prune": {"sparsity": 0.5}}, {"report": {}})
    run.run("r.yaml")
    before = (here / "made/report.json").read_bytes()
    for _ in range(2):
        with pytest.raises(LpsparseError):
            run.run("r.yaml", {"prune.sparsity": "0.3", "prune.overwrite": "true", **change})
        assert "report.json" not in kept(here / "made")
        assert (here / "made/report.json.old").read_bytes() == before
    run.run("r.yaml", {"prune.overwrite": "true"})
    assert kept(here / "made") == ["report-1.json", "report.json"]


def test_an_earlier_report_may_be_the_baseline_and_files_of_others_stay(here: Path, cli: Cli) -> None:
    steps = ({"prune": {"sparsity": 0.5}}, {"report": {}}, {"report": {}})
    run.run(write(here / "r.yaml", *steps))
    (here / "made/report-mine.json").write_text("mine")
    write(here / "r.yaml", *steps[:2], {"report": {"baseline": "made/report.json"}})
    assert cli("run", "r.yaml").rc == 0
    assert kept(here / "made") == ["report-2.json", "report-mine.json", "report.json"]


@pytest.mark.parametrize("words", [["run"], ["recipe", "check"]])
def test_a_checkpoint_keeps_its_own_report(words: list[str], here: Path, cli: Cli) -> None:
    lpsparse.prune("tiny", "cut", sparsity=0.5)
    before = tree_hash(here / "cut")
    write(here / "r.yaml", {"report": {"model": "cut"}}, out="cut")
    assert "LPS405" in failed(cli(*words, "r.yaml"), 4)
    assert tree_hash(here / "cut") == before


# The schema


def valid(recipe: Any) -> bool:
    return Draft202012Validator(lpsparse.recipe_schema()).is_valid(recipe)


def test_the_schema_is_a_schema_and_the_command_prints_it(cli: Cli) -> None:
    ran = cli("recipe", "schema")
    assert (ran.rc, ran.stderr) == (0, "")
    Draft202012Validator.check_schema(json.loads(ran.stdout))
    assert json.loads(ran.stdout) == lpsparse.recipe_schema()


@pytest.mark.parametrize(
    "path", [*sorted((ROOT / "recipes").glob("*.yaml")), ROOT / "lpsparse/bundled/demo.yaml"], ids=str
)
def test_every_recipe_fits_the_schema(path: Path) -> None:
    assert valid(yaml.safe_load(path.read_text()))


def test_what_the_reader_writes_fits_the_schema(here: Path) -> None:
    write(here / "r.yaml", {"prune": {"below": 0.1}}, {"pack": {}}, {"verify": None}, {"report": {}})
    run.run("r.yaml")
    assert valid(yaml.safe_load((here / "made" / RESOLVED).read_text()))


# Broken for the reader by what YAML alone can tell, or readable without it.
_UNSEEN = (
    "not yaml",
    "binary",
    "not utf-8",
    "object tag",
    "a date that is none",
    "nested",
    "a key twice",
    "a setting twice",
)


@pytest.mark.parametrize("name", sorted(BROKEN.keys() - set(_UNSEEN)))
def test_a_broken_recipe_does_not_fit_the_schema(name: str) -> None:
    text = BROKEN[name][0]
    assert not valid(yaml.safe_load(text))


TRAIN = {"task": "causal-lm"}
REFUSED: dict[str, dict[str, Any]] = {
    "a variable": {"prune": {"sparsity": 0.5, "out": "${X}"}},
    "no task": {"finetune": {}},
    "other task": {"finetune": {"task": "lm"}},
    "text for a rate": {"finetune": {**TRAIN, "lr": "fast"}},
    "a rate of 0": {"finetune": {**TRAIN, "lr": 0}},
    "lambda": {"finetune": {**TRAIN, "lambda": "most"}},
    "no target": {"finetune": {**TRAIN, "method": "gradual"}},
    "n_m as time": {"prune": {"n_m": 124}},
    "level": {"pack": {"level": "most"}},
    "recover lp": {"recover": {**TRAIN, "method": "lp"}},
    "recover to a target": {"recover": {**TRAIN, "target-sparsity": 0.5}},
    "no rule": {"prune": {}},
    "prune alone": {"prune": None},
    "steps as text": {"finetune": {**TRAIN, "steps": "many"}},
}


@pytest.mark.parametrize("step", REFUSED.values(), ids=REFUSED.keys())
def test_schema_and_reader_refuse_alike(step: dict[str, Any], here: Path) -> None:
    path = write(here / "r.yaml", step, data="text.txt")
    assert not valid(yaml.safe_load(path.read_text()))
    with pytest.raises(LpsparseError):
        read_recipe(path, {})


TAKEN: dict[str, dict[str, Any]] = {
    "hyphens": {"finetune": {**TRAIN, "target-sparsity": 0.5, "batch-size": 4}},
    "alias": {"finetune": {**TRAIN, "lambda": 0.1}},
    "field": {"finetune": {**TRAIN, "lambda_p": "auto"}},
    "4e-3 as YAML 1.1 has it": {"finetune": {**TRAIN, "lr": "4e-3"}},
    "no settings": {"verify": None},
    "one pattern": {"prune": {"sparsity": 0.5, "include": "*a*"}},
    "quotes": {"prune": {"sparsity": "0.80"}},
    "commas": {"eval": {**TRAIN, "mean": "0.5,0.4", "std": "1,1"}},
    "one mean": {"eval": {**TRAIN, "mean": 0.5}},
    "null": {"prune": {"sparsity": None, "n-m": "2:4"}},
    "recover": {"recover": {**TRAIN, "steps": 5}},
}


@pytest.mark.parametrize("step", TAKEN.values(), ids=TAKEN.keys())
def test_schema_and_reader_take_alike(step: dict[str, Any], here: Path) -> None:
    path = write(here / "r.yaml", step, data="text.txt")
    assert valid(yaml.safe_load(path.read_text()))
    assert len(links_of(path)) == 1


def test_every_setting_has_its_words_in_the_schema() -> None:
    steps = lpsparse.recipe_schema()["$defs"]
    settings = [each for step in steps.values() for each in step["properties"].values()]
    assert len(settings) > 100 and all(each["description"] for each in settings)
    assert steps["finetune"]["properties"]["p"]["default"] == 0.5
