"""Sparsity control: exact cuts, zeros held through momentum, the plan of a run."""

import copy
from decimal import Decimal
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed
from support.ranks import on_two_ranks
from torch import Tensor, nn

from lpsparse.errors import LpsparseError
from lpsparse.parallel import ranks
from lpsparse.steps.finetune import FinetuneStep
from lpsparse.steps.resolve import resolve
from lpsparse.training.allocation import SHARES, allocate, keep_only_, kth_smallest, smallest_masks
from lpsparse.training.conditioning import condition
from lpsparse.training.control import SparsityControl, quantile
from lpsparse.training.decay import kill_magnitude
from lpsparse.training.memory import estimate
from lpsparse.training.methods.dwf import Factors
from lpsparse.training.methods.rigl import is_due, regrow
from lpsparse.training.schedule import plan_phases
from lpsparse.training.scores import fisher


def step_of(**options: object) -> FinetuneStep:
    given = {"model": "m", "out": "o", "data": "d", "task": "causal-lm", "condition": "rows", **options}
    step = resolve(FinetuneStep, given)
    return step.model_copy(update={"score": "magnitude"}) if step.score == "auto" else step


def control_of(
    step: FinetuneStep, weights: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, steps: int
) -> SparsityControl:
    control = SparsityControl(step, dict(weights), optimizer, plan_phases(step, steps))
    control.begin()
    return control


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
        control.after_backward(t)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_kth_smallest_equals_a_sort_with_ties_zeros_and_any_magnitude(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(22)
    spread = torch.randn(997, generator=generator, dtype=dtype).abs() ** 9  # many powers of two
    close = 1 + 1e-6 * torch.rand(499, generator=generator, dtype=dtype)  # one bucket
    values = torch.cat([torch.zeros(101, dtype=dtype), spread, close, torch.full((53,), 0.25, dtype=dtype)])
    ordered = values.sort().values
    for count in (1, 101, 102, 500, 1098, 1300, len(values)):
        assert kth_smallest(values, count) == ordered[count - 1]


def test_what_is_not_kept_becomes_plus_zero_in_place_whatever_its_strides() -> None:
    values = torch.randn(13, 7, generator=torch.Generator().manual_seed(23)).t()
    keep = values > 0.1
    wanted = torch.where(keep, values, torch.zeros(()))
    keep_only_(values, keep)
    assert torch.equal(values, wanted) and not torch.signbit(values[~keep]).any()


def test_the_quantile_equals_a_sort() -> None:
    weights = weights_of(2)
    ordered = torch.cat([w.detach().abs().flatten() for w in weights.values()]).sort().values
    assert [quantile(weights.values(), k) for k in (1, 50, 182)] == [
        float(ordered[k - 1]) for k in (1, 50, 182)
    ]
    assert quantile(weights.values(), 0) == 0.0


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("count", [0, 1, 60, 181, 182])
def test_every_share_adds_up_and_asks_no_tensor_for_more_than_it_has(share: str, count: int) -> None:
    scores = {"a": torch.rand(3, 5), "b": torch.rand(11, 13), "c": torch.rand(2, 12)}
    counts = allocate(scores, count, share)
    assert sum(counts.values()) == count
    assert all(0 <= counts[name] <= scores[name].numel() for name in scores)


def test_uniform_is_one_sparsity_and_erk_spares_small_tensors() -> None:
    scores = {"small": torch.rand(10, 10), "large": torch.rand(40, 50)}
    assert allocate(scores, 1050, "uniform") == {"small": 50, "large": 1000}
    counts = allocate(scores, 1890, "erk")  # densities k * 20 / 100 and k * 90 / 2000
    kept = {name: scores[name].numel() - counts[name] for name in scores}
    assert kept["small"] / 100 == pytest.approx(kept["large"] / 2000 * (20 / 100) / (90 / 2000), rel=0.02)


def test_the_fisher_score_is_the_weight_times_the_root_of_the_mean_square_gradient() -> None:
    weights = weights_of(13)
    inner = torch.optim.AdamW(list(weights.values()), lr=1e-12)
    with pytest.raises(LpsparseError, match="no gradient has reached b, a"):
        fisher(dict(weights), inner)
    slope = {name: torch.rand(7, 13) for name in weights}
    for _ in range(25):
        for name, weight in weights.items():
            weight.grad = slope[name].clone()
        inner.step()
    scores = fisher(dict(weights), inner)
    for name, weight in weights.items():
        torch.testing.assert_close(scores[name], weight.detach().abs() * slope[name], rtol=1e-4, atol=1e-7)


METHODS_WITH_CUT = ["lp", "gradual", "one-shot", "l1", "dwf", "rigl"]


WAYS = [
    *((method, optimizer, "magnitude") for method in METHODS_WITH_CUT for optimizer in ("adamw", "sgd")),
    *((method, "adamw", "fisher") for method in ("lp", "gradual", "l1")),
]


@pytest.mark.parametrize(("method", "optimizer", "score"), WAYS)
def test_the_target_is_met_exactly_and_no_zero_comes_back(method: str, optimizer: str, score: str) -> None:
    weights = weights_of(3)
    make = {"adamw": torch.optim.AdamW, "sgd": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9)}[optimizer]
    inner = make(list(weights.values()), lr=0.05)
    step = step_of(
        method=method, target_sparsity="0.37", decay_share=0.5, lr=0.05, optimizer=optimizer, score=score
    )
    control = control_of(step, weights, inner, 60)
    zeros = drive(control, inner, 60)
    assert zeros[-1] == int(Decimal("0.37") * 182) == 67
    assert zeros[30:] == [67] * 30
    assert method not in ("one-shot", "rigl") or zeros == [67] * 60
    assert method != "gradual" or (0 < zeros[14] < 67 and zeros == sorted(zeros))
    groups = [param for group in inner.param_groups for param in group["params"]]
    assert {id(param) for param in groups} == {id(weight) for weight in weights.values()}
    average = "exp_avg" if optimizer == "adamw" else "momentum_buffer"
    for weight in weights.values():  # momentum of what is cut is gone
        assert not inner.state[weight][average][weight == 0].any()


OPTIONS = (
    {"score": "fisher"},
    {"masked_forward": True},
    {"cautious": True},
    {"prox": "irl1"},
    {"p_start": 2.0},
    {"lambda_2": 0.1},
    {"selective": False},
    {"ramp": "none"},
    {"allocation": "erk"},
    {"lr_schedule": "cosine"},
    {"cut": "gradual"},
)


class Restless(torch.optim.Optimizer):
    """Moves every weight, whatever its gradient is, as an orthogonalized step does."""

    def step(self, closure: object = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                param.data.add_(0.01)


def test_zeros_are_held_against_an_optimizer_that_moves_what_has_no_gradient() -> None:
    weights = weights_of(8)
    optimizer = Restless(weights.values(), {})
    step = step_of(method="gradual", target_sparsity="0.8", condition="none")
    assert drive(control_of(step, weights, optimizer, 30), optimizer, 30)[-15:] == [145] * 15


def test_clipping_sees_the_gradients_of_what_lives_alone() -> None:
    weights = weights_of(8)
    optimizer = torch.optim.SGD(weights.values(), lr=0.0)
    control = control_of(step_of(method="one-shot", target_sparsity="0.8"), weights, optimizer, 30)
    drive(control, optimizer, 3)
    for weight in weights.values():
        weight.grad = torch.ones_like(weight)
    control.after_backward(3)
    norm = torch.nn.utils.get_total_norm([w.grad for w in weights.values() if w.grad is not None])
    assert norm.item() == pytest.approx((182 - 145) ** 0.5)


def decayed_with(options: dict[str, object]) -> Tensor:
    """All weights after a run whose gradients depend on them."""
    base = {
        "score": "magnitude",
        "masked_forward": False,
        "allocation": "global",
        "decay_share": 0.6,
        "lr": 0.05,
    }
    weights = weights_of(14)
    inner = torch.optim.AdamW(list(weights.values()), lr=0.05, weight_decay=0.0)
    control = control_of(step_of(target_sparsity="0.5", **base | options), weights, inner, 60)
    generator = torch.Generator().manual_seed(9)
    for t in range(60):
        inner.param_groups[0]["lr"] = control.rates[t]
        control.before_step(t)
        for weight in weights.values():
            weight.grad = (weight.detach().sum() + weight.detach()) * torch.randn(7, 13, generator=generator)
        control.after_backward(t)
        inner.step()
        control.after_step(t)
    assert control.zeros() == 91
    return torch.cat([weight.detach().flatten() for weight in weights.values()])


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: next(iter(options)))
def test_every_option_of_the_decay_meets_the_target_and_changes_the_run(options: dict[str, object]) -> None:
    assert torch.equal(decayed_with({}), decayed_with({}))
    assert not torch.equal(decayed_with({}), decayed_with(options))


def test_phases_follow_one_another_and_the_target_rises_cubically() -> None:
    phases = plan_phases(step_of(method="gradual", target_sparsity="0.8", warmup=0.1, decay_share=0.4), 100)
    assert (phases.warmup, phases.start, phases.cut_at, phases.steps) == (10, 10, 40, 100)
    rise = [phases.rise(t) for t in range(101)]
    assert rise[:11] == [0.0] * 11 and rise[40:] == [1.0] * 61
    assert rise[25] == pytest.approx(1 - 0.5**3)
    assert phases.in_words() == "10 warm-up, 30 decay, 60 recovery"


@pytest.mark.parametrize("shape", ["cosine", "linear", "restart"])
def test_the_learning_rate_rises_once_and_ends_near_zero(shape: str) -> None:
    step = step_of(target_sparsity="0.8", warmup=0.1, decay_share=0.4, lr_schedule=shape)
    rates = [plan_phases(step, 200).rate(t) for t in range(200)]
    assert rates[19] == 1.0 and rates[:20] == sorted(rates[:20])
    assert all(0 <= rate <= 1 for rate in rates) and rates[-1] < 0.02
    assert (rates[80] > rates[79]) == (shape == "restart")


@pytest.mark.parametrize(("warmup", "share"), [(0.05, 0.4), (0.9, 0.4), (0.5, 0.1), (0.0, 1.0)])
@pytest.mark.parametrize("method", ["lp", "gradual", "one-shot"])
def test_a_run_of_any_length_has_phases_and_rates_without_a_cliff(
    method: str, warmup: float, share: float
) -> None:
    step = step_of(target_sparsity="0.8", warmup=warmup, decay_share=share, method=method)
    for score, steps in product(("magnitude", "fisher"), (*range(1, 40), 100, 1000)):
        phases = plan_phases(step.model_copy(update={"score": score}), steps)
        assert method == "lp" or phases.start <= phases.cut_at // 2
        rates = [phases.rate(t) for t in range(steps)]
        assert all(0 <= rate <= 1 for rate in rates) and max(rates) > 0.6
        after = rates[max(phases.cut_at, phases.warmup) :]
        assert after == sorted(after, reverse=True) and (share == 1 or not after or after[0] == 1.0)


def test_the_decay_phase_alone_and_the_recovery_alone_can_be_run() -> None:
    weights = weights_of(15)
    inner = torch.optim.AdamW(list(weights.values()), lr=0.05)
    whole = step_of(target_sparsity="0.5", decay_share=1.0, lr=0.05, score="fisher")
    alone = control_of(whole, weights, inner, 60)
    assert drive(alone, inner, 60)[-1] == 91
    assert alone.phases.cut_at == 60
    assert alone.rates[-1] < 0.01 * 0.05  # nothing to restart for
    inner = torch.optim.AdamW(list(weights.values()), lr=0.05)
    recovery = control_of(step_of(method="dense", keep_zeros=True, lr=0.05), weights, inner, 30)
    assert drive(recovery, inner, 30) == [91] * 30


@pytest.mark.parametrize("allocation", SHARES)
@pytest.mark.parametrize(
    "way",
    [
        {"method": "lp"},
        {"method": "lp", "score": "fisher"},
        {"method": "gradual"},
        {"method": "one-shot"},
        {"method": "l1", "lambda_p": 9.0},
        {"method": "lp", "selective": False, "lambda_p": 300.0},
    ],
    ids=lambda way: "-".join(str(value) for value in way.values()),
)
def test_keep_zeros_never_revives_a_zero(way: dict[str, object], allocation: str) -> None:
    """Not even where its tensor has more zeros than its share, or where living weights are zero too."""
    weights = weights_of(4)
    with torch.no_grad():
        weights["b"][weights["b"].abs() < 1.3] = 0
    start = weights["b"] == 0
    assert int(start.sum()) > 0.7 * 91
    inner = torch.optim.AdamW(list(weights.values()), lr=0.05)
    step = step_of(**way, allocation=allocation, keep_zeros=True, lr=0.05, target_sparsity="0.6")
    control = control_of(step, weights, inner, 50)
    drive(control, inner, 50)
    assert bool((weights["b"][start] == 0).all())
    assert control.zeros() >= 109
    assert sum(int((~keep).sum()) for keep in control.masks.values()) == 109


def test_auto_lambda_kills_up_to_the_quantile_it_aims_at() -> None:
    weights = weights_of(5)
    inner = torch.optim.SGD(list(weights.values()), lr=0.01)
    step = step_of(p=0.8, warmup=0, allocation="global", lr=0.01, lr_schedule="linear")
    control = control_of(step, weights, inner, 500)
    assert control.w_kill == pytest.approx(quantile(weights.values(), 91), rel=1e-6)
    for t in range(500):  # no gradient at all: what dies is what the formula says
        inner.param_groups[0]["lr"] = control.rates[t]
        control.before_step(t)
        for weight in weights.values():
            weight.grad = torch.zeros_like(weight)
        inner.step()
        control.after_step(t)
    assert 0 <= control.zeros() - 91 <= 10  # settling takes what is far under w_kill with it


@pytest.mark.parametrize("depth", [2, 4])
def test_a_number_for_lambda_decays_each_factor_by_it_or_by_the_authors_two_over_depth(depth: int) -> None:
    decays: list[float] = []
    for kind in ("ours", "authors"):
        step = step_of(
            method="dwf", factors=depth, target_sparsity="0.5", lambda_p=0.3, lambda_convention=kind, lr=0.01
        )
        control = control_of(step, weights_of(6), torch.optim.AdamW(weights_of(6).values()), 9)
        assert control.method.factors is not None
        decays.append(control.method.factors.decay)
    assert decays == pytest.approx([0.3, 0.6 / depth])


def test_the_ridge_acts_where_lambda_is_zero() -> None:
    weights = weights_of(21)
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    inner = torch.optim.SGD(list(weights.values()), lr=0.1)
    step = step_of(lambda_p=0.0, lambda_2=1.0, lr=0.1, warmup=0, p=1.0)
    control = control_of(step, weights, inner, 1)
    control.before_step(0)
    for weight in weights.values():
        weight.grad = torch.zeros_like(weight)
    inner.step()
    assert all(torch.equal(weights[name], before[name] / 1.1) for name in weights)


def test_a_number_for_lambda_is_ours_or_the_authors() -> None:
    inner = torch.optim.SGD(list(weights_of(6).values()), lr=0.01)
    ours, theirs = (
        control_of(step_of(p=0.5, lambda_p=2.0, lambda_convention=kind, lr=0.01), weights_of(6), inner, 9)
        for kind in ("ours", "authors")
    )
    assert (ours.method.base_lambda, theirs.method.base_lambda) == (2.0, 1.0)
    assert ours.w_kill == pytest.approx(kill_magnitude(0.5, 2.0, sum(ours.rates[:8])))  # then it settles


@pytest.mark.parametrize("score", ["magnitude", "fisher"])
def test_with_a_target_only_weights_that_the_current_target_would_cut_decay(score: str) -> None:
    weights = weights_of(7)
    inner = torch.optim.AdamW(list(weights.values()), lr=1e-6, weight_decay=0.0)
    control = control_of(
        step_of(target_sparsity="0.5", score=score, lr=1e-6, masked_forward=False), weights, inner, 100
    )
    slope = {name: torch.rand(7, 13) for name in weights}
    for t in range(control.phases.start + 1):
        before = {name: w.detach().clone() for name, w in weights.items()}
        scores = fisher(dict(weights), inner) if score == "fisher" and t else before
        control.before_step(t)
        for name, weight in weights.items():
            weight.grad = 0 * slope[name] if t == control.phases.start else slope[name].clone()
        inner.step()
    assert control.method.decay is not None
    if score == "magnitude":
        moved = {name: (weights[name] / before[name]).detach() for name in weights}
        assert all((moved[name][control.method.spare[name]] > 1 - 1e-4).all() for name in weights)
        assert all((moved[name][~control.method.spare[name]] < 1 - 1e-4).all() for name in weights)
    gone = sum(int((~keep).sum()) for keep in control.method.spare.values())
    assert gone == control.scheduled(control.phases.start + 10) > 0
    kept = torch.cat([scores[name].abs()[control.method.spare[name]] for name in weights])
    assert (
        torch.cat([scores[name].abs()[~control.method.spare[name]] for name in weights]).max() <= kept.min()
    )


@pytest.mark.parametrize("score", ["magnitude", "fisher"])
def test_a_gradual_cut_follows_the_target_and_decays_the_part_that_comes_next(score: str) -> None:
    weights = weights_of(21)
    inner = torch.optim.AdamW(list(weights.values()), lr=0.05)
    step = step_of(target_sparsity="0.5", cut="gradual", lr=0.05, warmup=0.1, decay_share=0.6, score=score)
    control = control_of(step, weights, inner, 100)
    zeros = drive(control, inner, 100)
    assert zeros == sorted(zeros) and zeros[:10] == [0] * 10 and zeros[59:] == [91] * 41
    for done in range(20, 61, 10):
        assert zeros[done - 1] == control.scheduled(done)  # what decayed to zero before is part of it
        assert zeros[min(99, done + 8)] <= control.scheduled(done + 10)


def test_lambda_is_steered_down_when_weights_arrive_early_and_up_when_late() -> None:
    steered = []
    for shrink in (1e-6, 1.0):
        weights = weights_of(8)
        inner = torch.optim.SGD(list(weights.values()), lr=1e-9)
        step = step_of(
            masked_forward=False, target_sparsity="0.5", warmup=0, lr=1e-9, score="magnitude", decay_share=0.6
        )
        control = control_of(step, weights, inner, 100)
        with torch.no_grad():
            for weight in weights.values():
                weight.mul_(shrink)
        for t in (0, 10, 20, 30, 40):
            control.before_step(t)
        steered.append(control.method.steering)
    assert steered[0] < 1 < steered[1]


def test_a_covered_weight_is_zero_in_the_forward_pass_and_back_after_the_backward_pass() -> None:
    weights = weights_of(16)
    inner = torch.optim.SGD(list(weights.values()), lr=0.01)
    step = step_of(target_sparsity="0.5", masked_forward=True, lr=0.01, score="magnitude")
    control = control_of(step, weights, inner, 100)
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    t = control.phases.start
    control.before_step(t)
    assert control.zeros() == control.scheduled(t + 10) > 0
    control.after_backward(t)
    assert all(torch.equal(weights[name], before[name]) for name in weights)


def test_rigl_exchanges_the_smallest_for_the_largest_gradients_and_keeps_the_count() -> None:
    weights: dict[str, Tensor] = {"a": nn.Parameter(torch.tensor([[1.0, 2.0, 3.0, 4.0, 0.0, 0.0, 0.0, 0.0]]))}
    weights["a"].grad = torch.tensor([[9.0, 9.0, 9.0, 9.0, 0.1, 0.2, -5.0, 0.3]])
    mask = {"a": torch.tensor([[True] * 4 + [False] * 4])}
    after = regrow(weights, mask, 0, 100)["a"]  # a / 2 * 2 = 0.3 of 4: one
    assert after.tolist() == [[True, True, True, True, False, False, False, False]]  # the dropped grew back
    weights["a"].grad[0, 0] = 0.0
    assert regrow(weights, mask, 0, 100)["a"].tolist() == [
        [False, True, True, True, False, False, True, False]
    ]
    assert not is_due(76, 100) and is_due(50, 100)


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_factors_start_as_the_weight_and_move_by_the_product_rule(depth: int) -> None:
    weights = {name: nn.Parameter(weight.detach().double()) for name, weight in weights_of(17).items()}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    inner = torch.optim.SGD(list(weights.values()), lr=0.01)
    factors = Factors(dict(weights), inner, depth, sum_lr=1.0, lambda_p=0.0)
    slope = {name: torch.rand(7, 13, dtype=torch.float64) for name in weights}
    for name, weight in weights.items():
        weight.grad = slope[name].clone()
    inner.step()
    for name, weight in weights.items():
        root = before[name].abs() ** (1 / depth)
        first = before[name].sign() * root
        moved = first - 0.01 * slope[name] * root ** (depth - 1)
        others = root - 0.01 * slope[name] * first * root ** (depth - 2)
        torch.testing.assert_close(weight.detach(), moved * others ** (depth - 1))
    factors.remove()
    assert len(inner.param_groups) == 1


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("depth", [2, 3])
def test_factors_decay_alike_under_every_optimizer_and_follow_a_retraction(
    make: type[torch.optim.AdamW] | type[torch.optim.SGD], depth: int
) -> None:
    weights = weights_of(20)
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    inner = make(list(weights.values()), lr=0.01, **({"momentum": 0.9} if make is torch.optim.SGD else {}))
    Factors(dict(weights), inner, depth, sum_lr=0.5, lambda_p="auto")
    inner.load_state_dict(inner.state_dict())  # as accelerate does; the groups are new objects
    for t in range(50):  # learning rates add up to 0.5: a product that nothing holds falls to a twentieth
        for group in inner.param_groups:
            group["lr"] = 0.015 if t % 2 else 0.005
        for weight in weights.values():
            weight.grad = torch.zeros_like(weight)
        inner.step()
    for name, weight in weights.items():
        torch.testing.assert_close(weight.detach(), before[name] / 20, rtol=1e-3, atol=1e-7)
        with torch.no_grad():
            weight.mul_(5.0)  # as conditioning does
        weight.grad = torch.zeros_like(weight)
    inner.step()
    kept = 1 / 20 ** (0.015 / 0.5)
    for name, weight in weights.items():
        torch.testing.assert_close(weight.detach(), kept * before[name] / 4, rtol=1e-3, atol=1e-7)


def run_from(control: SparsityControl, inner: torch.optim.Optimizer, steps: range) -> None:
    for t in steps:
        control.before_step(t)
        for weight in control.weights.values():
            weight.grad = 0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(t))
        control.after_backward(t)
        inner.step()
        control.after_step(t)


@pytest.mark.parametrize(
    ("method", "score"), [("lp", "magnitude"), ("lp", "fisher"), ("gradual", "fisher"), ("rigl", "magnitude")]
)
@pytest.mark.parametrize("at", [17, 45])
def test_a_run_that_is_taken_up_again_ends_in_the_same_bits(method: str, score: str, at: int) -> None:
    step = step_of(method=method, target_sparsity="0.5", decay_share=0.5, lr=0.05, score=score)
    whole, ended = weights_of(18), weights_of(18)
    inner = torch.optim.AdamW(list(whole.values()), lr=0.05)
    run_from(control_of(step, whole, inner, 60), inner, range(60))
    first = torch.optim.AdamW(list(ended.values()), lr=0.05)
    control = control_of(step, ended, first, 60)
    run_from(control, first, range(at))
    state = copy.deepcopy((control.state_dict(), first.state_dict()))
    fresh = weights_of(18)
    second = torch.optim.AdamW(list(fresh.values()), lr=0.05)
    taken_up = control_of(step, fresh, second, 60)
    with torch.no_grad():
        for name, weight in fresh.items():
            weight.copy_(ended[name])
    second.load_state_dict(state[1])
    taken_up.load_state_dict(state[0])
    run_from(taken_up, second, range(at, 60))
    assert all(torch.equal(whole[name], fresh[name]) for name in whole)


def _rank(rank: int, out: str, way: str) -> None:
    torch.distributed.init_process_group("gloo")
    torch.save(_trained(rank, 2, way), f"{out}/{rank}.pt")


def _trained(rank: int, world_size: int, way: str) -> dict[str, Tensor]:
    """Weights after 50 steps of the default's loop, and under DDP of rows too, on this rank's share of each
    batch, or on all of it."""
    torch.manual_seed(19)
    model: nn.Module = nn.Sequential(nn.Linear(7, 13), nn.Tanh(), nn.Linear(13, 5)).double()
    if way == "FSDP2" and world_size > 1:
        ranks.distribute(model, torch.device("cpu"), [model[0]], shard=True, bf16=False)  # type: ignore[index]
    weights = {name: param for name, param in model.named_parameters() if name.endswith("weight")}
    inner = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    if way == "DDP":
        condition(model, "rows").attach(inner)
    step = step_of(target_sparsity="0.5", lr=0.01, decay_share=0.5, score="fisher")
    control = control_of(step, weights, inner, 50)
    wrapped = nn.parallel.DistributedDataParallel(model) if world_size > 1 and way == "DDP" else model
    for t in range(50):
        inner.zero_grad()
        inner.param_groups[0]["lr"] = control.rates[t]
        control.before_step(t)
        shared = torch.randn(12, 7, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
        x = shared[rank::world_size]
        (wrapped(x) - x[:, :5].sin()).square().mean().backward()
        control.after_backward(t)
        inner.step()
        control.after_step(t)
    return {name: ranks.full_tensor(weight.detach()) for name, weight in weights.items()}


@pytest.mark.parametrize("way", ["DDP", "FSDP2"])
def test_two_ranks_agree_with_one_process_and_have_its_zeros(way: str, tmp_path: Path) -> None:
    on_two_ranks(_rank, str(tmp_path), way)
    alone = _trained(0, 1, way)
    assert sum(int((weight == 0).sum()) for weight in alone.values()) == (7 * 13 + 13 * 5) // 2
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        for name, weight in alone.items():
            torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-5)
            assert torch.equal(found[name] == 0, weight == 0)


@pytest.mark.parametrize("way", [{}, {"method": "gradual"}, {"target_sparsity": None}, {"method": "dense"}])
def test_the_estimate_of_memory_is_what_a_run_keeps(way: dict[str, object]) -> None:
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32))
    weights = {"0.weight": model[0].weight, "2.weight": model[2].weight}
    inner = torch.optim.AdamW(model.parameters(), lr=0.01)
    given = {"target_sparsity": "0.5", "condition": "none", **way}
    if way.get("method") == "dense":
        del given["target_sparsity"]
    step = step_of(**{key: value for key, value in given.items() if value is not None})
    control = control_of(step, weights if step.method != "dense" else {}, inner, 60)
    for t in range(20):
        control.before_step(t)
        model(torch.randn(5, 64)).square().mean().backward()
        control.after_backward(t)
        inner.step()
        control.after_step(t)
    tensors = [*model.parameters(), *(param.grad for param in model.parameters())]
    tensors += [each for state in inner.state.values() for each in state.values()]
    tensors += [*control.masks.values(), *control.state_dict()["spare"].values(), *control.covered.values()]
    kept = sum(each.numel() * each.element_size() for each in tensors if each is not None and each.ndim)
    size, prunable = sum(param.numel() for param in model.parameters()), 64 * 96 + 96 * 32
    found = estimate(step, trained=size, frozen=0, prunable=prunable, processes=1)
    assert found.kept == kept
    shared = estimate(
        step.model_copy(update={"shard": True}), trained=size, frozen=0, prunable=prunable, processes=4
    )
    assert shared.kept == kept // 4 and shared.exchanged == 3 * (2 * 4 + 4) * size // 4
