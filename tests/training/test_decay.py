"""Decoupled L_p decay: the update identity first, then what it implies (arXiv 2404.10824)."""

import copy
import math

import pytest
import torch
from torch import nn

from lpsparse import LpAdamW, LpDecay, LpsparseError
from lpsparse.training.compiled import _compiled, compiled, fast_power
from lpsparse.training.decay import budget_lambda, kill_magnitude, lp_, lp_divisor

PS = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 3.0)
OPTIMIZERS = {
    "adamw": lambda params, lr: torch.optim.AdamW(params, lr=lr, weight_decay=0.0),
    "adamw-foreach": lambda params, lr: torch.optim.AdamW(params, lr=lr, weight_decay=0.0, foreach=True),
    "adamw-fused": lambda params, lr: torch.optim.AdamW(params, lr=lr, weight_decay=0.0, fused=True),
    "sgd": lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9),
    "adafactor": lambda params, lr: torch.optim.Adafactor(params, lr=lr, weight_decay=0.0),
    "muon": lambda params, lr: torch.optim.Muon([p for p in params if p.ndim == 2], lr=lr, weight_decay=0.0),
    "rmsprop": lambda params, lr: torch.optim.RMSprop(params, lr=lr),
}


def reference(w: float, v: float, a: float, p: float, q: float) -> float:
    """The definition, in float64."""
    if w == 0:
        return 0.0 if p < 2 else v / (1 + a * q * (p == 2))
    return v / (1 + a * q * abs(w) ** (p - 2))


def model_of(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(7, 13), nn.Tanh(), nn.Linear(13, 5)).double()


def one_backward(model: nn.Module, seed: int) -> None:
    x = torch.randn(11, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    model.zero_grad()
    model(x).square().mean().backward()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("p", PS)
def test_a_step_is_the_optimizers_step_times_the_factor_of_the_old_weight(name: str, p: float) -> None:
    plain, decayed = model_of(1), model_of(1)
    base, ours = OPTIMIZERS[name](plain.parameters(), 0.01), OPTIMIZERS[name](decayed.parameters(), 0.01)
    LpDecay(ours, p=p, lambda_p=0.3)
    for lr in (0.01, 0.003):  # a schedule: the decay follows the learning rate of each step
        plain.load_state_dict(decayed.state_dict())
        for optimizer in (base, ours):
            optimizer.param_groups[0]["lr"] = lr
        old = copy.deepcopy(plain.state_dict())
        one_backward(plain, 2), one_backward(decayed, 2)
        base.step(), ours.step()
        for key, value in decayed.state_dict().items():
            v = plain.state_dict()[key]
            if value.ndim == 1:
                assert torch.equal(value, v)  # biases are not decayed
            else:
                pairs = zip(old[key].flatten().tolist(), v.flatten().tolist(), strict=True)
                wanted = torch.tensor([reference(w, u, lr, p, 0.3) for w, u in pairs], dtype=torch.float64)
                torch.testing.assert_close(value.flatten(), wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_lambda_zero_is_bit_identical_to_the_base_optimizer(name: str) -> None:
    plain, decayed = model_of(3), model_of(3)
    base, ours = OPTIMIZERS[name](plain.parameters(), 0.01), OPTIMIZERS[name](decayed.parameters(), 0.01)
    LpDecay(ours, p=0.8, lambda_p=0.0)
    for t in range(5):
        one_backward(plain, t), one_backward(decayed, t)
        base.step(), ours.step()
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), decayed.parameters(), strict=True))


@pytest.mark.parametrize("p", PS)
def test_decay_never_flips_a_sign_grows_a_weight_or_leaves_the_finite(p: float) -> None:
    w = torch.tensor([0.0, -0.0, 1e-38, -1e-30, 1e-8, -0.3, 1.0, -7.0, 1e30, -3e38])
    v = torch.tensor([0.5, -0.5, 1e-38, -1e-20, 1e-8, -0.3, 2.0, -7.0, 1e30, -3e38])
    out = lp_(v.clone(), w, lr=0.1, p=p, lambda_p=2.0)
    assert torch.isfinite(out).all()
    assert (out.abs() <= v.abs()).all()
    assert ((out == 0) | (out.sign() == v.sign())).all()


@pytest.mark.parametrize("p", [p for p in PS if p < 2])
def test_an_exact_zero_is_absorbing(p: float) -> None:
    weight = nn.Parameter(torch.tensor([[0.0, 0.5], [0.0, -0.5]]))
    optimizer = LpAdamW([weight], lr=0.1, p=p, lambda_p=1e-3)
    for t in range(20):
        weight.grad = torch.full_like(weight, (-1.0) ** t * (t + 1))
        optimizer.step()
    assert torch.equal(weight[:, 0], torch.zeros(2))
    assert (weight[:, 1] != 0).all()


@pytest.mark.parametrize("p", [0.5, 0.8, 1.2])
def test_w_kill_is_where_weights_without_gradient_die(p: float) -> None:
    steps, lr = 6000, 1e-3
    q = budget_lambda(p, 0.02, steps * lr)
    assert math.isclose(kill_magnitude(p, q, steps * lr), 0.02, rel_tol=1e-12)
    w = torch.linspace(0.0190, 0.0210, 201, dtype=torch.float64)
    for _ in range(steps):
        lp_(w, w.clone(), lr=lr, p=p, lambda_p=q)
    # Beyond p = 1 the last digits fade slowly: dead means far below the survivors' scale.
    edge = torch.linspace(0.0190, 0.0210, 201)[(w < 1e-3 * 0.02).nonzero().max()]
    assert abs(float(edge) - 0.02) < 0.01 * 0.02


def test_doubling_lr_and_halving_lambda_leaves_the_dead_weights_the_same() -> None:
    dead = []
    for lr, q in ((1e-3, 0.4), (2e-3, 0.2)):
        w = torch.linspace(1e-3, 0.1, 997, dtype=torch.float64)
        for _ in range(5000):
            lp_(w, w.clone(), lr=lr, p=0.8, lambda_p=q)
        dead.append(int((w == 0).sum()))
    assert dead[0] == dead[1] > 0


@pytest.mark.parametrize("p", [0.5, 0.8])
def test_a_quadratic_keeps_its_weight_only_above_the_survival_threshold(p: float) -> None:
    q, h = 0.005, 1.0
    edge = ((q / h) * (2 - p) ** (2 - p) * (1 - p) ** (p - 1)) ** (1 / (2 - p))
    minima = torch.tensor([0.98 * edge, 1.02 * edge], dtype=torch.float64)
    w = minima.clone()
    for _ in range(20_000):
        old = w.clone()
        w -= 0.05 * h * (w - minima)
        lp_(w, old, lr=0.05, p=p, lambda_p=q)
    assert w[0] == 0
    assert w[1] > 0.99 * edge * (1 - p) / (2 - p)  # the border value


def test_a_tied_tensor_decays_once_and_a_tensor_without_gradient_not_at_all() -> None:
    tied, idle = nn.Parameter(torch.full((3, 2), 0.5)), nn.Parameter(torch.full((3, 2), 0.5))
    optimizer = torch.optim.SGD([{"params": [tied]}, {"params": [idle]}], lr=0.1)
    LpDecay(optimizer, p=1.0, lambda_p=1.0, params=[tied, tied, idle])
    tied.grad = torch.zeros_like(tied)
    optimizer.step()
    torch.testing.assert_close(tied.detach(), torch.full((3, 2), 0.5 / (1 + 0.1 / 0.5)))
    assert torch.equal(idle, torch.full((3, 2), 0.5))


def test_remove_detaches_and_half_precision_is_refused() -> None:
    weight = nn.Parameter(torch.full((2, 2), 0.5))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    LpDecay(optimizer, p=0.8, lambda_p=1.0).remove()
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert torch.equal(weight, torch.full((2, 2), 0.5))
    half = torch.optim.SGD([nn.Parameter(torch.zeros(2, 2, dtype=torch.bfloat16))], lr=0.1)
    with pytest.raises(LpsparseError, match="float32"):
        LpDecay(half, lambda_p=1.0)
    with pytest.raises(LpsparseError, match="p > 0"):
        LpDecay(optimizer, p=0.0, lambda_p=1.0)


def test_p_and_lambda_live_in_the_state_dict_and_another_p_warns() -> None:
    first = LpAdamW([nn.Parameter(torch.ones(2, 2))], p=0.5, lambda_p=0.25)
    second = LpAdamW([nn.Parameter(torch.ones(2, 2))], p=0.8, lambda_p=0.1)
    state = first.state_dict()
    assert state["param_groups"][0]["lp_p"] == 0.5
    with pytest.warns(UserWarning, match=r"p = 0\.5.*p = 0\.8"):
        second.load_state_dict(state)
    assert second.param_groups[0]["lp_lambda"] == 0.25


def test_the_state_of_a_plain_optimizer_can_be_loaded_under_the_decay() -> None:
    model = model_of(3)
    plain = torch.optim.AdamW(model.parameters(), lr=0.1)
    saved = plain.state_dict()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.2)
    LpDecay(optimizer, p=0.5, lambda_p=0.3)
    optimizer.load_state_dict(saved)
    one_backward(model, 3)
    optimizer.step()
    group = optimizer.param_groups[0]
    assert (group["lr"], group["lp_p"], group["lp_lambda"]) == (0.1, 0.5, 0.3)
    assert "lp_p" not in saved["param_groups"][0]  # the caller's own table is left as it was


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_loss_scaler_skips_decays_nothing(fused: bool) -> None:
    model = model_of(4).float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0, fused=fused)
    LpDecay(optimizer, p=0.8, lambda_p=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = [param.detach().clone() for param in model.parameters()]
    for value, moves in ((float("inf"), False), (1.0, True)):
        optimizer.zero_grad()
        scaler.scale(model(torch.full((2, 7), value)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)) == moves


def steps_of(make, p: float, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """The parameters after ten steps of a small model; one weight starts at zero."""
    model = model_of(5).to(dtype)
    with torch.no_grad():
        model[0].weight[0, 0] = 0.0
    optimizer = make(model, p)
    for t in range(10):
        x = torch.randn(11, 7, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
        optimizer.zero_grad()
        model(x.to(dtype)).square().mean().backward()
        optimizer.step()
    return [param.detach() for param in model.parameters()]


@pytest.mark.parametrize("p", [0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("one_pass", [True, False])
def test_lp_adamw_gives_the_numbers_of_adamw_and_the_hooks(p: float, one_pass: bool) -> None:
    def hooks(model: nn.Module, p: float) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
        LpDecay(optimizer, p=p, lambda_p=0.1)
        return optimizer

    def fused(model: nn.Module, p: float) -> torch.optim.Optimizer:
        return LpAdamW(model.parameters(), lr=0.01, p=p, lambda_p=0.1, one_pass=one_pass)

    for ours, wanted in zip(steps_of(fused, p), steps_of(hooks, p), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=3e-5, atol=1e-7)
        assert torch.equal(ours == 0, wanted == 0)


def test_lp_adamw_without_lambda_is_adamw_bit_for_bit_and_their_states_are_one_another_s() -> None:
    def plain(model: nn.Module, p: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)

    def fused(model: nn.Module, p: float) -> torch.optim.Optimizer:
        return LpAdamW(model.parameters(), lr=0.01, p=p, lambda_p=0.0)

    assert all(torch.equal(a, b) for a, b in zip(steps_of(plain, 0.8), steps_of(fused, 0.8), strict=True))
    for give, take in ((plain, fused), (fused, plain)):
        first, second = model_of(6), model_of(6)
        source, target = give(first, 0.8), take(second, 0.8)
        for t in range(3):
            one_backward(first, t)
            source.step()
        second.load_state_dict(first.state_dict())
        target.load_state_dict(copy.deepcopy(source.state_dict()))
        assert take is plain or target.param_groups[0]["lp_p"] == 0.8
        for t in range(3, 6):
            for model, optimizer in ((first, source), (second, target)):
                one_backward(model, t)
                optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_lp_adamw_takes_groups_that_come_later_and_leaves_a_group_s_own_p() -> None:
    first, second = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = LpAdamW([{"params": [first], "lp_p": 1.5}], lr=0.1, p=0.5, lambda_p=1.0, one_pass=False)
    optimizer.add_param_group({"params": [second]})
    for weight in (first, second):
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert [group["lp_p"] for group in optimizer.param_groups] == [1.5, 0.5]
    torch.testing.assert_close(second.detach(), torch.full((2, 2), 1 / 1.1))
    with pytest.raises(LpsparseError, match="float32"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))]})


@pytest.mark.parametrize("p", [0.5, 0.8, 1.0, 1.5])
def test_compiled_hooks_agree_with_plain_ones_and_spare_what_they_should(p: float) -> None:
    spare = torch.rand(13, 7, generator=torch.Generator().manual_seed(1)) < 0.5

    def made(compile: bool):
        def make(model: nn.Module, p: float) -> torch.optim.Optimizer:
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
            decay = LpDecay(optimizer, p=p, lambda_p=0.1, lambda_2=0.2, compile=compile)
            decay.spare = {id(model[0].weight): spare}
            return optimizer

        return make

    for ours, wanted in zip(steps_of(made(True), p), steps_of(made(False), p), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=3e-5, atol=1e-7)


def test_without_a_compiler_the_numbers_come_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr("lpsparse.training.compiled._compiled", _compiled.__wrapped__)  # no cache
    assert compiled("step", torch.ones(3), 0.8) is None
    weight = nn.Parameter(torch.full((2, 2), 0.5))
    optimizer = LpAdamW([weight], lr=0.1, p=1.0, lambda_p=1.0)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((2, 2), 0.5 / (1 + 0.1 / 0.5)))


def test_the_fast_power_is_a_power() -> None:
    size = torch.logspace(-30, 8, 5001)
    for exponent in (-1.7, -1.2, -0.5, 0.3):
        exact = size.double() ** torch.tensor(exponent).double()
        inside = (exact > 1e-35) & (exact < 1e35)
        found = fast_power(size, torch.tensor(exponent)).double()
        torch.testing.assert_close(found[inside], exact[inside], rtol=2e-5, atol=0)


@pytest.mark.parametrize("p", PS)
def test_the_divisor_is_the_papers_factor(p: float) -> None:
    w = torch.tensor([1e-6, 0.01, 0.3, 2.0, 50.0], dtype=torch.float64)
    power = w ** (2 - p)
    torch.testing.assert_close(1 / lp_divisor(w, 0.1, p, 0.7), power / (power + 0.07), rtol=1e-12, atol=0)


def test_the_ridge_alone_shrinks_all_weights_alike() -> None:
    v = torch.tensor([0.0, 1e-3, -0.5, 7.0])
    out = lp_(v.clone(), v, lr=0.1, p=0.5, lambda_p=0.0, lambda_2=2.0)
    torch.testing.assert_close(out, v / 1.2)


def test_cautious_decay_touches_only_weights_that_the_step_moves_towards_zero() -> None:
    w = torch.tensor([0.5, 0.5, -0.5, -0.5])
    v = torch.tensor([0.4, 0.6, -0.4, -0.6])
    out = lp_(v.clone(), w, lr=0.1, p=0.8, lambda_p=1.0, cautious=True)
    assert torch.equal(out[[1, 3]], v[[1, 3]])
    assert (out[[0, 2]].abs() < v[[0, 2]].abs()).all()


def test_spared_weights_are_left_bit_for_bit() -> None:
    v, w = torch.rand(5, 7) + 0.1, torch.rand(5, 7) + 0.1
    spare = torch.rand(5, 7) < 0.5
    for prox in ("pwd", "irl1"):
        out = lp_(v.clone(), w, lr=0.1, p=0.8, lambda_p=0.1, prox=prox, spare=spare)
        assert torch.equal(out[spare], v[spare]) and (out[~spare] < v[~spare]).all()


def test_irl1_has_the_fixed_points_of_the_decay_and_reaches_zero_in_finitely_many_steps() -> None:
    minima = torch.tensor([0.01, 0.3], dtype=torch.float64)
    ends = {}
    for prox in ("pwd", "irl1"):
        w = minima.clone()
        for _ in range(4000):
            old = w.clone()
            w -= 0.05 * (w - minima)
            lp_(w, old, lr=0.05, p=0.5, lambda_p=0.005, prox=prox)
        ends[prox] = w
    assert ends["irl1"][0] == ends["pwd"][0] == 0
    torch.testing.assert_close(ends["irl1"][1], ends["pwd"][1], rtol=1e-6, atol=0)
    w = torch.tensor([0.02])
    for _ in range(100):
        lp_(w, w.clone(), lr=0.05, p=1.0, lambda_p=0.01, prox="irl1")
        if w == 0:
            break
    assert 38 <= _ <= 40  # the L1 prox takes lr * lambda a step


def test_an_unknown_prox_is_refused() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2, 2))], lr=0.1)
    with pytest.raises(LpsparseError, match="prox 'half'"):
        LpDecay(optimizer, lambda_p=1.0, prox="half")


def test_irl1_is_finite_gives_plus_zero_and_leaves_the_ridge_alone_to_act() -> None:
    w = torch.tensor([0.0, -0.1, 0.1, -1e-20])
    ridge = lp_(torch.ones(4), w, lr=0.1, p=0.5, lambda_p=0.0, lambda_2=1.0, prox="irl1")
    torch.testing.assert_close(ridge, torch.full((4,), 1 / 1.1))
    killed = lp_(w.clone(), w, lr=0.1, p=0.5, lambda_p=9.0, prox="irl1")
    assert torch.equal(killed, torch.zeros(4)) and not killed.signbit().any()


def test_lp_adamw_refuses_or_names_what_it_has_not_of_a_state_that_it_loads() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    ours = LpAdamW([weight], lr=0.1, lambda_p=0.1)
    with pytest.warns(UserWarning, match=r"weight decay 0\.5 .* left out"):
        ours.load_state_dict(torch.optim.AdamW([weight], weight_decay=0.5).state_dict())
    assert ours.param_groups[0]["weight_decay"] == 0
    for option in ("amsgrad", "maximize"):
        with pytest.raises(LpsparseError, match="amsgrad or maximize"):
            ours.load_state_dict(torch.optim.AdamW([weight], **{option: True}).state_dict())
