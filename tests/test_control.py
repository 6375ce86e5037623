"""Sparsity control: exact cuts, zeros held through momentum, the plan of a run."""

from decimal import Decimal

import pytest
import torch
from torch import Tensor, nn

from lpsparse.recipe import FinetuneStep
from lpsparse.settings import resolve
from lpsparse.training.control import SparsityControl, allocate, quantile, smallest_masks
from lpsparse.training.decay import kill_magnitude


def step_of(**options: object) -> FinetuneStep:
    given = {"model": "m", "out": "o", "data": "d", "task": "causal-lm", **options}
    return resolve(FinetuneStep, given)


def weights_of(seed: int) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(7, 13, generator=generator)) for name in ("b", "a")}


def drive(control: SparsityControl, optimizer: torch.optim.Optimizer, steps: int) -> list[int]:
    """Random gradients for every weight; zeros after each step."""
    generator = torch.Generator().manual_seed(9)
    zeros: list[int] = []
    for t in range(steps):
        control.before_step(t)
        for weight in control.weights.values():
            weight.grad = 0.01 * torch.randn(weight.shape, generator=generator)
        control.mask_gradients()
        optimizer.step()
        control.after_step(t)
        zeros.append(control.zeros())
    return zeros


@pytest.mark.parametrize("count", [0, 1, 90, 181, 182])
def test_masks_keep_all_but_exactly_the_smallest(count: int) -> None:
    weights: dict[str, Tensor] = dict(weights_of(1))
    masks = smallest_masks(weights, allocate(weights, count, "global"))
    kept = torch.cat([weights[name].abs()[masks[name]] for name in weights])
    cut = torch.cat([weights[name].abs()[~masks[name]] for name in weights])
    assert len(cut) == count
    assert not count or not len(kept) or cut.max() <= kept.min()


def test_ties_are_cut_by_tensor_name_then_position() -> None:
    weights: dict[str, Tensor] = {"b": torch.ones(3), "a": torch.ones(3)}
    masks = smallest_masks(weights, allocate(weights, 4, "global"))
    assert masks["a"].tolist() == [False, False, False]
    assert masks["b"].tolist() == [False, True, True]


def test_lamp_scores_follow_their_definition_and_their_counts_add_up() -> None:
    weights = weights_of(12)
    with torch.no_grad():
        weights["b"].mul_(0.01)  # a tensor of small scale
    scores = {}
    for name, weight in weights.items():
        flat = weight.detach().flatten().double().tolist()
        scores[name] = [x * x / sum(y * y for y in flat if abs(y) >= abs(x)) for x in flat]
    smallest = sorted((score, name) for name in scores for score in scores[name])[:130]
    wanted = {name: sum(owner == name for _, owner in smallest) for name in scores}
    assert allocate(dict(weights), 130, "lamp") == wanted
    assert allocate(dict(weights), 130, "global")["b"] == 91 > wanted["b"] > 0


def test_the_quantile_equals_a_sort() -> None:
    weights = weights_of(2)
    ordered = torch.cat([w.detach().abs().flatten() for w in weights.values()]).sort().values
    assert [quantile(weights.values(), k) for k in (1, 50, 182)] == [
        float(ordered[k - 1]) for k in (1, 50, 182)
    ]
    assert quantile(weights.values(), 0) == 0.0


@pytest.mark.parametrize("method", ["lp", "gradual", "one-shot"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_target_is_met_exactly_and_no_zero_comes_back(method: str, optimizer: str) -> None:
    weights = weights_of(3)
    make = {"adamw": torch.optim.AdamW, "sgd": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9)}[optimizer]
    inner = make(list(weights.values()), lr=0.05)
    step = step_of(method=method, target_sparsity="0.37", decay_share=0.5)
    zeros = drive(SparsityControl(step, dict(weights), inner, [0.05] * 60), inner, 60)
    assert zeros[-1] == int(Decimal("0.37") * 182) == 67
    assert zeros[30:] == [67] * 30
    assert method != "one-shot" or zeros == [67] * 60
    assert method != "gradual" or (0 < zeros[10] < 67 and zeros == sorted(zeros))


def test_keep_zeros_never_revives_a_zero() -> None:
    weights = weights_of(4)
    with torch.no_grad():
        weights["a"][weights["a"].abs() < 0.5] = 0
    start = weights["a"] == 0
    inner = torch.optim.AdamW(list(weights.values()), lr=0.05)
    control = SparsityControl(step_of(method="dense", keep_zeros=True), dict(weights), inner, [0.05] * 50)
    drive(control, inner, 50)
    assert torch.equal(weights["a"] == 0, start)


def test_auto_lambda_kills_up_to_the_quantile_it_aims_at() -> None:
    weights = weights_of(5)
    inner = torch.optim.SGD(list(weights.values()), lr=0.01)
    control = SparsityControl(
        step_of(p=0.8, warmup=0, allocation="global"), dict(weights), inner, [0.01] * 500
    )
    assert control.w_kill == pytest.approx(quantile(weights.values(), 91), rel=1e-6)
    for t in range(500):  # no gradient at all: what dies is what the formula says
        control.before_step(t)
        for weight in weights.values():
            weight.grad = torch.zeros_like(weight)
        inner.step()
        control.after_step(t)
    assert 0 <= control.zeros() - 91 <= 6  # settling takes what is far under w_kill with it


def test_a_number_for_lambda_is_ours_or_the_authors() -> None:
    inner = torch.optim.SGD(list(weights_of(6).values()), lr=0.01)
    ours, theirs = (
        SparsityControl(
            step_of(p=0.5, lambda_p=2.0, lambda_convention=kind), dict(weights_of(6)), inner, [0.01] * 9
        )
        for kind in ("ours", "authors")
    )
    assert (ours.base_lambda, theirs.base_lambda) == (2.0, 1.0)
    assert ours.w_kill == pytest.approx(kill_magnitude(0.5, 2.0, 0.08))  # 8 of 9 steps, then it settles


def test_with_a_target_only_weights_under_the_current_quantile_decay() -> None:
    weights = weights_of(7)
    inner = torch.optim.SGD(list(weights.values()), lr=0.01)
    control = SparsityControl(step_of(target_sparsity="0.5"), dict(weights), inner, [0.01] * 100)
    before = {name: w.detach().clone() for name, w in weights.items()}
    control.before_step(0)
    for weight in weights.values():
        weight.grad = torch.zeros_like(weight)
    inner.step()
    for name, weight in weights.items():
        above = before[name].abs() >= control.decay.below[id(weight)]
        assert torch.equal(weight[above], before[name][above])
        assert (weight[~above].abs() < before[name][~above].abs()).all()
        assert 0 < control.decay.below[id(weight)] < control.aim[name]


def test_lambda_is_steered_down_when_weights_arrive_early_and_up_when_late() -> None:
    steered = []
    for shrink in (1e-6, 1.0):
        weights = weights_of(8)
        inner = torch.optim.SGD(list(weights.values()), lr=1e-9)
        control = SparsityControl(
            step_of(target_sparsity="0.5", warmup=0), dict(weights), inner, [1e-9] * 100
        )
        with torch.no_grad():
            for weight in weights.values():
                weight.mul_(shrink)
        for t in (10, 20, 30):
            control.before_step(t)
        steered.append(control.steering)
    assert steered[0] < 1 < steered[1]
