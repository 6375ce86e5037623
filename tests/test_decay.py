"""Decoupled L_p decay: the update identity first, then what it implies (arXiv 2404.10824)."""

import copy
import math

import pytest
import torch
from torch import nn

from lpsparse import LpAdamW, LpDecay, LpsparseError
from lpsparse.training.decay import budget_lambda, kill_magnitude, lp_

PS = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 3.0)
OPTIMIZERS = {
    "adamw": lambda params, lr: torch.optim.AdamW(params, lr=lr, weight_decay=0.0),
    "adamw-foreach": lambda params, lr: torch.optim.AdamW(params, lr=lr, weight_decay=0.0, foreach=True),
    "adamw-fused": lambda params, lr: torch.optim.AdamW(params, lr=lr, weight_decay=0.0, fused=True),
    "sgd": lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9),
    "adafactor": lambda params, lr: torch.optim.Adafactor(params, lr=lr, weight_decay=0.0),
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


def test_a_step_that_the_scaler_skips_decays_nothing() -> None:
    weight = nn.Parameter(torch.full((2, 2), 0.5))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    LpDecay(optimizer, p=0.8, lambda_p=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(torch.ones(()))  # its state is made on first use
    for bad in (float("inf"), 0.0):
        weight.grad = torch.full_like(weight, bad)
        before = weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(weight, before) == math.isinf(bad)


def test_remove_detaches_and_half_precision_is_refused() -> None:
    weight = nn.Parameter(torch.full((2, 2), 0.5))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    LpDecay(optimizer, p=0.8, lambda_p=1.0).remove()
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert torch.equal(weight, torch.full((2, 2), 0.5))
    half = torch.optim.SGD([nn.Parameter(torch.zeros(2, 2, dtype=torch.bfloat16))], lr=0.1)
    with pytest.raises(LpsparseError, match="swallows the decay"):
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
