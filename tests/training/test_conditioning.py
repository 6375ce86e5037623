"""Weight conditioning: step 0 unchanged, norms held, zeros kept, the exact gradient (arXiv 2409.03424)."""

from pathlib import Path

import pytest
import torch
import torch.distributed
from support.ranks import on_two_ranks
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lpsparse import LpAdamW, LpsparseError, condition, fold
from lpsparse.families import CONDITIONINGS
from lpsparse.training.conditioning.base import as_rows, from_rows, row_scale
from lpsparse.training.conditioning.denoise import ridge_affine
from lpsparse.training.conditioning.l1_rows import normalize_l1, project_simplex
from lpsparse.training.conditioning.modular import atom_scale
from lpsparse.training.conditioning.rows import normalize_rows, tangent_
from lpsparse.training.conditioning.spectral import PowerIteration

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
    assert torch.equal(from_rows(as_rows(weight, axis, groups), weight, axis, groups), weight)


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


STEP_0 = [(method, mode) for method in CONDITIONINGS for mode in ("train", "eval")]
STEP_0.remove(("denoise", "train"))  # which it perturbs by design


@pytest.mark.parametrize(("method", "mode"), STEP_0)
def test_conditioning_does_not_change_the_function_at_step_0(method: str, mode: str) -> None:
    """In double precision, through the retraction of weights that were written to."""
    model, x = network().double(), torch.randn(2, 3, 5, 5, dtype=torch.float64)
    model[1] = nn.Identity()
    model.train(mode == "train")
    before = model(x)
    condition(model, method)
    with torch.no_grad():
        for weight in (model[0].weight, model[4].weight):
            weight.mul_(1.0)
    torch.testing.assert_close(model(x), before, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lp-adamw"])
@pytest.mark.parametrize("method", CONDITIONINGS)
def test_every_method_trains_keeps_zeros_and_folds_to_an_ordinary_model(method: str, optimizer: str) -> None:
    model = network()
    x = torch.randn(64, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    y = x.flatten(1)[:, :5]
    names = {name: value.shape for name, value in model.state_dict().items()}
    with torch.no_grad():
        model[4].weight[:, ::3] = 0
    zero = model[4].weight == 0
    params = [param for name, param in model.named_parameters()]
    inner = {
        "adamw": lambda: torch.optim.AdamW(params, lr=3e-3),
        "sgd": lambda: torch.optim.SGD(params, lr=3e-2),
        "lp-adamw": lambda: LpAdamW(params, lr=3e-3, p=0.5, lambda_p=1e-4, one_pass=False),
    }[optimizer]()
    conditioning = condition(model, method)
    conditioning.attach(inner)
    losses: list[float] = []
    for t in range(80):
        conditioning.progress(t / 40)
        loss = (model(x) - y).square().mean()
        loss.backward()
        conditioning.restore()
        model[4].weight.grad[zero] = 0  # as a held mask does
        inner.step()
        inner.zero_grad()
        conditioning.retract()
        losses.append(float(loss.detach()))
    assert min(losses[-5:]) < 0.9 * losses[0]
    assert torch.equal(model[4].weight[zero], torch.zeros(int(zero.sum())))
    trained = model.eval()(x).detach()
    fold(model)
    assert {name: value.shape for name, value in model.state_dict().items()} == names
    near = 0.05 if method == "spectral" else 1e-5  # its sigma is known exactly at the end only
    torch.testing.assert_close(model(x), trained, rtol=1e-4, atol=near)
    assert not model._forward_pre_hooks and not model[4].weight._post_accumulate_grad_hooks


def test_weight_norm_is_the_gradient_of_g_and_v_and_its_rows_have_norm_g() -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(7, 5, bias=False)).double()
    v = model[0].weight.detach().clone().requires_grad_()
    g = v.detach().norm(dim=1).requires_grad_()
    x = torch.randn(11, 7, dtype=torch.float64)
    (normalize_rows(v, g) @ x.T).sin().sum().backward()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    conditioning = condition(model, "weight-norm", gain_lr_ratio=0.5)
    conditioning.attach(inner)
    model(x).T.sin().sum().backward()
    torch.testing.assert_close(model[0].weight.grad, v.grad)
    torch.testing.assert_close(conditioning.gains["0.weight"].grad, g.grad)
    inner.step()
    conditioning.retract()
    wanted = g.detach() - 0.05 * g.grad
    torch.testing.assert_close(model[0].weight.norm(dim=1), wanted)


def test_weight_norm_with_ratio_0_is_row_conditioning() -> None:
    ends = []
    for method, options in (("rows", {}), ("weight-norm", {"gain_lr_ratio": 0.0})):
        model, x = network(), torch.randn(13, 3, 5, 5, generator=torch.Generator().manual_seed(3))
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        conditioning = condition(model, method, **options)
        conditioning.attach(inner)
        for _ in range(5):
            inner.zero_grad()
            model(x).square().mean().backward()
            inner.step()
            conditioning.retract()
        ends.append(model[4].weight.detach().clone())
    assert torch.equal(ends[0], ends[1])


def test_the_simplex_projection_leaves_the_asked_zeros_and_the_row_norm_and_ignores_scale() -> None:
    v = torch.randn(5, 12, dtype=torch.float64)
    for dropped in (0, 1, 7, 11):
        projected = project_simplex(v, dropped)
        assert ((projected == 0).sum(1) == dropped).all()
        torch.testing.assert_close(projected.abs().sum(1), v.abs().sum(1))
        assert (projected * v >= 0).all()
        torch.testing.assert_close(project_simplex(3 * v, dropped), 3 * projected)
    # before it is brought back to its norm it is the nearest point of the l1 ball of its own radius
    tau = v.abs().kthvalue(7, dim=1, keepdim=True).values
    radius = (v.abs() - tau).relu().sum(1, keepdim=True)
    size = v.abs().sort(dim=1, descending=True).values
    sums = size.cumsum(1) - radius
    k = (size - sums / torch.arange(1, 13) > 0).sum(1, keepdim=True)  # the paper's rho
    torch.testing.assert_close(sums.gather(1, k - 1) / k, tau)


def test_l1_rows_splits_the_gradient_as_autograd_does_and_ends_with_exact_zeros() -> None:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(7, 5, bias=False)).double()
    x = torch.randn(11, 7, dtype=torch.float64)
    v = model[0].weight.detach().clone().requires_grad_()
    s, g = torch.ones((), dtype=torch.float64, requires_grad=True), v.detach().abs().sum(1)
    loss = (normalize_l1(v, s * g) @ x.T).sin().sum() + 0.3 * s.abs()
    loss.backward()
    inner = torch.optim.SGD(model.parameters(), lr=0.0)
    conditioning = condition(model, "l1-rows", sparsity=0.6, path_penalty=0.3)
    conditioning.attach(inner)
    model(x).T.sin().sum().backward()
    seen: dict[str, Tensor] = {}
    inner.register_step_pre_hook(
        lambda *_: seen.update(v=model[0].weight.grad.clone(), s=conditioning.gains["0.weight"].grad.clone())
    )
    inner.step()
    torch.testing.assert_close(seen["v"], v.grad)
    torch.testing.assert_close(seen["s"], s.grad)
    conditioning.progress(0.5)
    model(x)  # seen half projected, then put back
    assert (model[0].weight != v).any()
    conditioning.restore()
    assert torch.equal(model[0].weight, v)
    conditioning.progress(1.0)
    assert ((model[0].weight == 0).sum(1) == 4).all()
    conditioning.retract()
    torch.testing.assert_close(model[0].weight.abs().sum(1), g)


def test_l1_rows_keeps_zero_rows_and_rows_of_equal_weights_finite() -> None:
    assert torch.equal(normalize_l1(torch.zeros(1, 3), torch.tensor([20.0])), torch.zeros(1, 3))
    projected = project_simplex(torch.tensor([[2.0, -2.0, 2.0, 2.0]]), 2)
    assert torch.equal(projected, torch.tensor([[0.0, 0.0, 4.0, 4.0]]))
    model = nn.Sequential(nn.Linear(384, 4))
    conditioning = condition(model, "l1-rows", sparsity=0.5)
    with torch.no_grad():
        model[0].weight[1] = 0
    for share in (0.0, 0.5, 1.0):
        conditioning.progress(share)
        model(torch.ones(2, 384)).sum().backward()
        conditioning.restore()
        conditioning.retract()
        assert torch.isfinite(model[0].weight.grad).all()
        assert torch.isfinite(model[0].weight).all() and torch.equal(model[0].weight[1], torch.zeros(384))


def test_l1_rows_takes_the_gradient_where_the_forward_pass_saw_the_weight() -> None:
    """As training does that leaves weights out of the forward pass and puts them back before the step."""
    model = nn.Sequential(nn.Linear(7, 5, bias=False)).double()
    conditioning = condition(model, "l1-rows")
    conditioning.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    weight, whole = model[0].weight, model[0].weight.detach().clone()
    with torch.no_grad():
        weight[:, ::2] = 0
    model(torch.randn(11, 7, dtype=torch.float64)).sin().sum().backward()
    seen = weight.detach().clone()
    conditioning.restore()
    with torch.no_grad():
        weight.copy_(whole)
    along = (seen * weight.grad).sum(1)
    torch.testing.assert_close(along, torch.zeros_like(along), atol=1e-12, rtol=0)
    slope, gain = weight.grad.clone(), conditioning.gains["0.weight"].grad.clone()
    conditioning.restore()  # once a backward pass, however often it is called
    assert torch.equal(weight.grad, slope) and torch.equal(conditioning.gains["0.weight"].grad, gain)


@pytest.mark.parametrize("method", ["weight-norm", "l1-rows"])
def test_gains_have_the_gradient_of_one_step_whoever_clears_the_model_s(method: str) -> None:
    model, x = nn.Sequential(nn.Linear(7, 5)), torch.randn(11, 7)
    inner = torch.optim.SGD(model.parameters(), lr=0.0)
    conditioning = condition(model, method)
    conditioning.attach(inner)
    seen: list[Tensor] = []
    inner.register_step_pre_hook(lambda *_: seen.append(conditioning.gains["0.weight"].grad.clone()))
    for _ in range(3):
        model.zero_grad()  # which knows nothing of gains
        model(x).square().mean().backward()
        inner.step()
    torch.testing.assert_close(seen[0], seen[2])


def test_evaluation_between_the_passes_of_a_step_sees_v_and_the_gradient_is_still_mapped() -> None:
    torch.manual_seed(9)
    model, x = nn.Sequential(nn.Linear(13, 9, bias=False)).double(), torch.randn(5, 13, dtype=torch.float64)
    plain = model(x).detach()
    conditioning = condition(model, "denoise", sparsity=0.5)
    conditioning.progress(0.25)
    model(x).sin().sum().backward()
    assert torch.equal(model.eval()(x), plain)
    once = model[0].weight.grad.clone()
    model.train()(x).sin().sum().backward()  # a second pass of the same step sees what the first one saw
    torch.testing.assert_close(model[0].weight.grad, 2 * once)
    model[0].weight.grad.copy_(once)
    conditioning.restore()
    leaf = model[0].weight.detach().clone().requires_grad_()
    conditioning.effective("0.weight", leaf).mm(x.T).sin().sum().backward()
    torch.testing.assert_close(model[0].weight.grad, leaf.grad)


def _rank(rank: int, out: str) -> None:
    torch.distributed.init_process_group("gloo")
    torch.save(_gains(rank, 2), f"{out}/{rank}.pt")


def _gains(rank: int, world_size: int) -> dict[str, Tensor]:
    """Weights and gains after five steps under DDP on this rank's share of the data, or on all of it."""
    torch.manual_seed(12)
    model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    conditioning = condition(model, "weight-norm")
    conditioning.attach(inner)
    x = torch.randn(12, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wrapped = nn.parallel.DistributedDataParallel(model) if world_size > 1 else model
    for _ in range(5):
        inner.zero_grad()
        wrapped(x[rank::world_size]).square().mean().backward()
        conditioning.restore()
        moved = [param for group in inner.param_groups for param in group["params"]]
        assert float(nn.utils.clip_grad_norm_(moved, 0.01)) > 0.01
        inner.step()
    return {"weight": model[0].weight.detach(), "gain": conditioning.gains["0.weight"].detach()}


def test_weight_norm_on_two_ranks_is_weight_norm_on_one(tmp_path: Path) -> None:
    on_two_ranks(_rank, str(tmp_path))
    alone = _gains(0, 1)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert all(torch.allclose(found[key], alone[key], rtol=0, atol=1e-5) for key in alone)


def test_power_iteration_finds_sigma_and_the_spectral_bound_holds() -> None:
    torch.manual_seed(5)
    matrix = torch.randn(9, 13)
    torch.testing.assert_close(
        PowerIteration(matrix).sigma(matrix, 200), torch.linalg.matrix_norm(matrix, ord=2)
    )
    model = nn.Sequential(nn.Linear(13, 9, bias=False))
    bound = torch.linalg.matrix_norm(model[0].weight.detach(), ord=2)
    conditioning = condition(model, "spectral")
    inner = torch.optim.SGD(model.parameters(), lr=0.05)
    x = torch.randn(64, 13)
    for _ in range(200):
        inner.zero_grad()
        (model(x) - 10 * x[:, :9]).square().mean().backward()
        inner.step()
        conditioning.retract()
    sigma = torch.linalg.matrix_norm(model[0].weight.detach(), ord=2)
    assert 0.9 * bound < sigma < 1.2 * bound  # the loss wants a norm of 10
    fold(model)
    sigma = torch.linalg.matrix_norm(model[0].weight.detach(), ord=2)
    assert 0.9 * bound < sigma < 1.005 * bound


def test_spectral_leaves_a_weight_within_the_bound_alone() -> None:
    model = nn.Sequential(nn.Linear(13, 9, bias=False))
    conditioning = condition(model, "spectral")
    with torch.no_grad():
        model[0].weight.mul_(0.5)
    before = model[0].weight.detach().clone()
    conditioning.retract()
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("make", [lambda: nn.Linear(13, 9), lambda: nn.Conv2d(4, 9, 3)])
def test_modular_gives_every_update_its_atoms_size_whatever_the_gradient(make) -> None:
    torch.manual_seed(6)
    model = nn.Sequential(make())
    inner = torch.optim.SGD(model.parameters(), lr=0.01)
    conditioning = condition(model, "modular")
    conditioning.attach(inner)
    weight = model[0].weight
    slope = torch.randn_like(weight)
    for scale in (1e-4, 1.0, 1e4) * 10:
        before = weight.detach().clone()
        weight.grad = scale * slope
        inner.step()
        update = (weight.detach() - before).flatten(1)
    size = torch.linalg.matrix_norm(update, ord=2)
    wanted = 0.01 * (9 / 13) ** 0.5 if weight.ndim == 2 else 0.01 * (9 / 4) ** 0.5 / 9
    assert float(size) == pytest.approx(wanted, rel=0.01)
    assert atom_scale(conditioning.weights["0.weight"]) == pytest.approx(wanted / 0.01)


def test_modular_follows_the_learning_rate_of_groups_that_were_loaded() -> None:
    model = nn.Sequential(nn.Linear(13, 9, bias=False))
    inner = torch.optim.SGD(model.parameters(), lr=1.0)
    condition(model, "modular").attach(inner)
    inner.load_state_dict(inner.state_dict())  # as accelerate does; the groups are new objects
    inner.param_groups[0]["lr"] = 0.0
    before = model[0].weight.detach().clone()
    model[0].weight.grad = torch.ones_like(before)
    inner.step()
    assert torch.equal(model[0].weight, before)


def test_modular_refuses_an_optimizer_that_does_not_move_the_weights() -> None:
    model = network()
    with pytest.raises(LpsparseError, match="not in the optimizer"):
        condition(model, "modular").attach(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1))


def test_the_ridge_affine_map_is_the_least_squares_one_and_fades_to_a_shrunk_mask() -> None:
    x = torch.randn(3, 11, dtype=torch.float64)
    q = x * (x.abs() > 0.5)
    exact = ridge_affine(x, q, 0.0)
    for row, masked, fitted in zip(x, q, exact, strict=True):
        design = torch.stack([masked, torch.ones(11, dtype=torch.float64)], 1)
        solution = torch.linalg.lstsq(design, row[:, None]).solution[:, 0]
        torch.testing.assert_close(fitted, design @ solution)
    assert torch.equal(ridge_affine(x, q, 1e-3, 0.0) == 0, q == 0)
    assert torch.isfinite(ridge_affine(x, torch.zeros_like(x), 0.0)).all()


def test_denoise_perturbs_the_forward_pass_in_training_alone_and_maps_the_gradient() -> None:
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(13, 9, bias=False)).double()
    x = torch.randn(5, 13, dtype=torch.float64)
    plain = model(x).detach()
    weight = model[0].weight.detach().clone()
    conditioning = condition(model, "denoise", sparsity=0.5)
    conditioning.progress(0.25)
    out = model(x)
    assert not torch.allclose(out, plain)
    out.sin().sum().backward()
    conditioning.restore()
    assert torch.equal(model[0].weight, weight)
    leaf = weight.clone().requires_grad_()
    conditioning.effective("0.weight", leaf).mm(x.T).sin().sum().backward()
    torch.testing.assert_close(model[0].weight.grad, leaf.grad)
    conditioning.progress(1.0)
    assert torch.equal(model(x), plain)
    assert torch.equal(model.eval()(x), plain)


def test_the_condition_number_is_within_the_theorem_and_is_not_claimed_to_fall() -> None:
    torch.manual_seed(8)
    for _ in range(50):
        matrix = torch.randn(6, 9, dtype=torch.float64) * torch.rand(6, 1, dtype=torch.float64) * 10
        equilibrated = normalize_rows(matrix, torch.ones(6, dtype=torch.float64))
        scaled = matrix * torch.rand(6, 1, dtype=torch.float64)
        assert torch.linalg.cond(equilibrated) <= 6**0.5 * torch.linalg.cond(scaled) * (1 + 1e-9)


def test_norms_hold_through_training_and_fold_leaves_an_ordinary_model() -> None:
    model, x = network(), torch.randn(13, 3, 5, 5)
    names = list(model.state_dict())
    norms = [model[0].weight.flatten(1).norm(dim=1), model[4].weight.norm(dim=1)]
    conditioning = condition(model)
    optimizer = LpAdamW(model.parameters(), lr=1e-2, p=0.8, lambda_p=0.1, one_pass=False)
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
    optimizer = LpAdamW(model.parameters(), lr=1e-2, p=0.8, lambda_p=0.1, one_pass=False)
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
    with pytest.raises(LpsparseError, match="no option ridge"):
        condition(model, "denoise", ridge=1.0)
    for method, options, says in (
        ("denoise", {"sparsity": 1.5}, "sparsity = 1.5"),
        ("l1-rows", {"sparsity": -0.1}, "sparsity = -0.1"),
        ("l1-rows", {"path_penalty": -1.0}, "path_penalty = -1.0"),
        ("weight-norm", {"gain_lr_ratio": -1.0}, "gain_lr_ratio = -1.0"),
        ("rows", {"names": ["nonsense"]}, "no parameter nonsense"),
    ):
        with pytest.raises(LpsparseError, match=says):
            condition(model, method, **options)
    condition(model)
    with pytest.raises(LpsparseError, match="already"):
        condition(model)
    fold(fold(model))  # folding twice is harmless
    condition(model)
