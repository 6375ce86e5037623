"""A report beside a BASE whose names lack, or have, the prefix of a class with a head."""

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from junitparser import JUnitXml
from safetensors.numpy import load_file, save_file
from support.cli import Ran, failed
from support.files import ROOT, tiny_arrays
from support.models import BUNDLED, built

from lpsparse import prune, report
from lpsparse.checkpoint.open import open_checkpoint
from lpsparse.cli import github
from lpsparse.reporting.html.page import render
from lpsparse.reporting.matching import match
from lpsparse.reporting.records import Report
from lpsparse.reporting.summary import alerts

Cli = Callable[..., Ran]
Arrays = dict[str, np.ndarray]
HEAD: Arrays = {"classifier.weight": np.ones((2, 7), np.float32), "classifier.bias": np.ones(2, np.float32)}


def body(seed: int = 0) -> Arrays:
    """A base model without a head: its names have no prefix."""
    draw = np.random.default_rng(seed)
    shapes = {"embeddings.word.weight": (11, 7), "pooler.dense.weight": (7, 7), "pooler.dense.bias": (7,)}
    for i in range(3):
        shapes |= {f"encoder.layer.{i}.mlp.weight": (13, 7), f"encoder.layer.{i}.LayerNorm.weight": (7,)}
    return {name: draw.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def cut(arrays: Arrays) -> Arrays:
    return {
        name: np.where(np.abs(value) < 0.5, 0, value).astype(np.float32) if "mlp" in name else value
        for name, value in arrays.items()
    }


def prefixed(arrays: Arrays, prefix: str = "bert.") -> Arrays:
    return {prefix + name: value for name, value in arrays.items()}


def saved(path: Path, arrays: Arrays, **config: Any) -> Path:
    """A folder, with a config.json where something of it is given."""
    path.mkdir()
    save_file(
        {name: np.ascontiguousarray(value) for name, value in arrays.items()}, path / "model.safetensors"
    )
    if config:
        (path / "config.json").write_text(json.dumps(config))
    return path


def without(arrays: Arrays, *parts: str) -> Arrays:
    return {name: value for name, value in arrays.items() if not any(part in name for part in parts)}


def beside(tmp_path: Path, result: Arrays, base: Arrays, **options: Any) -> Report:
    return report(saved(tmp_path / "result", result), saved(tmp_path / "base", base), **options)


CUT = sum(int((value == 0).sum()) for value in cut(body()).values())
OLD = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): value for name, value in body().items()}
MLM: Arrays = {"cls.predictions.bias": np.ones(11, np.float32)}
# Result, BASE, and what BASE has that the result has no place for.
PAIRS: dict[str, tuple[Arrays, Arrays, set[str]]] = {
    "a head is new": (prefixed(cut(body())) | HEAD, body(), set()),
    "a base model of a headed one": (cut(body()), prefixed(body()) | HEAD, set(HEAD)),
    "another head": (prefixed(cut(body())) | HEAD, prefixed(body()) | MLM, set(MLM)),
    "no pooler": (
        prefixed(without(cut(body()), "pooler")) | HEAD,
        body(),
        {"pooler.dense.weight", "pooler.dense.bias"},
    ),
    "a pooler that is carried over": (
        prefixed(without(cut(body()), "pooler"))
        | HEAD
        | {name: value for name, value in body().items() if "pooler" in name},
        body(),
        set(),
    ),
    "old names of norms": (prefixed(cut(body())) | HEAD, OLD, set()),
    "a wrapper": (prefixed(cut(body())) | HEAD, prefixed(body(), "module."), set()),
    "a head for other labels": (
        prefixed(cut(body())) | HEAD,
        prefixed(body()) | HEAD | {"classifier.weight": np.ones((5, 7), np.float32)},
        {"classifier.weight"},
    ),
}


@pytest.mark.parametrize(("result", "base", "left"), PAIRS.values(), ids=PAIRS.keys())
def test_changes_are_counted_across_a_prefix_and_no_head_is_an_alarm(
    result: Arrays, base: Arrays, left: set[str], tmp_path: Path
) -> None:
    found = beside(tmp_path, result, base, min_sparsity=0.1, max_bytes="1GB")
    changes = [row.change for row in found.tensors if row.change is not None]
    assert found.base is not None and sum(change.cut for change in changes) == CUT > 0
    assert set(found.base.left_behind) == left and alerts(found) == ()
    assert found.base.prunable.weights >= found.prunable.weights - HEAD["classifier.weight"].size
    page = render(found)
    assert "is the largest that was cut" in page and "No finite weight" not in page
    assert len(found.budgets) == 2 and github.annotations(found) == []


LOST: dict[str, tuple[Arrays, Arrays, set[str]]] = {
    "a layer": (
        prefixed(without(cut(body()), "layer.2")) | HEAD,
        body(),
        {"encoder.layer.2.mlp.weight", "encoder.layer.2.LayerNorm.weight"},
    ),
    "the embedding": (prefixed(without(cut(body()), "embed")) | HEAD, body(), {"embeddings.word.weight"}),
    "the head of its class": (prefixed(cut(body())), prefixed(body()) | HEAD, set(HEAD)),
    "a layer of a headed one": (
        without(cut(body()), "layer.0.mlp"),
        prefixed(body()) | HEAD,
        {"bert.encoder.layer.0.mlp.weight"},
    ),
}


@pytest.mark.parametrize(("result", "base", "lost"), LOST.values(), ids=LOST.keys())
def test_what_a_model_needs_and_has_not_is_an_alarm_in_every_view_and_no_budget(
    result: Arrays, base: Arrays, lost: set[str], tmp_path: Path, cli: Cli
) -> None:
    model, other = saved(tmp_path / "result", result), saved(tmp_path / "base", base)
    views = {view: tmp_path / f"a.{view}" for view in ("markdown", "comment", "junit", "html", "json")}
    files = [word for view, path in views.items() for word in (f"--{view}", path)]
    ran = cli(
        "report",
        model,
        other,
        "--max-bytes",
        "1GB",
        "--min-sparsity",
        "0.9",
        "--warn",
        "min-sparsity",
        *files,
    )
    found = report(model, other, max_bytes="1GB")
    (alert,) = alerts(found)
    assert {name for name, _ in alert.tensors} == lost and ran.rc == 0
    assert "1 of 2 budgets warns" in ran.stdout and "of BASE" in ran.stdout
    text = {view: path.read_text() for view, path in views.items()}
    assert (
        all(min(lost) in shown for shown in text.values()) and len(json.loads(text["json"])["budgets"]) == 2
    )
    suite = next(iter(JUnitXml.fromfile(str(views["junit"]))))
    assert [case.name for case in suite if case.classname == "lpsparse.budgets"] == [
        "min-sparsity",
        "max-bytes",
    ]
    assert (
        suite.failures == 0 and "1 of 2 budgets warns" in text["markdown"] and "2 budgets" not in text["html"]
    )
    (line,) = github.annotations(found)
    assert line.startswith("::warning title=lpsparse%3A tensors of BASE::") or "tensors of BASE" in line


def test_a_pooler_that_the_class_has_no_place_for_is_told_by_config_json(tmp_path: Path) -> None:
    heads = prefixed(body()) | MLM
    base = saved(tmp_path / "base", heads, architectures=["BertForPreTraining"])
    lacks = without(heads, "pooler")
    for name, classes, told in (("a", ["BertForMaskedLM"], 0), ("b", ["BertForPreTraining"], 1)):
        assert len(alerts(report(saved(tmp_path / name, lacks, architectures=classes), base))) == told


MLP: Arrays = {"mlp.weight": body()["encoder.layer.0.mlp.weight"]}
POOLER: Arrays = {name: value for name, value in body().items() if "pooler" in name}
OTHERS: Arrays = {f"x{i}.weight": np.ones((3, 5), np.float32) for i in range(20)}
NO_PREFIX: dict[str, tuple[Arrays, Arrays]] = {
    "two prefixes": (prefixed(body(), "encoder.") | prefixed(body(1), "decoder."), body()),
    "other shapes": (prefixed({name: value[:3] for name, value in body().items()}), body()),
    "one tensor": (prefixed(MLP), MLP),
    "integers": (prefixed({name: value.astype(np.int32) for name, value in body().items()}), body()),
    "a small part": (prefixed(OTHERS | POOLER), body()),
}


@pytest.mark.parametrize(("result", "base"), NO_PREFIX.values(), ids=NO_PREFIX.keys())
def test_a_prefix_that_is_not_clear_matches_nothing(
    result: Arrays, base: Arrays, tmp_path: Path, cli: Cli
) -> None:
    model, other = saved(tmp_path / "result", result), saved(tmp_path / "base", base)
    assert match(open_checkpoint(model), open_checkpoint(other)).names == {}
    assert "not comparable" in failed(cli("report", model, other), 3)


def test_names_that_match_as_they_are_need_no_prefix(tmp_path: Path) -> None:
    nested = body() | {f"encoder.{name}": value for name, value in body().items()}
    found = match(*(open_checkpoint(saved(tmp_path / name, nested)) for name in "ab"))
    assert found.names == {name: name for name in nested} and found.prefix_here == ""


def test_patterns_of_the_result_need_not_match_base(tmp_path: Path) -> None:
    found = beside(tmp_path, prefixed(cut(body())) | HEAD, body(), include=("bert.encoder.*", "classifier.*"))
    assert found.base is not None
    assert found.prunable.weights - found.base.prunable.weights == sum(value.size for value in HEAD.values())


def test_where_nothing_was_cut_or_compared_no_view_says_otherwise(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", body())
    assert "No weight that is not zero in BASE is zero here" in render(report(base, base))
    kept = {name: np.zeros_like(value) if "embed" in name else value for name, value in body().items()}
    page = render(report(saved(tmp_path / "kept", kept), base))
    assert "77 weights cut, none of them prunable and finite in BASE" in page
    whole = {name: value.astype(np.int32) for name, value in body().items()}
    saved(tmp_path / "a", whole | {"z.weight": np.ones((2, 3), np.float32)})
    saved(tmp_path / "b", whole | {"z.weight": np.ones((3, 2), np.float32)})
    found = report(tmp_path / "a", tmp_path / "b")
    assert "No tensor was compared" in render(found) and not any(row.change for row in found.tensors)


def test_verify_compares_with_a_source_across_a_prefix(tmp_path: Path, cli: Cli) -> None:
    prune(saved(tmp_path / "base", prefixed(body())), tmp_path / "cut", sparsity=0.5)
    other = saved(tmp_path / "other", body())
    assert cli("verify", tmp_path / "cut", other).rc == 0
    moved = saved(tmp_path / "moved", body(1))
    ran = cli("verify", tmp_path / "cut", moved)
    assert ran.rc == 1 and "values are neither" in ran.stdout and "missing" not in ran.stdout
    lacks = saved(tmp_path / "lacks", without(body(), "layer.1.mlp"))
    ran = cli("verify", tmp_path / "cut", lacks)
    assert ran.rc == 1 and "bert.encoder.layer.1.mlp.weight: not in lacks" in ran.stdout
    assert ran.stdout.count("\n  ") == 1


# What finetune, prune, pack and unpack print as `next:`, by the kinds of model that the recipes are for


def llama(folder: Path) -> Path:
    shutil.copytree(BUNDLED, folder)
    return folder


def headless(folder: Path) -> Path:
    """A base model: LlamaModel's names have no `model.`, and there is no head."""
    llama(folder)
    state = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("model."): value for name, value in without(state, "lm_head").items()}
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["LlamaModel"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def resnet(folder: Path) -> Path:
    import torch

    folder.mkdir()
    state = built(
        folder / "net.py", (ROOT / "recipes" / "resnet20.py").read_text() + "build = resnet20\n", seed=1
    )
    torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, folder / "net.th")
    np.savez(folder / "x.npz", x=np.zeros((12, 32, 32, 3), np.uint8), y=np.arange(12) % 10)
    return folder / "net.th"


def following(ran: Ran) -> list[str]:
    """The words of the command that is printed after `next:`."""
    assert ran.rc == 0, ran.stderr
    (line,) = [line for line in ran.stderr.splitlines() if "next: " in line]
    return shlex.split(line.partition("next: lpsparse ")[2])


FEW = ["--steps", "2", "--max-length", "16", "--batch-size", "4", "--threads", "1"]
CLASSES = ["--task", "text-classification", "--data", "rows.jsonl"]
IMAGES = ["--task", "image-classification", "--data", "m/x.npz", "--model-fn", "m/net.py:build"]
TEXT = ["--task", "causal-lm", "--data", "bundled:shakespeare", "--split", "train[:2000]"]
KINDS: dict[str, tuple[Callable[[Path], Path], list[str], list[str]]] = {
    "llama": (llama, TEXT, []),
    "llama without a head": (headless, CLASSES, []),
    "resnet": (resnet, IMAGES, []),
}


@pytest.mark.parametrize("kind", ["bert", *KINDS])
def test_the_command_that_is_printed_as_next_ends_without_a_warning(
    kind: str, tiny_bert: Path, table: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    monkeypatch.chdir(table.parent)
    bert = (lambda folder: Path(shutil.copytree(tiny_bert, folder)), CLASSES, ["--exclude", "*pooler*"])
    make, words, kept = KINDS.get(kind, bert)
    model = make(Path("m"))
    commands = [
        ["finetune", model, "tuned", *words, *FEW, *kept, "--target-sparsity", "0.5"],
        ["prune", "tuned", "cut", *kept, "--sparsity", "0.6"],
        ["finetune", "cut", "back", *words, *FEW, *kept, "--method", "dense", "--keep-zeros"],
        ["pack", "back", "packed"],
        ["unpack", "packed", "dense"],
        ["prune", model, "bare", "--sparsity", "0.5", "--scope", "tensor"],
    ]
    for command in commands:
        then = following(cli(*command))
        ran = cli(*then)
        assert ran.rc == 0 and "warning" not in ran.stdout.lower() + ran.stderr.lower(), then
        assert "  vs base  " in ran.stdout and then[0] == "report" and len(then) == 3
    for first in ("tuned", "cut"):  # and beside the model that all began with
        ran = cli("report", first, model)
        assert "warning" not in ran.stdout and "  cut  " in ran.stdout


def test_tiny_arrays_are_not_taken_for_a_prefix(tmp_path: Path) -> None:
    found = beside(tmp_path, tiny_arrays(1), tiny_arrays())
    assert found.base is not None and found.base.only_here == found.base.only_there == ()


def test_a_head_that_is_lost_of_the_same_class_is_an_alarm_also_where_a_config_says_tied(
    tmp_path: Path,
) -> None:
    """transformers writes tie_word_embeddings into the config of classifiers, too."""
    head = {"classifier.weight": np.ones((3, 7), np.float32), "classifier.bias": np.ones(3, np.float32)}
    config = {
        "architectures": ["BertForSequenceClassification"],
        "tie_word_embeddings": True,
        "vocab_size": 29,
    }
    base = saved(tmp_path / "base", prefixed(body()) | head, **config)
    (alert,) = alerts(report(saved(tmp_path / "lost", prefixed(body()), **config), base))
    assert {name for name, _ in alert.tensors} == set(head)


def test_a_projection_that_is_tied_to_the_embedding_is_not_missed(tmp_path: Path) -> None:
    words = {"embed.weight": np.ones((29, 7), np.float32), "layers.0.weight": np.ones((7, 7), np.float32)}
    config = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True, "vocab_size": 29}
    base = saved(tmp_path / "base", words | {"lm_head.weight": words["embed.weight"]}, **config)
    found = report(saved(tmp_path / "tied", words, **config), base)
    assert alerts(found) == () and found.base is not None and found.base.left_behind == ("lm_head.weight",)
