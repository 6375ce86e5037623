"""Row conditioning: step 0 unchanged, norms held, zeros kept, the exact gradient (arXiv 2409.03424)."""

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lpsparse import LpAdamW, LpsparseError, condition, fold
from lpsparse.training.conditioning.rows import as_rows, normalize_rows, row_scale, tangent_

# module, axis, groups: each layout in which an output unit can lie
LAYOUTS = {
    "linear": (lambda: nn.Linear(7, 5), 0, 1),
    "conv2d": (lambda: nn.Conv2d(6, 4, 3, groups=2), 0, 1),
    "depthwise": (lambda: nn.Conv1d(6, 6, 3, groups=6), 0, 1),
    "transposed": (lambda: nn.ConvTranspose2d(6, 5, 3), 1, 1),
    "transposed-groups": (lambda: nn.ConvTranspose1d(6, 4, 3, groups=2), 1, 2),
    "conv1d": (lambda: Conv1D(5, 7), 1, 1),
}


def weight_of(name: str) -> tuple[Tensor, int, int]:
    torch.manual_seed(5)
    make, axis, groups = LAYOUTS[name]
    return torch.randn_like(make().weight, dtype=torch.float64), axis, groups


def outputs_of(name: str, weight: Tensor) -> Tensor:
    """(output units, batch * positions): what the module computes from `weight` on one fixed input."""
    module = LAYOUTS[name][0]().double()
    shapes = {"conv2d": (2, 6, 5, 5), "depthwise": (2, 6, 8), "transposed": (2, 6, 4, 4)}
    shape = shapes.get(name, (2, 6, 8) if "groups" in name else (11, 7))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    result = torch.func.functional_call(module, {"weight": weight, "bias": torch.zeros_like(module.bias)}, x)
    return result.transpose(0, 1).flatten(1) if result.ndim > 2 else result.T


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_row_is_what_makes_one_output_unit(name: str) -> None:
    weight, axis, groups = weight_of(name)
    scale = torch.linspace(1, 3, as_rows(weight, axis, groups).shape[0], dtype=torch.float64)
    scaled = outputs_of(name, weight * row_scale(weight, scale, axis, groups))
    torch.testing.assert_close(scaled, outputs_of(name, weight) * scale[:, None])


@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_get_exactly_the_norm_asked_for_and_zeros_stay_the_same(name: str) -> None:
    weight, axis, groups = weight_of(name)
    weight[weight.abs() < 0.3] = 0
    g = torch.rand(as_rows(weight, axis, groups).shape[0], dtype=torch.float64) + 0.5
    effective = normalize_rows(weight, g, axis, groups)
    torch.testing.assert_close(as_rows(effective, axis, groups).norm(dim=1), g)
    assert torch.equal(effective == 0, weight == 0)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_tangent_gradient_is_the_gradient_through_the_norm(name: str) -> None:
    weight, axis, groups = weight_of(name)
    v = weight.clone().requires_grad_()
    g = as_rows(weight, axis, groups).norm(dim=1)
    direction = torch.randn_like(weight)
    (normalize_rows(v, g, axis, groups).sin() * direction).sum().backward()
    plain = weight.cos() * direction  # dL/dW at W = V
    torch.testing.assert_close(tangent_(plain.clone(), weight, axis, groups), v.grad)
    inner = (as_rows(v.grad, axis, groups) * as_rows(weight, axis, groups)).sum(1)
    torch.testing.assert_close(inner, torch.zeros_like(inner), atol=1e-12, rtol=0)


def test_the_gradient_through_the_norm_agrees_with_finite_differences() -> None:
    v, g = torch.randn(3, 5, dtype=torch.float64, requires_grad=True), torch.rand(3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: normalize_rows(x, g), (v,))


def test_a_stack_of_experts_has_one_row_an_expert_and_output() -> None:
    weight = torch.randn(2, 3, 5)
    g = torch.arange(1.0, 7.0)
    norms = normalize_rows(weight, g, -2).norm(dim=2)
    torch.testing.assert_close(norms, g.view(2, 3))


def test_a_zero_row_stays_zero_with_a_finite_gradient() -> None:
    weight = torch.zeros(2, 3)
    weight[0] = 1.0
    v = weight.clone().requires_grad_()
    normalize_rows(v, torch.ones(2)).sum().backward()
    assert torch.isfinite(v.grad).all()
    assert torch.equal(normalize_rows(weight, torch.ones(2))[1], torch.zeros(3))
    assert torch.isfinite(tangent_(torch.ones(2, 3), weight)).all()


def network() -> nn.Module:
    torch.manual_seed(11)
    return nn.Sequential(nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7), nn.ReLU(), nn.Flatten(), nn.Linear(63, 5))


def test_conditioning_does_not_change_the_function_at_step_0() -> None:
    model, x = network().eval(), torch.randn(2, 3, 5, 5)
    before = model(x)
    condition(model)
    assert torch.equal(model(x), before)


def test_norms_hold_through_training_and_fold_leaves_an_ordinary_model() -> None:
    model, x = network(), torch.randn(13, 3, 5, 5)
    names = list(model.state_dict())
    norms = [model[0].weight.flatten(1).norm(dim=1), model[4].weight.norm(dim=1)]
    conditioning = condition(model)
    optimizer = LpAdamW(model.parameters(), lr=1e-2, p=0.8, lambda_p=0.1)
    for _ in range(30):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert not torch.allclose(
        model[4].weight.norm(dim=1), norms[1]
    )  # the step moved it; the next forward puts it back
    assert conditioning.smallest_norm() > 0
    trained = fold(model).eval()
    torch.testing.assert_close(trained[0].weight.flatten(1).norm(dim=1), norms[0])
    torch.testing.assert_close(trained[4].weight.norm(dim=1), norms[1])
    assert list(trained.state_dict()) == names
    assert not trained._forward_pre_hooks and not trained[4].weight._backward_hooks


def test_decay_keeps_conditioned_rows_alive_where_raw_decay_would_collapse_them() -> None:
    model = nn.Sequential(nn.Linear(16, 1, bias=False))
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    nn.init.constant_(model[0].weight, 0.25)
    conditioning = condition(model)
    optimizer = LpAdamW(model.parameters(), lr=1e-2, p=0.8, lambda_p=0.1)
    for _ in range(500):
        optimizer.zero_grad()
        (model(x) - x[:, :1] * 3).square().mean().backward()
        optimizer.step()
        conditioning.retract()
    weight = model[0].weight
    assert torch.isfinite(weight).all() and conditioning.smallest_norm() > 0.1
    assert weight[0, 0] > 0.9 and (weight == 0).any()


def test_misuse_is_refused() -> None:
    model = network()
    with pytest.raises(LpsparseError, match="not known"):
        condition(model, "columns")
    condition(model)
    with pytest.raises(LpsparseError, match="already"):
        condition(model)
    fold(fold(model))  # folding twice is harmless
    condition(model)
