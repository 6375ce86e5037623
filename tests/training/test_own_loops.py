"""Other people's loops: what is frozen, learning rates, closures, ends and copies are theirs.

Each kind of fault has been reported of another project; the numbers are of its issues.
"""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lpsparse
from lpsparse import LpAdamW, LpDecay, LpsparseError, Sparsity
from lpsparse.families import CONDITIONINGS
from lpsparse.training.model import _alike, _shared
from lpsparse.training.modules import kept_by_module

STEPS = 50
X = torch.randn(11, 13, generator=torch.Generator().manual_seed(1))


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(13, 17), nn.Tanh(), nn.Linear(17, 11), nn.Tanh(), nn.Linear(11, 7))


def adamw(params: Any, lr: float = 0.01) -> torch.optim.AdamW:
    return torch.optim.AdamW(params, lr=lr, weight_decay=0.0)


def attached(model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> Sparsity:
    given = {"target_sparsity": "0.6", "score": "magnitude", **options}
    return Sparsity(model, optimizer, steps=STEPS, **given)


def loss_of(model: nn.Module) -> Tensor:
    return (model(X) - 1).square().mean()


def run(sparsity: Sparsity, optimizer: torch.optim.Optimizer, steps: int = STEPS) -> None:
    for _ in range(steps):
        sparsity.before_step()
        loss_of(sparsity.model).backward()
        sparsity.after_backward()
        optimizer.step()
        optimizer.zero_grad()
        sparsity.after_step()


def zeros(*weights: Tensor) -> int:
    return sum(int((weight == 0).sum()) for weight in weights)


SIZES = 13 * 17 + 17 * 11 + 11 * 7  # 485, of which 0.6 are 291


# What is frozen (sparseml#1463, nncf#200, yolov5#1213)


@pytest.mark.parametrize("holds", ["all", "trained"])
@pytest.mark.parametrize("score", ["fisher", "magnitude"])
def test_what_is_frozen_stays_so_and_the_target_is_of_the_rest(
    holds: str, score: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = network()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    optimizer = adamw([p for p in model.parameters() if holds == "all" or p.requires_grad])
    sparsity = attached(model, optimizer, score=score)
    assert "frozen: 0.weight" in sparsity.summary
    assert "frozen: 0.weight; stays as it is, and the target is of the other 2 tensors" in caplog.text
    run(sparsity, optimizer)
    sparsity.finish()
    assert torch.equal(model[0].weight, before) and not model[0].weight.requires_grad
    assert zeros(model[2].weight, model[4].weight) == int(0.6 * (17 * 11 + 11 * 7))


def test_what_the_optimizer_does_not_hold_is_neither_cut_nor_counted() -> None:
    model = network()
    before = model[2].weight.detach().clone()
    optimizer = adamw([*model[0].parameters(), *model[4].parameters()])
    sparsity = attached(model, optimizer)
    assert list(sparsity.control.weights) == ["0.weight", "4.weight"]
    assert "not in the optimizer: 2.weight" in sparsity.summary
    run(sparsity, optimizer)
    assert torch.equal(model[2].weight, before)


def test_what_thaws_later_is_trained_and_not_cut_and_what_freezes_later_is_refused() -> None:
    model = network()
    model[0].requires_grad_(False)
    optimizer = adamw(model.parameters())
    sparsity = attached(model, optimizer)
    run(sparsity, optimizer, 5)
    before = model[0].weight.clone()
    model[0].requires_grad_(True)
    run(sparsity, optimizer, STEPS - 5)
    assert (model[0].weight != before).all() and zeros(model[0].weight) == 0
    model = network()
    sparsity = attached(model, adamw(model.parameters()))
    model[2].requires_grad_(False)
    with pytest.raises(LpsparseError, match=r"2\.weight was frozen after the plan was made"):
        sparsity.before_step()


@pytest.mark.parametrize("make", [lambda p: LpAdamW(p, lr=0.1, lambda_p=1.0, one_pass=False), adamw])
def test_a_stale_gradient_does_not_make_a_frozen_weight_decay(make: Callable[..., Any]) -> None:
    """sparseml#965: frozen between backward pass and step."""
    model, plain = network(), network()
    optimizer, base = make(model.parameters()), adamw(plain.parameters(), 0.1)
    if not isinstance(optimizer, LpAdamW):
        optimizer.param_groups[0]["lr"] = 0.1
        LpDecay(optimizer, lambda_p=1.0)
    for net in (model, plain):
        loss_of(net).backward()
        net[0].requires_grad_(False)
    optimizer.step(), base.step()
    assert torch.equal(model[0].weight, plain[0].weight)
    assert (model[2].weight.abs() < plain[2].weight.abs()).all()


def test_every_process_freezes_what_the_first_one_does() -> None:
    model = network()
    model[2].requires_grad_(False)
    with torch.device("meta"):
        other = network()
    other = _alike(other, _shared(model.named_parameters()), [])
    assert [p.requires_grad for p in other.parameters()] == [p.requires_grad for p in model.parameters()]


# Learning rates (DeepSpeed#8440, pytorch#21965, pytorch-lightning#4983)


def rates(optimizer: torch.optim.Optimizer, **options: Any) -> list[float]:
    """The largest that each group was given in a run."""
    model: nn.Module = optimizer.model  # type: ignore[attr-defined]
    sparsity = attached(model, optimizer, **options)
    seen: list[list[float]] = []
    for _ in range(STEPS):
        sparsity.before_step()
        seen.append([float(group["lr"]) for group in optimizer.param_groups])
        sparsity.after_step()
    return [max(each) for each in zip(*seen, strict=True)]


def two_groups(first: Any = 1e-5, second: Any = 1e-3) -> torch.optim.Optimizer:
    model = network()
    groups = [
        {"params": model[0].parameters(), "lr": first},
        {"params": model[2:].parameters(), "lr": second},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    optimizer.model = model  # type: ignore[attr-defined]
    return optimizer


def test_each_group_keeps_its_own_peak_and_a_peak_given_keeps_their_proportion() -> None:
    assert rates(two_groups()) == rates(two_groups(), lr=1e-3) == [1e-5, 1e-3]
    assert rates(two_groups(), lr=1e-2) == pytest.approx([1e-4, 1e-2])
    assert rates(two_groups(0.0, 0.0), lr=1e-2) == [1e-2, 1e-2]


def test_a_schedulers_initial_rate_is_the_peak_and_a_rate_in_a_tensor_stays_one() -> None:
    optimizer = two_groups(torch.tensor(1e-5), torch.tensor(1e-3))
    held = optimizer.param_groups[0]["lr"]
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.0)  # as in the Trainer's warm-up
    assert rates(optimizer) == pytest.approx([1e-5, 1e-3])
    assert optimizer.param_groups[0]["lr"] is held


def test_a_group_that_is_added_later_and_gains_have_their_own_peaks() -> None:
    optimizer = two_groups()
    sparsity = attached(optimizer.model, optimizer, condition="weight-norm", gain_lr_ratio=0.5)  # type: ignore[attr-defined]
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], "lr": 1e-4})
    for _ in range(3):
        sparsity.before_step()
        sparsity.after_step()
    found = [group["lr"] / optimizer.param_groups[1]["lr"] for group in optimizer.param_groups]
    assert found == pytest.approx([0.01, 1.0, 0.005, 0.5, 0.1])


def test_lambda_auto_decays_a_group_of_a_small_rate_as_much_as_the_others() -> None:
    optimizer = two_groups(1e-6, 1e-3)
    sparsity = attached(optimizer.model, optimizer)  # type: ignore[attr-defined]
    sparsity.before_step()
    first, second = (group["lr"] * group["lp_lambda"] for group in optimizer.param_groups)
    assert first == pytest.approx(second) and first > 0


# The end of a run (sparseml#1117, neural-compressor#1250, nncf#66)

WAYS = [
    {},
    {"score": "fisher"},
    {"method": "gradual"},
    {"method": "dwf"},
    {"method": "rigl"},
    {"method": "l1"},
    {"condition": "rows"},
    {"condition": "denoise"},
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(way.values()) or "default")
@pytest.mark.parametrize("done", [12, 13, 30, STEPS])
def test_finish_leaves_the_target_after_however_many_steps(done: int, way: dict[str, Any]) -> None:
    model = network()
    optimizer = adamw(model.parameters())
    sparsity = attached(model, optimizer, **way)
    run(sparsity, optimizer, done)
    sparsity.before_step() if done == 13 else None  # a loop that breaks within a step
    cut = sparsity.finish()
    assert zeros(model[0].weight, model[2].weight, model[4].weight) == int(0.6 * SIZES)
    assert cut == (done < 20)


def test_a_step_too_many_is_an_error_and_finishing_twice_is_harmless() -> None:
    model = network()
    optimizer = adamw(model.parameters())
    sparsity = attached(model, optimizer)
    run(sparsity, optimizer)
    with pytest.raises(LpsparseError, match="step 51 of a plan of 50"):
        sparsity.before_step()
    sparsity.finish(), sparsity.finish()
    with pytest.raises(LpsparseError, match=r"after finish\(\)"):
        sparsity.before_step()


@pytest.mark.parametrize("method", ["lp", "rigl"])
@pytest.mark.parametrize("at", [6, 20])
def test_an_earlier_checkpoint_that_is_loaded_at_the_end_is_cut_to_the_target(
    at: int, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = network()
    optimizer = adamw(model.parameters())
    sparsity = attached(model, optimizer, method=method)
    run(sparsity, optimizer, at)
    best = copy.deepcopy(model.state_dict())
    run(sparsity, optimizer, STEPS - at)
    model.load_state_dict(best)
    sparsity.finish()
    names = ("0.weight", "2.weight", "4.weight")
    assert zeros(*(model.state_dict()[name] for name in names)) == int(0.6 * SIZES)
    assert all(zeros(model.state_dict()[n][best[n] == 0]) == zeros(best[n]) for n in names)
    cut = method == "rigl" or at == 6
    assert ("cut to the target at the end, after 50 of 50 steps" in caplog.text) == cut


def test_parameters_that_were_replaced_are_not_taken_for_those_that_were_cut() -> None:
    model = network()
    optimizer = adamw(model.parameters())
    sparsity = attached(model, optimizer)
    run(sparsity, optimizer)
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    with pytest.raises(LpsparseError, match=r"0\.weight is another parameter"):
        sparsity.finish()


# Closures (peft#3382, SOAP#7, sam#91)


def trained(how: str, make: Callable[..., torch.optim.Optimizer], method: str | None) -> list[Tensor]:
    """The parameters after steps whose gradients are there before, or come from a closure."""
    model = network()
    optimizer = make(model.parameters())
    if not isinstance(optimizer, LpAdamW):
        LpDecay(optimizer, lambda_p=0.02)
    if method is not None:
        lpsparse.condition(model, method).attach(optimizer)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    for _ in range(12):
        if how == "closure":
            assert optimizer.step(closure) is not None
        else:
            closure()
            optimizer.step()
    lpsparse.fold(model)
    return [param.detach() for param in model.parameters()]


@pytest.mark.parametrize("method", [None, *CONDITIONINGS])
@pytest.mark.parametrize("make", [adamw, lambda p: LpAdamW(p, lr=0.01, lambda_p=0.02, one_pass=False)])
def test_a_step_with_a_closure_is_the_step_without(make: Callable[..., Any], method: str | None) -> None:
    plain, closed = trained("plain", make, method), trained("closure", make, method)
    assert all(torch.equal(one, other) for one, other in zip(plain, closed, strict=True))


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(way.values()) or "default")
@pytest.mark.parametrize("says", [False, True])
def test_the_whole_method_takes_a_closure_whether_it_calls_after_backward_or_not(
    way: dict[str, Any], says: bool
) -> None:
    first, second = network(), network()
    optimizer = adamw(first.parameters())
    run(sparsity := attached(first, optimizer, **way), optimizer)
    sparsity.finish()
    other = adamw(second.parameters())
    sparsity = attached(second, other, **way)

    def closure() -> Tensor:
        other.zero_grad()
        loss = loss_of(second)
        loss.backward()
        if says:
            sparsity.after_backward()
        return loss

    for _ in range(STEPS):
        sparsity.before_step()
        other.step(closure=closure)
        sparsity.after_step()
    sparsity.finish()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("way", ["conditioned", "whole"])
def test_an_optimizer_that_evaluates_again_is_refused_at_its_first_step(way: str) -> None:
    """LBFGS calls its closure up to 20 times a step (pytorch-lightning#4083)."""
    model = network()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4)
    if way == "conditioned":
        lpsparse.condition(model, "rows").attach(optimizer)
    else:
        attached(model, optimizer).before_step()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    with pytest.raises(LpsparseError, match="LBFGS evaluates its closure again within a step"):
        optimizer.step(closure)


class Sam(torch.optim.AdamW):
    """Moves the weights uphill, has the closure's gradient there, and steps from where they were."""

    def step(self, closure: Any = None) -> Any:
        params = self.param_groups[0]["params"]
        before = [param.detach().clone() for param in params]
        with torch.no_grad():
            for param in params:
                param.add_(0.05)
        loss = closure()
        with torch.no_grad():
            for param, value in zip(params, before, strict=True):
                param.copy_(value)
        super().step()
        return loss


def test_the_weights_of_the_steps_start_decay_where_the_optimizer_moves_them_first() -> None:
    """davda54/sam#91; a zero stays one, which it would not where the moved weight decayed."""
    model = network()
    with torch.no_grad():
        model[0].weight[:, ::2] = 0
    optimizer = Sam(model.parameters(), lr=0.01, weight_decay=0.0)
    LpDecay(optimizer, lambda_p=0.02)

    def closure() -> Tensor:
        loss = loss_of(model)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert zeros(model[0].weight) == 7 * 17


def test_decay_sees_the_weights_that_move_whichever_was_attached_first() -> None:
    found: list[list[Tensor]] = []
    for first in ("decay", "conditioning"):
        model = network()
        optimizer = adamw(model.parameters())
        conditioning = lpsparse.condition(model, "denoise", sparsity=0.7)
        if first == "conditioning":
            conditioning.attach(optimizer)
        LpDecay(optimizer, lambda_p=0.05)
        if first == "decay":
            conditioning.attach(optimizer)
        for _ in range(10):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
        lpsparse.fold(model)
        found.append([param.detach() for param in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert zeros(*found[0]) > 0


# Heads and embeddings (eole#179, transformers#16283, auto-round#100)


class Tagger(nn.Module):
    """Names that say nothing: what is what is known by the modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle = nn.Embedding(19, 13), nn.Linear(13, 13)
        self.last = nn.Linear(13, 19, bias=False)
        self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x)))


@pytest.mark.parametrize(
    "wrap", [nn.Sequential, lambda m: torch.compile(m, backend="eager"), nn.DataParallel]
)
def test_an_embedding_and_what_is_tied_to_it_are_kept_under_any_name(wrap: Callable[..., Any]) -> None:
    model = wrap(Tagger())
    sparsity = attached(model, adamw(model.parameters()))
    assert [name.rpartition("middle")[2] for name in sparsity.control.weights] == [".weight"]
    both = attached(model, adamw(model.parameters()), include=("*.weight",))
    assert len(both.control.weights) == 2


class Timm(nn.Module):
    """As timm's models say it."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.logits, self.distilled = nn.Linear(13, 13), nn.Linear(13, 7), nn.Linear(13, 7)

    def get_classifier(self) -> tuple[nn.Module, nn.Module]:
        return self.logits, self.distilled


def test_a_model_that_names_its_classifier_has_it_kept() -> None:
    model = Timm()
    assert kept_by_module(model)[id(model.distilled.weight)] == "head"
    assert list(attached(model, adamw(model.parameters())).control.weights) == ["body.weight"]


def kept_of(model: nn.Module) -> set[str]:
    kept = kept_by_module(model)
    return {
        name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in kept and p.ndim > 1
    }


def test_transformers_heads_are_kept_also_of_encoder_decoders_and_untied() -> None:
    from transformers import (
        BertConfig,
        BertForTokenClassification,
        BertModel,
        EncoderDecoderConfig,
        EncoderDecoderModel,
        MT5Config,
        MT5ForConditionalGeneration,
    )

    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    bert = BertConfig(vocab_size=23, max_position_embeddings=16, **small)
    assert "classifier.weight" in kept_of(BertForTokenClassification(bert))
    assert {name.split(".")[0] for name in kept_of(BertModel(bert))} == {"embeddings"}
    pair = EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(bert, bert))
    assert "decoder.cls.predictions.decoder.weight" in kept_of(pair)
    sizes = {"vocab_size": 23, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2}
    mt5 = MT5ForConditionalGeneration(MT5Config(**sizes, tie_word_embeddings=False))
    assert {"lm_head.weight", "shared.weight"} <= kept_of(mt5)
    assert not any("SelfAttention.q" in name or "DenseReluDense" in name for name in kept_of(mt5))


# Zeros that are to stay (transformers#29227, sparsegpt#17, filter-pruning-geometric-median#47)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "decaying"])
def test_keep_zeros_holds_the_zeros_of_every_tensor(optimizer: str) -> None:
    """Against momentum and weight decay that are there before, and in biases and tensors that are not cut."""
    model = network()
    made: torch.optim.Optimizer = {
        "adamw": lambda: torch.optim.AdamW(model.parameters(), lr=0.01),
        "sgd": lambda: torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True),
        "decaying": lambda: torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=0.1),
    }[optimizer]()
    loss_of(model).backward()
    made.step()
    made.zero_grad()
    with torch.no_grad():
        for param in model.parameters():
            param[param.abs() < 0.1] = 0
    before = {name: param == 0 for name, param in model.named_parameters()}
    sparsity = attached(
        model,
        made,
        method="dense",
        keep_zeros=True,
        target_sparsity=None,
        score="auto",
        exclude=("0.weight",),
    )
    run(sparsity, made)
    sparsity.finish()
    assert all(before[name].any() for name in ("0.weight", "0.bias", "2.weight"))
    for name, param in model.named_parameters():
        assert zeros(param[before[name]]) == int(before[name].sum()), name
        assert (param[~before[name]] != 0).all()


def test_a_fresh_head_is_not_held_at_its_zeros() -> None:
    from lpsparse.steps.finetune import FinetuneStep
    from lpsparse.steps.resolve import resolve
    from lpsparse.training.sparsity import Driver

    model = network()
    nn.init.zeros_(model[4].bias), nn.init.zeros_(model[2].bias)
    given = {
        "model": "m",
        "out": "o",
        "data": "d",
        "task": "causal-lm",
        "method": "dense",
        "keep_zeros": True,
    }
    step = resolve(FinetuneStep, given).model_copy(update={"score": "magnitude", "condition": "none"})
    driver = Driver(step, model, {"0.weight": model[0].weight}, adamw(model.parameters()), 9, {"4.bias"})
    assert list(driver.control.held) == ["2.bias"]


# Copies and groups of later (torchlars#4, Torch-Pruning#374, allennlp#2159)

COPIES: list[Callable[[Any], Any]] = [copy.copy, copy.deepcopy, pickle.dumps]


@pytest.mark.parametrize("take", COPIES)
@pytest.mark.parametrize("way", ["decay", "conditioning", "whole", "factors"])
def test_an_optimizer_that_would_lose_its_hooks_is_not_copied(take: Callable[[Any], Any], way: str) -> None:
    model = network()
    optimizer = adamw(model.parameters())
    take(optimizer)
    if way == "decay":
        remove = LpDecay(optimizer, lambda_p=0.1).remove
    elif way == "conditioning":
        lpsparse.condition(model, "weight-norm").attach(optimizer)
        remove = lambda: lpsparse.fold(model)  # noqa: E731
    else:
        remove = attached(model, optimizer, method="dwf" if way == "factors" else "gradual").finish
    with pytest.raises(LpsparseError, match="a copy of this AdamW"):
        take(optimizer)
    copy.deepcopy(optimizer.state_dict())
    loss_of(model).backward()
    optimizer.step()
    remove()
    take(optimizer)


@pytest.mark.parametrize("method", CONDITIONINGS)
@pytest.mark.parametrize("take", COPIES[1:])
def test_a_conditioned_model_is_not_copied_until_it_is_folded(
    take: Callable[[Any], Any], method: str
) -> None:
    model = network()
    lpsparse.condition(model, method)
    model(X)
    with pytest.raises(LpsparseError, match=r"cannot be copied or pickled"):
        take(model)
    copy.deepcopy(model.state_dict())
    take(lpsparse.fold(model))


@pytest.mark.parametrize("take", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_of_lp_adamw_goes_on_as_the_original(take: Callable[[Any], Any]) -> None:
    model = network()
    optimizer = LpAdamW(model.parameters(), lr=0.01, lambda_p=0.05, one_pass=False)
    loss_of(model).backward()
    optimizer.step()
    pairs = [(model, optimizer), take((model, optimizer))]
    for net, own in pairs:
        for _ in range(5):
            own.zero_grad()
            loss_of(net).backward()
            own.step()
    for one, other in zip(model.parameters(), pairs[1][0].parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(LpsparseError, match="amsgrad"):
        pairs[1][1].load_state_dict(torch.optim.AdamW(model.parameters(), amsgrad=True).state_dict())


def test_a_group_that_is_added_later_decays_unless_the_parameters_were_named() -> None:
    for named in (False, True):
        first, later = nn.Parameter(torch.full((3, 2), 0.5)), nn.Parameter(torch.full((3, 2), 0.5))
        optimizer = torch.optim.SGD([first], lr=0.1)
        LpDecay(optimizer, p=1.0, lambda_p=1.0, params=[first] if named else None).set_lambda(2.0)
        optimizer.add_param_group({"params": [later]})
        first.grad, later.grad = torch.zeros_like(first), torch.zeros_like(later)
        optimizer.step()
        decayed = torch.full((3, 2), 0.5 / (1 + 0.2 / 0.5))
        torch.testing.assert_close(first.detach(), decayed)
        torch.testing.assert_close(later.detach(), torch.full((3, 2), 0.5) if named else decayed)
    half = nn.Parameter(torch.zeros(2, 2, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([first], lr=0.1)
    LpDecay(optimizer, lambda_p=1.0)
    optimizer.add_param_group({"params": [half]})
    with pytest.raises(LpsparseError, match="float32"):
        optimizer.step()


# Two sets of weights (schedule_free#22, sd-scripts#1667), wrappers (accelerate#4161, sd-scripts#1605),
# complex weights (s5-pytorch#2, pytorch#100707)


class Averaging(torch.optim.AdamW):
    """`eval` puts the average of the weights into the model, `train` puts those that move back."""

    is_training = False

    def _exchange(self, there: str, here: str) -> None:
        for state_of in self.state.items():
            param, state = state_of
            if "average" in state:
                state[there] = param.detach().clone()
                param.data.copy_(state[here])

    def train(self) -> None:
        if not self.is_training:
            self._exchange("average", "moving")
        self.is_training = True

    def eval(self) -> None:
        if self.is_training:
            self._exchange("moving", "average")
        self.is_training = False

    def step(self, closure: Any = None) -> Any:
        assert self.is_training, "not in train mode"
        found = super().step(closure)
        for param, state in self.state.items():
            value = param.detach().clone()
            state["average"] = state["average"].lerp(value, 0.1) if "average" in state else value
        return found


@pytest.mark.parametrize("done", [12, STEPS])
@pytest.mark.parametrize("last", ["eval", "finish"])
def test_both_sets_of_weights_of_a_schedule_free_optimizer_have_the_zeros(last: str, done: int) -> None:
    model = network()
    optimizer = Averaging(model.parameters(), lr=0.01, weight_decay=0.0)
    sparsity = attached(model, optimizer)
    for t in range(done):
        optimizer.train()
        run(sparsity, optimizer, 1)
        if t % 9 == 0:
            optimizer.eval()
    if last == "finish":
        optimizer.eval()
        sparsity.finish()
    else:
        sparsity.finish()
        optimizer.eval()
    weights = (model[0].weight, model[2].weight, model[4].weight)
    assert zeros(*weights) == int(0.6 * SIZES)
    optimizer.train()
    assert zeros(*weights) == int(0.6 * SIZES)


class Wrapper(torch.optim.Optimizer):
    """One without hooks of its own, as accelerate's has."""

    def __init__(self, inner: torch.optim.Optimizer, name: str) -> None:
        vars(self)[name] = inner
        self.param_groups = inner.param_groups


def test_a_wrapper_is_looked_through_or_refused() -> None:
    model = network()
    inner = adamw(model.parameters())
    decay = LpDecay(Wrapper(inner, "optimizer"), lambda_p=0.1)
    assert decay.optimizer is inner
    for attach in (lambda o: LpDecay(o, lambda_p=0.1), lambda o: attached(model, o)):
        with pytest.raises(LpsparseError, match="Wrapper wraps an optimizer and has no step hooks"):
            attach(Wrapper(inner, "base"))


class Spectral(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.real = nn.Linear(13, 11)
        self.modes = nn.Linear(11, 7, dtype=torch.complex64)

    def forward(self, x: Tensor) -> Tensor:
        return self.modes(self.real(x).to(torch.complex64)).abs()


def test_complex_parameters_are_left_alone_in_words_or_refused() -> None:
    model = Spectral()
    for make in (lambda p: LpDecay(adamw(p), lambda_p=0.1), lambda p: LpAdamW(p, lambda_p=0.1)):
        with pytest.raises(LpsparseError, match=r"complex64 parameter of shape \(7, 11\)"):
            make(model.parameters())
    for method in CONDITIONINGS:
        assert list(lpsparse.condition(model, method).weights) == ["real.weight"]
        lpsparse.fold(model)
    optimizer = adamw(model.parameters())
    sparsity = attached(model, optimizer)
    assert "C64 is not a float that can be pruned: modes.weight" in sparsity.summary
    run(sparsity, optimizer)
    sparsity.finish()
    assert zeros(model.real.weight) == int(0.6 * 13 * 11) and zeros(model.modes.weight) == 0
