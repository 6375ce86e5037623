"""Every member of the families of training, by the same tests; and members that are added from outside."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from support.cli import cli_environment
from support.models import BUNDLED, built, saved
from torch import Tensor, nn

import lpsparse
from lpsparse import LpsparseError, Sparsity, fold
from lpsparse.checkpoint.manifest import read_manifest
from lpsparse.checkpoint.open import Checkpoint
from lpsparse.commands.finetune import finetune_step
from lpsparse.families import CONDITIONINGS, METHODS, SCORES, TASKS
from lpsparse.steps.finetune import EvalStep, FinetuneStep
from lpsparse.steps.resolve import resolve
from lpsparse.training.methods import Method
from lpsparse.training.model import load_module
from lpsparse.training.scores import Score
from lpsparse.training.tasks import TaskKind
from lpsparse.training.tasks.base import Task

STEPS = 30


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(7, 13), nn.Tanh(), nn.Linear(13, 5))


def trained(**options: Any) -> tuple[nn.Sequential, Sparsity, list[int]]:
    """A run of STEPS steps: the model, the method around its loop, and its zeros after each step."""
    model, zeros = network(), list[int]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.0)
    sparsity = Sparsity(model, optimizer, steps=STEPS, include=("*.weight",), **options)
    assert all(
        torch.equal(one, two) for one, two in zip(model.parameters(), network().parameters(), strict=True)
    )
    for t in range(STEPS):
        x = torch.randn(12, 7, generator=torch.Generator().manual_seed(t))
        sparsity.before_step()
        optimizer.zero_grad()
        (model(x) - x[:, :5].sin()).square().mean().backward()
        sparsity.after_backward()
        optimizer.step()
        sparsity.after_step()
        zeros.append(sparsity.control.zeros())
    sparsity.finish()
    assert set(model.state_dict()) == set(network().state_dict())
    return model, sparsity, zeros


@pytest.mark.parametrize("name", METHODS)
def test_a_method_leaves_weights_alone_until_the_first_step_and_meets_its_target(name: str) -> None:
    method = METHODS[name]
    if method.needs_target:
        with pytest.raises(LpsparseError) as refused:
            trained(method=name)
        assert refused.value.code == "LPS204"
    else:
        assert trained(method=name)[1].control.target is None
    if method.cuts == "never":
        with pytest.raises(LpsparseError) as refused:
            trained(method=name, target_sparsity=0.5)
        assert refused.value.code == "LPS204"
        return
    _, sparsity, zeros = trained(method=name, target_sparsity=0.5)
    cut_at, asked = sparsity.control.phases.cut_at, (7 * 13 + 13 * 5) // 2
    assert len(sparsity.control.optimizer.param_groups) == 1  # as it was given
    assert zeros[cut_at - 1 :] == [asked] * (STEPS - cut_at + 1)
    assert (zeros[0] == asked) == (method.cuts == "start")


@pytest.mark.parametrize("name", SCORES)
def test_a_score_ranks_every_weight_and_changes_none(name: str) -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    model(torch.ones(3, 7)).sum().backward()
    optimizer.step()
    weights: dict[str, Tensor] = {"a": model[0].weight, "b": model[2].weight}
    before = {key: weight.detach().clone() for key, weight in weights.items()}
    scores = SCORES[name].of(weights, optimizer)
    assert {key: score.shape for key, score in scores.items()} == {"a": (13, 7), "b": (5, 13)}
    assert all((score >= 0).all() for score in scores.values())
    for score in scores.values():
        score.fill_(0.0)
    assert all(torch.equal(weights[key], before[key]) for key in weights)
    assert trained(method="gradual", score=name, target_sparsity=0.5, decay_share=0.9)[2][-1] == 78


@pytest.mark.parametrize("name", CONDITIONINGS)
def test_a_conditioning_takes_settings_of_finetune_and_leaves_an_ordinary_model(name: str) -> None:
    assert set(CONDITIONINGS[name].takes.values()) <= set(FinetuneStep.model_fields)
    model, sparsity, zeros = trained(condition=name, target_sparsity=0.5)
    assert zeros[-1] == 78 and sparsity.conditioning is not None
    assert fold(model) is model and not model._forward_pre_hooks


def text_of(folder: Path) -> Path:
    (folder / "text.txt").write_text("a plain text to learn from, again and again. " * 60)
    return folder / "text.txt"


def causal(folder: Path, bert: Path) -> dict[str, Any]:
    return {"model": BUNDLED, "data": text_of(folder)}


def masked(folder: Path, bert: Path) -> dict[str, Any]:
    config = transformers.BertConfig.from_pretrained(bert)
    model = saved(transformers.BertForMaskedLM(config), folder / "masked", bert)
    return {"model": model, "data": text_of(folder)}


def rows(folder: Path, bert: Path) -> dict[str, Any]:
    table = [{"text": text, "label": label} for text, label in (("fine", "good"), ("dull", "bad"))] * 20
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    return {"model": bert, "data": folder / "rows.jsonl"}


NET = "from torch import nn\ndef build():\n    return nn.Sequential(nn.Flatten(), nn.Linear(48, 4))\n"


def images(folder: Path, bert: Path) -> dict[str, Any]:
    torch.save(built(folder / "net.py", NET, seed=1), folder / "net.pt")
    x = np.random.default_rng(1).integers(0, 255, (40, 4, 4, 3)).astype(np.uint8)
    np.savez(folder / "images.npz", x=x, y=np.arange(40) % 4)
    own = {"model_fn": f"{folder / 'net.py'}:build", "include": ("*.weight",)}
    return {"model": folder / "net.pt", "data": folder / "images.npz", **own}


DATA: dict[str, Callable[[Path, Path], dict[str, Any]]] = {  # a model and data of each task
    "causal-lm": causal,
    "masked-lm": masked,
    "text-classification": rows,
    "image-classification": images,
}
RUN: dict[str, Any] = {"max_length": 16, "batch_size": 4, "steps": 2, "lr": 1e-3, "threads": 1}


@pytest.mark.parametrize("name", TASKS)
def test_a_task_trains_on_its_data_with_the_changes_that_it_allows(
    name: str, tiny_bert: Path, tmp_path: Path
) -> None:
    kind, given = TASKS[name], DATA[name](tmp_path, tiny_bert)
    assert kind.hub and given["data"].suffix in kind.suffixes
    said: list[str] = []
    run = {"out": tmp_path / "out", "task": name, **RUN, **given, "augment": kind.augment}
    finetune_step(resolve(FinetuneStep, run), said.append)
    quality = read_manifest(tmp_path / "out").quality[0]
    assert quality.task == name
    assert quality.before is not None or kind.fresh_head
    run |= {"out": tmp_path / "other", "augment": "crop-flip" if kind.augment != "crop-flip" else "noise"}
    with pytest.raises(LpsparseError) as refused:
        finetune_step(resolve(FinetuneStep, run))
    assert refused.value.code == "LPS249"


LIGHT = """
import sys
from lpsparse.families import METHODS, TASKS
assert all(isinstance(each.words, str) for each in METHODS.values())
assert all(each.suffixes for each in TASKS.values())
assert "torch" not in sys.modules
"""


def test_the_facts_about_methods_and_tasks_cost_no_torch() -> None:
    subprocess.run([sys.executable, "-c", LIGHT], env=cli_environment(), check=True, timeout=60)


# Members from outside, as a person's own module would add them


class Third(Method):
    """Cuts all of the target after three steps."""

    def due(self, done: int) -> int | None:
        return self.control.count(self.control.target) if done == 3 and self.control.target else None


def from_the_left(weights: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    places = {name: torch.arange(weight.shape[1]) + 1.0 for name, weight in weights.items()}
    return {name: places[name].expand_as(weight).clone() for name, weight in weights.items()}


def counting(step: FinetuneStep | EvalStep, checkpoint: Checkpoint) -> Task:
    assert step.model_fn is not None
    x = torch.randn(40, 48, generator=torch.Generator().manual_seed(3))

    def collate(places: list[int]) -> dict[str, Tensor]:
        return {"x": x[places], "y": torch.tensor(places) % 4}

    def predict(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return model(batch["x"]), batch["y"]

    loaded = load_module(checkpoint, step.model_fn)
    return Task(loaded, range(32), range(32, 40), collate, predict, metric="accuracy", unit="rows")


def test_a_method_a_score_and_a_task_from_outside_train_through_the_public_call(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS.members, "third", Third)
    monkeypatch.setitem(SCORES.members, "left", Score(from_the_left, "from the left"))
    monkeypatch.setitem(TASKS.members, "counting", TaskKind(counting, "other", (".npz",)))
    own = {"method": "third", "score": "left", "task": "counting", "target_sparsity": "0.25"}
    given = {**images(tmp_path, tiny_bert), **RUN, **own, "steps": 6, "log_every": 1}
    report = lpsparse.finetune(out=tmp_path / "out", **given)
    weight = lpsparse.load(tmp_path / "out")["1.weight"]
    assert report.prunable.zeros == 48 and torch.equal(weight == 0, (torch.arange(48) < 12).expand(4, 48))
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["sparsity"] for line in lines] == [0, 0, 0.25, 0.25, 0.25, 0.25]
    assert lpsparse.check_recipe(recipe_of(tmp_path, given))["steps"][0]["prunable_weights"] == 192


def recipe_of(folder: Path, given: dict[str, Any]) -> Path:
    known = {key: str(value) if isinstance(value, Path) else value for key, value in given.items()}
    model, data = known.pop("model"), known.pop("data")
    step = {**known, "data": data, "include": list(known["include"])}
    recipe = {"model": model, "out": str(folder / "made"), "steps": [{"finetune": step}]}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))  # YAML, too
    return folder / "recipe.yaml"
