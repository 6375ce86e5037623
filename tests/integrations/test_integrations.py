"""The method in other loops: a plain one and transformers' Trainer give what `finetune` gives."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from support.files import refuses
from support.models import BUNDLED
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

import lpsparse
from lpsparse import LpsparseError
from lpsparse.checkpoint.open import open_checkpoint
from lpsparse.integrations.transformers import SparsityCallback
from lpsparse.steps.finetune import FinetuneStep
from lpsparse.steps.resolve import resolve
from lpsparse.training.build import prepare
from lpsparse.training.order import batches

STEPS, RATE = 30, 2e-3
RUN: dict[str, Any] = {
    "data": "bundled:shakespeare",
    "split": "train[:9000]",
    "eval_split": "validation[:4000]",
    "task": "causal-lm",
    "steps": STEPS,
    "batch_size": 4,
    "max_length": 32,
    "lr": RATE,
    "threads": 1,
    "target_sparsity": "0.7",
    "score": "magnitude",
}
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
        output_dir=str(folder),
        max_steps=STEPS,
        learning_rate=RATE,
        max_grad_norm=1.0,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        optim="adamw_torch",
        logging_strategy="no",
        **{"weight_decay": 0.0, "save_strategy": "no", **options},
    )
    model = AutoModelForCausalLM.from_pretrained(BUNDLED)
    rows = [{"input_ids": data[0][0]}]
    callbacks = [SparsityCallback(**OPTIONS), *more]
    return InOrder(model, arguments, train_dataset=data, eval_dataset=rows, callbacks=callbacks)  # type: ignore[arg-type]


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


def zeros_of(model: Any, layers: str = "") -> tuple[int, int]:
    """Zeros and size of what is prunable, under `layers`."""
    kept = [p for n, p in model.named_parameters() if layers in n and "_proj" in n]
    return sum(int((p == 0).sum()) for p in kept), sum(p.numel() for p in kept)


class Losses(TrainerCallback):
    """The first evaluation is the best."""

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **_: Any) -> None:
        metrics["eval_loss"] = float(state.global_step)


@pytest.mark.parametrize("stop", [7, STEPS])
def test_a_trainer_that_stops_early_or_loads_its_best_has_the_targets_zeros(
    stop: int, data: list[Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    best = {
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "eval_strategy": "steps",
        "eval_steps": 5,
        "save_steps": 5,
        "save_strategy": "steps",
    }
    run = trainer(tmp_path, data, Losses(), *([StopAt(stop)] if stop < STEPS else []), **best)
    run.train()
    assert run.state.best_global_step == 5
    zeros, size = zeros_of(run.model)
    assert zeros == int(0.7 * size)
    assert f"cut to the target at the end, after {stop} of {STEPS} steps" in caplog.text


def test_what_is_frozen_in_a_trainer_stays_and_its_groups_keep_their_rates(
    data: list[Tensor], tmp_path: Path
) -> None:
    run = trainer(tmp_path, data)
    frozen = run.model.model.layers[0].requires_grad_(False)
    before = {name: value.clone() for name, value in frozen.state_dict().items()}
    trained = {name: p for name, p in run.model.named_parameters() if p.requires_grad}
    head = [p for name, p in trained.items() if "norm" in name]
    body = [p for name, p in trained.items() if "norm" not in name]
    groups = [{"params": body, "lr": 1e-3}, {"params": head, "lr": 1e-2}]
    run.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    seen: list[list[float]] = []

    class Rates(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            seen.append([group["lr"] for group in given["optimizer"].param_groups])

    run.add_callback(Rates())
    run.train()
    assert [max(each) for each in zip(*seen, strict=True)] == [1e-3, 1e-2]
    assert all(torch.equal(value, before[name]) for name, value in frozen.state_dict().items())
    zeros, size = zeros_of(run.model)
    assert zeros == int(0.7 * (size - zeros_of(frozen)[1]))


def test_the_trainers_own_weight_decay_and_options_of_the_loop_are_refused(
    data: list[Tensor], tmp_path: Path
) -> None:
    with refuses("LPS251", "0.1"):
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
