"""R-Drop: two passes with dropout, their mean loss and their disagreement."""

import pytest
import torch
from support.models import Net, batch_of, step_of, task_of
from torch import nn
from torch.nn import functional

from lpsparse import LpsparseError
from lpsparse.training.loss import batch_loss, check_dropout, disagreement, make_teacher


def net_of() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(7, 6), nn.Dropout(0.5), nn.Linear(6, 4))


def test_disagreement_is_the_mean_of_both_divergences() -> None:
    first, second = torch.randn(2, 11, 4, dtype=torch.float64)
    p, q = functional.log_softmax(first, -1), functional.log_softmax(second, -1)
    both = [functional.kl_div(a, b, log_target=True, reduction="batchmean") for a, b in ((p, q), (q, p))]
    torch.testing.assert_close(disagreement(first, second), sum(both) / 2)
    assert disagreement(first, first) == 0


def test_r_drop_is_the_mean_loss_of_two_passes_and_half_alpha_of_their_disagreement() -> None:
    net, batch = net_of(), batch_of()
    torch.manual_seed(5)
    found = batch_loss(step_of(r_drop=3.0), task_of(net), net, batch, None)
    torch.manual_seed(5)  # the same dropout
    first, second = net(torch.cat([batch["x"], batch["x"]])).chunk(2)
    assert not torch.equal(first, second)
    plain = (functional.cross_entropy(first, batch["y"]) + functional.cross_entropy(second, batch["y"])) / 2
    torch.testing.assert_close(found, plain + 1.5 * disagreement(first, second))


def test_r_drop_goes_with_distillation() -> None:
    torch.manual_seed(6)
    net, batch = Net().eval(), batch_of()  # no dropout: only the teacher's part is left
    task = task_of(net)
    options = {"distill": 0.5, "distill_blocks": 2.0}
    teachers = [make_teacher(step_of(**options), task_of(net)) for _ in range(2)]
    for teacher in teachers:
        assert teacher is not None
        teacher.open()
    with torch.no_grad():
        net.layers[1][0].weight.mul_(8.0)  # drift off, so that every term counts
    found = batch_loss(step_of(r_drop=3.0, **options), task, net, batch, teachers[0])
    for teacher in teachers:
        assert teacher is not None
        teacher.ours.take()
    plain = batch_loss(step_of(**options), task, net, batch, teachers[1])
    torch.testing.assert_close(found, plain)
    assert plain > functional.cross_entropy(net(batch["x"]), batch["y"]) / 2 + 0.01


@pytest.mark.parametrize("net", [nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.0))])
def test_a_model_without_dropout_is_refused(net: nn.Module) -> None:
    with pytest.raises(LpsparseError, match="no dropout"):
        check_dropout(step_of(r_drop=1.0), net)
    check_dropout(step_of(), net)
