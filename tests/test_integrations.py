"""The method in other loops: a plain one and transformers' Trainer give what `finetune` gives."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import BUNDLED
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

import lpsparse
from lpsparse import LpsparseError
from lpsparse.checkpoint.opening import open_checkpoint
from lpsparse.integrations.transformers import SparsityCallback
from lpsparse.recipe import FinetuneStep
from lpsparse.settings import resolve
from lpsparse.training.loop import prepare
from lpsparse.training.order import batches

STEPS, RATE = 30, 2e-3
RUN: dict[str, Any] = {
    "data": "bundled:shakespeare", "split": "train[:9000]", "eval_split": "validation[:4000]",
    "task": "causal-lm", "steps": STEPS, "batch_size": 4, "max_length": 32,
    "lr": RATE, "threads": 1, "target_sparsity": "0.7", "score": "magnitude",
}  # fmt: skip
OPTIONS = {"target_sparsity": "0.7", "score": "magnitude"}


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    out = tmp_path_factory.mktemp("run") / "out"
    lpsparse.finetune("bundled:stories260k", out, **RUN)
    return safetensors.torch.load_file(out / "model.safetensors")


@pytest.fixture(scope="module")
def data() -> list[Tensor]:
    """The blocks of each step, in the order of `finetune`."""
    step = resolve(FinetuneStep, {"model": "bundled:stories260k", "out": "o", **RUN})
    task = prepare(step, open_checkpoint("bundled:stories260k"))
    return [parts[0][1]["input_ids"] for parts in batches(step, task, 0, STEPS)]


def loss_of(model: Any, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))


def check_same(model: Any, wanted: dict[str, Tensor]) -> None:
    found = model.state_dict()
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=1e-5)
        assert torch.equal(found[name] == 0, weight == 0)


def test_a_plain_loop_gives_the_weights_of_finetune(wanted: dict[str, Tensor], data: list[Tensor]) -> None:
    model = AutoModelForCausalLM.from_pretrained(BUNDLED)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    sparsity = lpsparse.Sparsity(model, optimizer, steps=STEPS, lr=RATE, **OPTIONS)
    for ids in data:
        sparsity.before_step()
        loss_of(model, ids).backward()
        sparsity.after_backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        sparsity.after_step()
    sparsity.finish()
    check_same(model, wanted)


class InOrder(Trainer):
    def get_train_dataloader(self) -> Any:
        rows = [{"input_ids": ids} for ids in self.train_dataset]  # type: ignore[union-attr]
        return torch.utils.data.DataLoader(rows, batch_size=1, collate_fn=lambda row: row[0])  # type: ignore[arg-type]

    def compute_loss(self, model: Any, inputs: Any, **_: Any) -> Tensor:  # type: ignore[override]
        return loss_of(model, inputs["input_ids"])


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        control.should_save = control.should_training_stop = state.global_step == self.step
        return control


def trainer(folder: Path, data: list[Tensor], *more: TrainerCallback, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, learning_rate=RATE, max_grad_norm=1.0, save_strategy="no",
        report_to="none", disable_tqdm=True, use_cpu=True, optim="adamw_torch", logging_strategy="no",
        **{"weight_decay": 0.0, **options},
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(BUNDLED)
    return InOrder(model, arguments, train_dataset=data, callbacks=[SparsityCallback(**OPTIONS), *more])  # type: ignore[arg-type]


def test_the_trainers_callback_gives_the_weights_of_finetune(
    wanted: dict[str, Tensor], data: list[Tensor], tmp_path: Path
) -> None:
    run = trainer(tmp_path, data)
    run.train()
    check_same(run.model, wanted)


@pytest.mark.parametrize("at", [5, 12, 20])
def test_the_trainers_checkpoints_hold_the_callbacks_state(
    at: int, wanted: dict[str, Tensor], data: list[Tensor], tmp_path: Path
) -> None:
    trainer(tmp_path, data, StopAt(at)).train()
    resumed = trainer(tmp_path, data)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
    check_same(resumed.model, wanted)


def test_the_trainers_own_weight_decay_and_options_of_the_loop_are_refused(
    data: list[Tensor], tmp_path: Path
) -> None:
    with pytest.raises(LpsparseError, match=r"weight_decay=0\.1: L_p decay takes its place"):
        trainer(tmp_path, data, weight_decay=0.1).train()
    model = torch.nn.Linear(13, 7)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(LpsparseError, match="epochs is the loop's own"):
        lpsparse.Sparsity(model, optimizer, steps=3, lr=0.1, epochs=4)


def test_a_plain_loop_is_taken_up_again_in_the_same_bits() -> None:
    def fresh() -> tuple[torch.nn.Module, torch.optim.Optimizer, lpsparse.Sparsity]:
        torch.manual_seed(3)
        model = torch.nn.Sequential(torch.nn.Linear(13, 7), torch.nn.Tanh(), torch.nn.Linear(7, 11))
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
        options = {"target_sparsity": "0.6", "include": ("*.weight",)}
        return model, optimizer, lpsparse.Sparsity(model, optimizer, steps=40, lr=0.01, **options)

    def steps(run: Any, numbers: Iterator[int] | range) -> None:
        model, optimizer, sparsity = run
        for t in numbers:
            sparsity.before_step()
            x = torch.randn(5, 13, generator=torch.Generator().manual_seed(t))
            model(x).square().mean().backward()
            sparsity.after_backward()
            optimizer.step()
            optimizer.zero_grad()
            sparsity.after_step()

    whole, first, second = fresh(), fresh(), fresh()
    steps(whole, range(40))
    steps(first, range(13))
    second[0].load_state_dict(first[0].state_dict())
    second[2].load_state_dict(first[2].state_dict())
    second[1].load_state_dict(first[1].state_dict())
    steps(second, range(13, 40))
    for run in (whole, second):
        run[2].finish()
    for name, weight in whole[0].state_dict().items():
        assert torch.equal(second[0].state_dict()[name], weight)


def test_a_loop_whose_cut_has_emptied_a_tensor_is_taken_up_again() -> None:
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(13, 7), torch.nn.Linear(7, 11))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    options = {"target_sparsity": "0.6", "include": ("*.weight",)}
    state = lpsparse.Sparsity(model, optimizer, steps=40, lr=0.01, **options).state_dict()
    with torch.no_grad():
        model[0].weight.zero_()
    again = lpsparse.Sparsity(model, torch.optim.AdamW(model.parameters()), steps=40, lr=0.01, **options)
    again.load_state_dict(state)
    other = lpsparse.Sparsity(model, torch.optim.AdamW(model.parameters()), steps=40, lr=0.02, **options)
    with pytest.raises(LpsparseError, match="the state was made with another lr"):
        other.load_state_dict(state)
