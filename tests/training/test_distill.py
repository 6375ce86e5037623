"""Distillation: the loss is its formula, and blocks are the repeated parts of a model."""

from dataclasses import replace

import pytest
import torch
from support.models import Net, batch_of, step_of, task_of
from torch import nn

from lpsparse import LpsparseError
from lpsparse.training.loss import Teacher, blocks, make_teacher


def test_the_loss_is_the_mix_of_its_three_terms() -> None:
    torch.manual_seed(1)
    net, batch = Net(), batch_of()
    teacher = Teacher(step_of(distill=0.3, temperature=2.0, distill_blocks=0.5), task_of(net))
    teacher.open()
    dense = teacher.model(batch["x"]).detach()
    teacher.theirs.take()
    with torch.no_grad():
        net.layers[2][2].weight.mul_(1.5)  # the last block of the student drifts off; the teacher does not
    logits = net(batch["x"])
    found = teacher.loss(logits, batch["y"], batch)
    probabilities = (dense / 2).softmax(-1)
    kl = (probabilities * ((dense / 2).log_softmax(-1) - (logits / 2).log_softmax(-1))).sum() / 11
    ce = nn.functional.cross_entropy(logits, batch["y"])
    h, h_t = _block(net, 2, batch), _block(teacher.model, 2, batch)
    drift = (h - h_t).square().mean() / h_t.square().mean()
    torch.testing.assert_close(found, 0.7 * ce + 0.3 * 4 * kl + 0.5 * drift / 3)


def _block(net: nn.Module, last: int, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    x = net.stem(batch["x"])
    for layer in net.layers[: last + 1]:
        x = layer(x)
    return x


def test_blocks_that_drift_cost_their_relative_squared_error() -> None:
    torch.manual_seed(3)
    net, batch = Net(), batch_of()
    teacher = Teacher(step_of(distill_blocks=2.0), task_of(net))
    teacher.open()
    with torch.no_grad():
        (
            net.layers[2][2].weight.mul_(2),
            net.layers[2][2].bias.mul_(2),
        )  # its output doubles: |2h - h|^2 / |h|^2 = 1
    logits = net(batch["x"])
    found = teacher.loss(logits, batch["y"], batch)
    torch.testing.assert_close(found, nn.functional.cross_entropy(logits, batch["y"]) + 2.0 / 3)


def test_blocks_are_the_repeated_parts_and_close_takes_the_hooks_off() -> None:
    net = Net()
    assert list(blocks(net)) == list(net.layers)
    teacher = Teacher(step_of(distill_blocks=1.0), task_of(net))
    teacher.open()
    teacher.close()
    net(batch_of()["x"])
    assert teacher.ours.take() == []


def test_distillation_needs_a_head_and_blocks() -> None:
    fresh = task_of(Net())
    fresh = replace(fresh, loaded=replace(fresh.loaded, new=("head.weight",)))
    with pytest.raises(LpsparseError, match="no head yet"):
        make_teacher(step_of(distill=0.5), fresh)
    with pytest.raises(LpsparseError, match="ModuleList"):
        make_teacher(step_of(distill_blocks=0.5), task_of(nn.Linear(7, 4)))
    assert make_teacher(step_of(), fresh) is None
