"""Quality after a cut: measured beside the dense model, recorded in the folder, and gated."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.cli import ERROR, Ran, failed
from support.files import tree_hash
from support.models import BUNDLED

import lpsparse
from lpsparse import ExitCode, LpsparseError
from lpsparse.checkpoint.manifest import read_manifest
from lpsparse.recipes.file import read_recipe
from lpsparse.recipes.plan import planned
from lpsparse.reporting.history import read_report
from lpsparse.steps.finetune import EvalStep

Cli = Callable[..., Ran]
LM = "bundled:stories260k"
ON: dict[str, Any] = {
    "data": "bundled:shakespeare",
    "split": "validation[:2000]",
    "task": "causal-lm",
    "max_length": 32,
}
WORDS = ["--data", ON["data"], "--split", ON["split"], "--task", ON["task"], "--max-length", "32"]
TRAIN: dict[str, Any] = {"task": "text-classification", "max_length": 16, "steps": 2, "lr": 1e-3}


@pytest.fixture
def half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    lpsparse.prune(LM, "half", sparsity=0.5)
    return tmp_path / "half"


@pytest.fixture(scope="module")
def classifier(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that finetune wrote, of a table whose columns have names of their own."""
    folder = tmp_path_factory.mktemp("classifier")
    rows = [("a fine film", "good"), ("far too long", "bad")] * 6
    (folder / "t.csv").write_text("words,mood\n" + "".join(f"{text},{label}\n" for text, label in rows))
    fields = {"text_field": "words", "label_field": "mood"}
    lpsparse.finetune(tiny_bert, folder / "tuned", data=str(folder / "t.csv"), **TRAIN, **fields)
    (folder / "dev.csv").write_text("words,mood\na fine one,good\ntoo long,bad\nlong,bad\n")
    return folder


def test_a_cut_is_gated_by_what_eval_saved_of_it_and_of_the_dense_model(half: Path, cli: Cli) -> None:
    assert cli("report", half, "--max-quality-drop", "9").rc == 1  # nothing is recorded yet
    ran = cli("eval", half, *WORDS, "--against", LM, "--save")
    assert ran.rc == 0 and "±" in ran.stdout and f"next: lpsparse report {half} {LM}" in ran.stderr
    assert cli("verify", half).rc == 0
    assert cli("report", half, "--max-quality-drop", "9").rc == 0
    assert cli("report", half, LM, "--max-quality-drop", "0.01").rc == 1
    assert cli("report", half / "report.json", "--max-quality-drop", "9").rc == 0
    (found,) = lpsparse.report(half).quality
    assert found.before is not None and found.before < found.after and found.before_of == LM
    assert (
        found.before_error
        and found.after_error
        and (found.task, found.data) == ("causal-lm", "validation.txt")
    )


def test_what_is_recorded_is_what_was_measured(half: Path) -> None:
    dense = lpsparse.evaluate(LM, **ON)
    found = lpsparse.evaluate(half, against=LM, save=True, **ON)
    recorded = read_manifest(half).quality[0]
    assert found["before_loss"] == dense["loss"] == recorded.before
    assert (found["loss"], found["loss_error"]) == (recorded.after, recorded.after_error)
    assert found["saved"] == str(half) and "saved" not in dense and recorded.rows == found["tokens"]
    assert (
        read_report(half).quality == (recorded,) and "before (of bundled" in (half / "README.md").read_text()
    )


def test_saving_again_replaces_the_figure_of_the_same_data_and_keeps_its_before(half: Path) -> None:
    lpsparse.evaluate(half, against=LM, save=True, **ON)
    first, before = tree_hash(half), read_manifest(half).quality
    lpsparse.evaluate(half, save=True, **ON)
    assert tree_hash(half) == first and read_manifest(half).quality == before
    other = ON | {"split": "validation[2000:4000]"}
    lpsparse.evaluate(half, save=True, **other)
    kept = read_manifest(half).quality
    assert kept[:1] == before and len({each.data_sha256 for each in kept}) == len(kept) == 2
    assert lpsparse.report(half, max_quality_drop="9").passed  # the one that has a before decides


def test_eval_and_finetune_know_the_same_data_by_one_hash(
    classifier: Path, tiny_bert: Path, tmp_path: Path
) -> None:
    shutil.copytree(classifier / "tuned", tmp_path / "base")
    fields = {"text_field": "words", "label_field": "mood"}
    options = {**TRAIN, **fields, "data": str(classifier / "t.csv"), "eval_data": str(classifier / "dev.csv")}
    lpsparse.finetune(tmp_path / "base", tmp_path / "out", **options)
    recorded = read_manifest(tmp_path / "out").quality
    lpsparse.evaluate(tmp_path / "out", data=str(classifier / "dev.csv"), save=True)
    again = read_manifest(tmp_path / "out").quality
    assert len(again) == 1 and again[0].data_sha256 == recorded[0].data_sha256
    assert (again[0].before, again[0].after) == (recorded[0].before, recorded[0].after)
    lpsparse.evaluate(tmp_path / "base", data=str(classifier / "dev.csv"), save=True)
    beside = lpsparse.report(tmp_path / "out", tmp_path / "base").quality  # each has a record of its own
    assert beside[0].of_base == "base"


def failed_late(ran: Ran, rc: int) -> str:
    """The two lines of an error that comes after the first stages were told."""
    assert ran.rc == rc and ran.stdout == "", ran.stderr
    *stages, first, second = ran.stderr.splitlines(keepends=True)
    assert ERROR.fullmatch(first + second) and not any("error" in line for line in stages), ran.stderr
    return first + second


def test_task_and_fields_come_from_the_manifest_and_flags_win(
    classifier: Path, tmp_path: Path, cli: Cli
) -> None:
    model, data = classifier / "tuned", classifier / "dev.csv"
    ran = cli("eval", model, "--data", data)
    assert ran.rc == 0 and "text-classification" in ran.stdout and "accuracy" in ran.stdout
    lpsparse.prune(model, tmp_path / "cut", sparsity=0.5, exclude=["*pooler*"])  # and through later steps
    lpsparse.pack(tmp_path / "cut", tmp_path / "packed")
    assert cli("eval", tmp_path / "packed", "--data", data).rc == 0
    assert "no field 'text'" in failed_late(cli("eval", model, "--data", data, "--text-field", "text"), 3)
    assert failed_late(cli("eval", model, "--data", data, "--task", "causal-lm"), 3)


@pytest.mark.parametrize("model", [LM, "half"])
def test_without_a_task_anywhere_it_is_said_to_be_missing(model: str, half: Path, cli: Cli) -> None:
    said = failed(cli("eval", model, "--data", "bundled:shakespeare"), 2)
    assert "LPS203" in said and "--task is needed" in said


def test_settings_in_a_manifest_are_checked_like_flags(classifier: Path, tmp_path: Path, cli: Cli) -> None:
    shutil.copytree(classifier / "tuned", tmp_path / "odd")
    table = json.loads((tmp_path / "odd" / "lpsparse.json").read_text())
    table["recipe"]["finetune"]["max_length"] = "many"
    (tmp_path / "odd" / "lpsparse.json").write_text(json.dumps(table))
    said = failed(cli("eval", tmp_path / "odd", "--data", classifier / "dev.csv"), 2)
    assert "lpsparse.json" in said and "max_length" in said


def test_a_packed_folder_holds_the_figure_and_steps_that_keep_weights_carry_it(half: Path) -> None:
    lpsparse.pack(half, "packed")
    lpsparse.evaluate("packed", against=LM, save=True, **ON)
    assert lpsparse.verify("packed")["ok"] and lpsparse.report("packed", max_quality_drop="9").passed
    lpsparse.unpack("packed", "dense")
    assert read_manifest(Path("dense")).quality == read_manifest(Path("packed")).quality
    lpsparse.prune("dense", "more", sparsity=0.9)  # of other weights it would be a lie
    assert read_manifest(Path("more")).quality == ()


def test_a_figure_of_weights_that_changed_since_is_refused(half: Path, cli: Cli) -> None:
    lpsparse.evaluate(half, against=LM, save=True, **ON)
    data = bytearray((half / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (half / "model.safetensors").write_bytes(data)
    for words in (("report", half, "--max-quality-drop", "9"), ("eval", half, *WORDS, "--save")):
        assert "LPS352" in failed(cli(*words), 3)


@pytest.mark.parametrize("model", [LM, "plain", "plain/model.safetensors"])
def test_a_model_that_lpsparse_did_not_write_is_never_written_to(model: str, half: Path, cli: Cli) -> None:
    shutil.copytree(BUNDLED, "plain")
    before = tree_hash(Path("plain"))
    said = failed(cli("eval", model, *WORDS, "--save"), 4)
    assert "LPS415" in said and "--against MODEL --save" in said and tree_hash(Path("plain")) == before


def test_a_folder_in_the_hubs_cache_is_never_written_to(
    half: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    cached = half.parent / "cache" / "models--a--b" / "snapshots" / ("0" * 40)
    cached.parent.mkdir(parents=True)
    half.rename(cached)
    monkeypatch.setenv("HF_HUB_CACHE", str(half.parent / "cache"))
    assert "LPS415" in failed(cli("eval", cached, *WORDS, "--save"), 4)


def test_a_folder_that_cannot_be_written_is_exit_4_before_anything_is_measured(
    half: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    monkeypatch.setattr("lpsparse.training.quality.evaluate", None)
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode & os.W_OK == 0 and access(path, mode))
    assert "LPS404" in failed(cli("eval", half, *WORDS, "--save"), 4)


def test_a_disk_that_fails_while_it_is_recorded_leaves_the_folder_as_it_was(
    half: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    before = tree_hash(half)

    def full(path: Path, text: str) -> None:
        path.write_text(text[:10])
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("lpsparse.checkpoint.files.write_text", full)
    assert "No space left" in failed_late(cli("eval", half, *WORDS, "--save"), 4)
    assert tree_hash(half) == before


def test_a_dry_run_measures_and_writes_nothing(half: Path, cli: Cli) -> None:
    before = tree_hash(half)
    ran = cli("eval", half, *WORDS, "--against", LM, "--save", "--dry-run", "--json")
    found = json.loads(ran.stdout)
    assert ran.rc == 0 and found["saved"] is None and found["before_loss"] < found["loss"]
    assert tree_hash(half) == before and "nothing is written" in ran.stderr
    assert "--dry-run needs --save" in failed(cli("eval", half, *WORDS, "--dry-run"), 2)


def test_two_models_that_read_other_rows_are_not_compared(half: Path, cli: Cli) -> None:
    shutil.copytree(BUNDLED, "short")
    config = json.loads((Path("short") / "config.json").read_text()) | {"max_position_embeddings": 7}
    (Path("short") / "config.json").write_text(json.dumps(config))
    before = tree_hash(half)
    ran = cli("eval", half, *WORDS, "--against", "short", "--save")
    assert ran.rc == 3 and tree_hash(half) == before


def test_a_card_that_somebody_edited_stays_and_still_does_not_verify(half: Path) -> None:
    (half / "README.md").write_text("my own words\n")
    lpsparse.evaluate(half, save=True, **ON)
    assert (half / "README.md").read_text() == "my own words\n" and len(read_manifest(half).quality) == 1
    assert [text.partition(":")[0] for text in lpsparse.verify(half)["problems"]] == ["README.md"]


def test_what_was_recorded_is_in_the_card_as_the_hub_reads_it(classifier: Path, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    lpsparse.prune(classifier / "tuned", tmp_path / "cut", sparsity=0.5, exclude=["*pooler*"])
    data = str(classifier / "dev.csv")
    lpsparse.evaluate(tmp_path / "cut", data=data, against=str(classifier / "tuned"), save=True)
    results = ModelCard((tmp_path / "cut" / "README.md").read_text()).data.eval_results
    assert results is not None and {each.dataset_name for each in results} == {"dev.csv"}
    assert {each.task_type for each in results} == {"text-classification"} and len(results) == 2


def test_a_baseline_is_compared_on_the_data_that_both_have(half: Path) -> None:
    other = ON | {"split": "validation[2000:4000]"}
    shutil.copytree(half, "main")
    lpsparse.evaluate("main", save=True, **ON)
    lpsparse.evaluate("main", save=True, **other)
    lpsparse.evaluate(half, save=True, **other)
    found = lpsparse.report(half, baseline="main")
    assert found.passed and [each.name for each in found.budgets].count("loss of baseline") == 1
    shutil.rmtree("main")
    lpsparse.prune(LM, "main", sparsity=0.5)
    lpsparse.evaluate("main", save=True, **ON)
    with pytest.raises(LpsparseError, match="measured on other data") as caught:
        lpsparse.report(half, baseline="main")
    assert caught.value.exit_code == ExitCode.INPUT


def test_an_eval_for_another_task_takes_nothing_of_the_fine_tune_before_it(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    tune = "finetune: {task: text-classification, max_length: 16, text_field: words}"
    steps = f"steps: [{tune}, eval: {{}}, eval: {{task: causal-lm}}]"
    path.write_text(f"model: m\ndata: d\nout: o\n{steps}\n")
    found = [link.step for link in planned(read_recipe(path, {}), {}, path)][1:]
    told = [(step.task, step.max_length, step.text_field) for step in found if isinstance(step, EvalStep)]
    assert told == [("text-classification", 16, "words"), ("causal-lm", 128, None)]


RECIPE = """
model: {model}
data: t.csv
out: made
steps:
  - finetune: {{out: dense, method: dense, task: text-classification, max_length: 16, steps: 2,
               text_field: words, label_field: mood}}
  - prune: {{out: sparse, sparsity: 0.5, exclude: ["*pooler*"]}}
  - eval: {{data: dev.csv, against: dense, save: true}}
  - report: {{max_quality_drop: 1}}
"""


def test_a_recipe_saves_and_gates_and_is_finished_when_it_runs_again(
    classifier: Path, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("t.csv", "dev.csv"):
        shutil.copy(classifier / name, name)
    Path("r.yaml").write_text(RECIPE.format(model=tiny_bert))
    assert cli("recipe", "check", "r.yaml").rc == 0
    done = lpsparse.run("r.yaml")
    assert done[2].result["before_accuracy"] is not None and done[3].result.passed  # type: ignore[index, union-attr]
    again = lpsparse.run("r.yaml")
    assert [each.skipped for each in again] == [True, True, False, False]
    assert lpsparse.verify("made/sparse")["ok"]
    Path("s.yaml").write_text("model: made/sparse\ndata: dev.csv\nout: b\nsteps: [eval: {save: true}]\n")
    assert cli("recipe", "check", "s.yaml").rc == 0  # the task stands in its manifest
    assert "LPS415" in failed(cli("recipe", "check", "s.yaml", "--set", f"model={tiny_bert}"), 4)
    Path("s.yaml").write_text(f"model: {tiny_bert}\ndata: dev.csv\nout: b\nsteps: [eval: {{}}]\n")
    assert "--task is needed" in failed(cli("recipe", "check", "s.yaml"), 2)


def test_a_figure_beside_a_model_that_was_cut_gates_nothing(half: Path, cli: Cli) -> None:
    lpsparse.prune("half", "more", sparsity=0.6)
    ran = cli("eval", "more", *WORDS, "--against", "half", "--save")
    assert ran.rc == 0 and "half was cut already" in ran.stderr
    gated = lpsparse.report("more", max_quality_drop="90%")
    assert not gated.passed and gated.budgets[0].value is None
    assert cli("eval", "more", *WORDS, "--against", LM, "--save").rc == 0
    assert lpsparse.report("more", max_quality_drop="90%").budgets[0].value is not None
