"""Each task trains an architecture of its kind, and what it writes opens without lpsparse."""

import os
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.cli import run_cli
from support.models import BUNDLED, experts, gpt2, llama, saved

import lpsparse
from lpsparse import LpsparseError
from lpsparse.checkpoint.open import open_checkpoint
from lpsparse.commands.finetune import finetune_step
from lpsparse.steps.finetune import FinetuneStep
from lpsparse.steps.resolve import resolve
from lpsparse.training.build import prepare
from lpsparse.training.tasks import blocks as blocks_module

TEXT = "The quick brown fox jumps over the lazy dog and says that it is a fine day. " * 60


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def bert(folder: Path, tokenizer: Path) -> Path:
    config = transformers.BertConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=64,
    )
    return saved(transformers.BertForMaskedLM(config), folder, tokenizer)


def images(path: Path, size: int = 12) -> Path:
    y = np.arange(40) % 3
    x = (np.random.default_rng(1).integers(0, 60, (40, size, size, 3)) + 60 * y[:, None, None, None]).astype(
        "u1"
    )
    np.savez(path, x=x, y=y)
    return path


RUN: dict[str, Any] = {
    "steps": 8,
    "batch_size": 4,
    "max_length": 16,
    "lr": 1e-3,
    "target_sparsity": "0.6",
    "threads": 1,
}


@pytest.mark.parametrize("make", [gpt2, llama, experts])
def test_a_causal_model_trains_and_opens_with_transformers(make: Any, text: Path, tmp_path: Path) -> None:
    source = make(tmp_path / "model")
    report = lpsparse.finetune(source, tmp_path / "out", data=text, task="causal-lm", **RUN)
    assert report.prunable.sparsity == pytest.approx(0.6, abs=1e-3) and report.prunable.weights > 1000
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    zeros = sum(int((param == 0).sum()) for param in model.parameters())
    assert zeros >= report.prunable.zeros
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    assert before.keys() == after.keys() and all(before[name].shape == after[name].shape for name in before)
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


def test_experts_that_transformers_fuses_are_chosen_together(text: Path, tmp_path: Path) -> None:
    source = experts(tmp_path / "model")
    options = {**RUN, "exclude": ["*experts.1.*"]}
    with pytest.raises(LpsparseError, match="takes only a part of what transformers fuses"):
        lpsparse.finetune(source, tmp_path / "out", data=text, task="causal-lm", **options)
    report = lpsparse.finetune(
        source, tmp_path / "out", data=text, task="causal-lm", **{**RUN, "include": ["*experts.*"]}
    )
    assert sum(row.prunable for row in report.tensors) == 2 * 3 * 3


def test_a_masked_model_trains_and_opens_with_transformers(
    text: Path, tiny_bert: Path, tmp_path: Path
) -> None:
    source = bert(tmp_path / "model", tiny_bert)
    options = {**RUN, "lr": 5e-3, "steps": 40, "target_sparsity": "0.3"}
    report = lpsparse.finetune(source, tmp_path / "out", data=text, task="masked-lm", **options)
    assert report.quality[0].before is not None and report.quality[0].after < report.quality[0].before
    _, info = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    again = [
        lpsparse.evaluate(tmp_path / "out", data=text, task="masked-lm", max_length=16) for _ in range(2)
    ]
    assert again[0] == again[1]


def test_masked_tokens_are_a_seventh_mostly_hidden_and_drawn_by_example(
    text: Path, tiny_bert: Path, tmp_path: Path
) -> None:
    given = {"model": "m", "out": "o", "data": str(text), "task": "masked-lm", "max_length": 34}
    task = prepare(resolve(FinetuneStep, given), open_checkpoint(bert(tmp_path / "model", tiny_bert)))
    batch = task.collate(list(task.train) * 8)
    seeds = list(range(len(batch["input_ids"])))
    assert task.augment is not None
    masked, again = task.augment(batch, seeds), task.augment(batch, seeds)
    assert torch.equal(masked["input_ids"], again["input_ids"])
    alone = task.augment(task.collate([task.train[1]]), [1])
    assert torch.equal(alone["input_ids"][0], masked["input_ids"][1])
    ids, chosen = batch["input_ids"], masked["labels"] != -100
    assert (ids[:, 0] == 101).all() and (ids[:, -1] == 102).all() and not chosen[:, [0, -1]].any()
    assert torch.equal(masked["labels"][chosen], ids[chosen])
    assert torch.equal(masked["input_ids"][~chosen], ids[~chosen])
    assert 0.1 < float(chosen[:, 1:-1].float().mean()) < 0.2
    assert 0.7 < float((masked["input_ids"] == 103)[chosen].float().mean()) < 0.9
    assert task.count(masked) == int(chosen.sum())


def test_a_model_without_a_masked_head_is_refused(text: Path, tiny_bert: Path, tmp_path: Path) -> None:
    with pytest.raises(LpsparseError, match="masked language model"):
        lpsparse.finetune(tiny_bert, tmp_path / "out", data=text, task="masked-lm", **RUN)
    with pytest.raises(LpsparseError, match="tokenizer has no mask token"):
        lpsparse.finetune(gpt2(tmp_path / "gpt2"), tmp_path / "out", data=text, task="masked-lm", **RUN)


def vit(folder: Path, labels: int) -> Path:
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=16,
        patch_size=8,
        num_labels=labels,
    )
    return saved(transformers.ViTForImageClassification(config), folder)


def resnet(folder: Path, labels: int) -> Path:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=labels
    )
    return saved(transformers.ResNetForImageClassification(config), folder)


@pytest.mark.parametrize("make", [vit, resnet])
def test_a_vision_model_trains_and_opens_with_transformers(make: Any, tmp_path: Path) -> None:
    source, data = make(tmp_path / "model", 3), images(tmp_path / "images.npz")
    options = {key: value for key, value in RUN.items() if key != "max_length"}
    report = lpsparse.finetune(source, tmp_path / "out", data=data, task="image-classification", **options)
    assert report.prunable.sparsity == pytest.approx(0.6, abs=1e-2)
    model, info = transformers.AutoModelForImageClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"] and model.config.num_labels == 3
    found = lpsparse.evaluate(tmp_path / "out", data=data, split="train", task="image-classification")
    assert found["images"] == 40


def test_a_vision_model_without_a_head_gets_one_for_the_labels(tmp_path: Path) -> None:
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=16,
        patch_size=8,
    )
    source = saved(transformers.ViTModel(config, add_pooling_layer=False), tmp_path / "model")
    data = images(tmp_path / "images.npz")
    options = {key: value for key, value in RUN.items() if key != "max_length"}
    lpsparse.finetune(source, tmp_path / "out", data=data, task="image-classification", **options)
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert model.config.num_labels == 3 and model.config.id2label == {0: "0", 1: "1", 2: "2"}


def test_a_large_text_is_tokenised_once_beside_the_data_and_gives_the_same_blocks(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text.write_text("\n".join([TEXT[:77]] * 60))
    given = {"model": "m", "out": "o", "data": str(text), "task": "causal-lm", "max_length": 16}
    small = prepare(resolve(FinetuneStep, given), open_checkpoint(BUNDLED))
    monkeypatch.setattr(blocks_module, "LARGE", 1000)
    large = prepare(resolve(FinetuneStep, given), open_checkpoint(BUNDLED))
    kept = list((tmp_path / blocks_module.CACHE).iterdir())
    assert sorted(path.suffix for path in kept) == [".sha256", ".u32"]
    assert len(small.train) > 30 and abs(len(large.train) - len(small.train)) < 12
    text.write_text(text.read_text() + "More. " * 30)
    os.utime(text, (1, 1))  # by what it holds, not by its date
    monkeypatch.setattr(blocks_module, "_write", _write_once(blocks_module._write))
    for _ in range(2):
        prepare(resolve(FinetuneStep, given), open_checkpoint(BUNDLED))
    found = sorted((tmp_path / blocks_module.CACHE).glob("*.u32"))
    assert len(found) == 2
    found[1].write_bytes(found[1].read_bytes()[:400])  # cut off: made again
    found[0].write_bytes(b"\0" * found[0].stat().st_size)
    monkeypatch.undo()
    monkeypatch.setattr(blocks_module, "LARGE", 1000)
    again = prepare(resolve(FinetuneStep, given), open_checkpoint(BUNDLED))
    assert len(again.train) > len(small.train) and any(block.any() for block in again.train)


def _write_once(write: Any) -> Any:
    calls: list[Path] = []

    def once(path: Path, *more: Any) -> None:
        assert not calls, "tokenised twice"
        calls.append(path)
        write(path, *more)

    return once


def test_a_part_of_a_large_text_is_those_characters(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text.write_text("".join(f"line {i} ends here\r\n" for i in range(300)))
    whole = text.read_text()
    for part in (slice(None, None), slice(5, 100), slice(1000, None), slice(None, 17)):
        assert "".join(blocks_module._pieces([text], part)) == whole[part]


def test_a_text_larger_than_memory_is_read_in_pieces(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text.write_text("x" * 5000)
    monkeypatch.setattr(blocks_module, "_PIECE", 64)
    pieces = list(blocks_module._pieces([text], slice(None, None)))
    assert max(map(len, pieces)) == 64 and "".join(pieces) == "x" * 5000


@pytest.mark.parametrize("name", ["adafactor", "muon", "sgd", "torch.optim:RMSprop", "mine.py:Lion"])
def test_any_optimizer_reaches_the_target(name: str, faulty: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(LION)
    where = name.replace("mine.py", str(tmp_path / "mine.py"))
    report = lpsparse.finetune(
        out=tmp_path / "out", **{**faulty, "optimizer": where, "target_sparsity": "0.7"}
    )
    assert report.prunable.zeros == int(0.7 * report.prunable.weights)


LION = """
import torch
class Lion(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.add_(m.lerp(p.grad, 1 - group["betas"][0]).sign(), alpha=-group["lr"])
                m.lerp_(p.grad, 1 - group["betas"][1])
def not_one(params, lr):
    return 7
"""


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lion", "not adamw, sgd, adafactor, muon or MODULE:CLASS"),
        ("nowhere:X", "No module named"),
        ("torch.optim:Nothing", "has no attribute"),
        ("mine.py:not_one", "gave a int"),
        ("torch:Tensor", "--optimizer torch:Tensor"),
    ],
)
def test_an_optimizer_that_is_none_is_refused(
    name: str, words: str, faulty: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(LION)
    where = name.replace("mine.py", str(tmp_path / "mine.py"))
    with pytest.raises(LpsparseError, match=words.replace("(", r"\(")):
        lpsparse.finetune(out=tmp_path / "out", **{**faulty, "optimizer": where})
    assert not list(tmp_path.glob("out*"))


def test_muon_moves_matrices_and_adamw_the_rest_and_a_load_keeps_both() -> None:
    from lpsparse.training.optimizers import MuonAdamW

    def fresh() -> tuple[torch.nn.Module, MuonAdamW]:
        torch.manual_seed(3)
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 2), torch.nn.Flatten(), torch.nn.Linear(20, 7))
        return model, MuonAdamW([{"params": list(model.parameters()), "weight_decay": 0.0}], 0.01)

    def steps(run: Any, count: int) -> None:
        for _ in range(count):
            run[0](torch.ones(2, 3, 3, 3)).square().mean().backward()
            run[1].step()
            run[1].zero_grad()

    whole, first, second = fresh(), fresh(), fresh()
    steps(whole, 5)
    steps(first, 2)
    second[0].load_state_dict(first[0].state_dict())
    second[1].load_state_dict(first[1].state_dict())
    steps(second, 3)
    for one, other in zip(whole[0].parameters(), second[0].parameters(), strict=True):
        assert torch.equal(one, other)
        assert ("momentum_buffer" in whole[1].state[one]) == (one.ndim == 2)
        assert ("exp_avg_sq" in whole[1].state[one]) == (one.ndim != 2)


def test_a_dead_tracker_never_stops_a_run(
    faulty: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where it writes
    said: list[str] = []
    finetune_step(resolve(FinetuneStep, {**faulty, "out": tmp_path / "out", "track": "wandb"}), said.append)
    assert len([text for text in said if "--track wandb" in text]) == 1
    assert (tmp_path / "out" / "metrics.jsonl").read_text().count("\n") == 8


class Fake:
    """What accelerate's adapters look like; the third line that is logged fails."""

    seen: ClassVar[list[Any]] = []

    def __init__(self, name: str) -> None:
        self.seen.append(name)

    def start(self) -> None:
        self.seen.append("start")

    def log(self, values: dict[str, Any], step: int) -> None:
        self.seen.append((step, sorted(values)))
        if len(self.seen) == 5:
            raise OSError(28, "No space left on device")


def test_a_tracker_gets_the_metrics_until_it_fails(
    faulty: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accelerate.tracking.TrackioTracker", Fake)
    said: list[str] = []
    finetune_step(resolve(FinetuneStep, {**faulty, "out": tmp_path / "out", "track": "trackio"}), said.append)
    assert Fake.seen[:2] == ["out", "start"] and [step for step, _ in Fake.seen[2:]] == [2, 4, 6]
    assert {"loss", "lr", "sparsity"} <= set(Fake.seen[2][1])
    given_up = [text for text in said if "--track trackio" in text]
    assert len(given_up) == 1 and "No space left on device" in given_up[0]


def _words(given: dict[str, Any]) -> list[str]:
    return resolve(FinetuneStep, {**given, "out": "o"}).options()


def test_a_worker_process_prepares_the_same_batches(faulty: dict[str, Any], tmp_path: Path) -> None:
    lpsparse.finetune(out=tmp_path / "none", **faulty)
    lpsparse.finetune(out=tmp_path / "two", **{**faulty, "workers": 2})
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("none", "two"))
    assert one == two


@pytest.mark.parametrize("wait", [0, 2], ids=["while the next batch is fetched", "in the midst of a step"])
def test_a_dead_worker_process_ends_the_run_with_exit_6(
    wait: int, faulty: dict[str, Any], tmp_path: Path
) -> None:
    code = tmp_path / "faulty.py"
    code.write_text(code.read_text() + KILLS_WORKERS.replace("WAIT", str(wait)))
    words = _words({**faulty, "workers": 1, "epochs": 50})
    ran = run_cli(["finetune", faulty["model"], tmp_path / "out", *words])
    assert ran.rc == 6 and "LPS606" in ran.stderr, ran.stderr
    assert "Traceback" not in ran.stderr


KILLS_WORKERS = """
import time
import psutil

class Killer(Net):
    def forward(self, x):
        if self.training:
            for child in psutil.Process().children():
                child.kill()
            time.sleep(WAIT)
        return super().forward(x)

def build():
    return Killer()
"""


def test_checkpointing_changes_the_time_alone(text: Path, tmp_path: Path) -> None:
    source = llama(tmp_path / "model", layers=1)
    given = {**RUN, "data": str(text), "task": "causal-lm"}
    for name, more in {"plain": {}, "again": {"checkpointing": True}}.items():
        lpsparse.finetune(source, tmp_path / name, **given, **more)
    plain, again = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "again"))
    assert all(torch.equal(again[name], weight) for name, weight in plain.items())


def test_compiling_changes_the_time_alone(net: dict[str, Any], tmp_path: Path) -> None:
    """On a model of few operations, since compiling takes seconds for each."""
    given = {**net, "steps": 4, "target_sparsity": "0.5", "augment": "none"}
    lpsparse.finetune(out=tmp_path / "plain", **given)
    words = resolve(FinetuneStep, {**given, "compile": True, "out": "o"}).options()
    ran = run_cli(["finetune", given["model"], tmp_path / "compiled", *words])
    assert ran.rc == 0, ran.stderr
    plain, compiled = (
        load_file(next((tmp_path / name).glob("*.safetensors"))) for name in ("plain", "compiled")
    )
    for name, weight in plain.items():
        torch.testing.assert_close(compiled[name], weight, rtol=1e-3, atol=1e-4)


def test_checkpointing_of_a_bare_module_is_refused(faulty: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(LpsparseError, match="Net has no gradient checkpointing"):
        lpsparse.finetune(out=tmp_path / "out", **{**faulty, "checkpointing": True})
