"""What a method does beside a training loop, as four calls: `lpsparse finetune` and any loop of your own."""

import logging
from collections.abc import Collection
from typing import Any

from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lpsparse.errors import StateError, UsageError
from lpsparse.families import CONDITIONINGS
from lpsparse.pruning.targets import Chosen, kept_in_words
from lpsparse.steps.base import about
from lpsparse.steps.finetune import FinetuneStep
from lpsparse.steps.resolve import resolve
from lpsparse.training.allocation import keep_only_
from lpsparse.training.attached import around_step, own_rate, set_rate, with_hooks
from lpsparse.training.conditioning import condition, fold
from lpsparse.training.conditioning.base import Conditioning
from lpsparse.training.control import SparsityControl
from lpsparse.training.model import Loaded
from lpsparse.training.schedule import plan_phases
from lpsparse.training.settings import freeze_, prunable_parameters, resolve_auto

_log = logging.getLogger("lpsparse")


class Driver:
    """Drive learning rates, conditioning and sparsity control through `steps` optimizer steps. `resolve_auto`
    has seen `step`. Weights change from the first `before_step` on.

    Call `before_step` before the forward pass, `after_backward` when the gradients are there (before they are
    clipped), `after_step` after the optimizer's step, and `finish` at the end. The optimizer's step makes up
    for an `after_backward` that was not called, also after the closure that it is given. `fresh` names
    parameters that MODEL does not have: keep_zeros is not for them.
    """

    def __init__(
        self,
        step: FinetuneStep,
        model: nn.Module,
        weights: dict[str, Tensor],
        optimizer: Optimizer,
        steps: int,
        fresh: Collection[str] = (),
    ) -> None:
        self.options = step.recorded()
        self.model, self.done, self.peak = model, 0, step.lr
        self._due = False  # `after_backward`
        self._finished = False
        self.top = max(own_rate(group) for group in optimizer.param_groups)
        # First, so that whatever else looks at the weights in the optimizer's step sees them uncovered.
        self._attached = around_step(optimizer, "lpsparse", self._catch_up)
        self.conditioning = _conditioning(step, model, weights, optimizer)
        cut = {id(weight) for weight in weights.values()}
        held = {id(param) for group in optimizer.param_groups for param in group["params"]} - cut
        others = {
            name: param for name, param in model.named_parameters() if id(param) in held and name not in fresh
        }
        self.control = SparsityControl(
            step, weights, optimizer, plan_phases(step, steps), others=others, top=self.top or None
        )
        self.control.begin()

    def _catch_up(self) -> None:
        if self._due:
            self.after_backward()

    def before_step(self) -> None:
        """Raises StateError for a step more than the plan has, and for a weight that was frozen since."""
        self._check_step()
        for group in self.control.optimizer.param_groups:
            own = own_rate(group)
            peak = self.peak if own == self.top else own * (self.peak / self.top)
            set_rate(group, peak * self.control.phases.rate(self.done))
        if self.conditioning is not None:
            self.conditioning.progress(self.control.phases.progress(self.done + 1))
        self.control.before_step(self.done)
        self._due = True

    def _check_step(self) -> None:
        steps = self.control.phases.steps
        if self._finished or self.done >= steps:
            what = f"step {self.done + 1} of a plan of {steps}" + (", after finish()" * self._finished)
            raise StateError(713, what, hint="give the steps that the loop makes, and end it with finish()")
        frozen = [name for name, weight in self.control.weights.items() if not weight.requires_grad]
        if frozen:
            what = f"{frozen[0]} was frozen after the plan was made, and the target counts it"
            raise StateError(714, what, hint="freeze it before, or leave it out with exclude=")

    def after_backward(self) -> None:
        self._due = False
        if self.conditioning is not None:
            self.conditioning.restore()
        self.control.after_backward(self.done)

    def after_step(self) -> None:
        self._catch_up()  # where a loss scaler has skipped the step
        if self.conditioning is not None:
            self.conditioning.retract()
        self.control.after_step(self.done)
        self.done += 1

    def finish(self) -> bool:
        """Leave an ordinary model with exactly the target's zeros, and the optimizer as it was, after however
        many steps. Whether weights were cut here, after which no step has trained the others."""
        self._catch_up()
        fold(self.model)
        cut = not self._finished and self.control.finish(self.done)  # also through the last retraction
        self._finished = True
        self._attached.remove()
        return cut

    def state_dict(self) -> dict[str, Any]:
        """What a resumed loop needs beside the weights and the optimizer's state: tensors, numbers, text."""
        kept = {} if self.conditioning is None else self.conditioning.state_dict()
        return {
            "options": self.options,
            "done": self.done,
            "control": self.control.state_dict(),
            "conditioning": kept,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`; the weights are loaded before, the optimizer's state after. Raises StateError
        for a state of other options."""
        if state["options"] != self.options:
            other = [key for key, value in self.options.items() if state["options"].get(key) != value]
            what = f"the state was made with another {', '.join(other[:3])}"
            raise StateError(711, what, hint="give the same options")
        self.done = state["done"]
        self.control.load_state_dict(state["control"])
        if self.conditioning is not None:
            self.conditioning.load_state_dict(state["conditioning"])


def _conditioning(
    step: FinetuneStep, model: nn.Module, weights: dict[str, Tensor], optimizer: Optimizer
) -> Conditioning | None:
    if step.condition == "none" or not weights:
        return None
    wanted = {id(weight) for weight in weights.values()}
    names = [name for name, param in model.named_parameters() if id(param) in wanted]
    takes: dict[str, str] = CONDITIONINGS[step.condition].takes
    options = {option: float(getattr(step, field) or 0) for option, field in takes.items()}
    conditioning = condition(model, step.condition, names, **options)
    conditioning.attach(optimizer)
    return conditioning


class Sparsity(Driver):
    """Bring a model's weights to a target sparsity in a loop of `steps` optimizer steps.

    It sets the learning rate of every step, as torch's schedulers do: its peak is each parameter group's own
    rate (`initial_lr`, or else `lr`). With `lr` the largest of them becomes that, and the others follow in
    proportion. Options are the fields of `FinetuneStep` about sparsity, selection, decay, conditioning
    and the learning rate's shape. The optimizer's own weight decay should be 0 for the weights that are to be
    sparse.

    Which weights are cut and counted in the target is settled here: what is prunable, trained and in the
    optimizer. What is frozen stays as it is, and is not cut even when it is thawed later. `summary` says it.
    Raises UsageError for an option that is the loop's, and for what FinetuneStep refuses.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, *, steps: int, lr: float | None = None, **options: Any
    ) -> None:
        optimizer = with_hooks(optimizer)
        known = about(FinetuneStep)
        loops = {name for name, each in known.items() if each.of_loop or each.panel == "Arguments"}
        theirs = sorted(set(options) & loops)
        if theirs:
            raise UsageError(250, f"{theirs[0]} is the loop's own", hint="leave it out")
        top = max(own_rate(group) for group in optimizer.param_groups)
        lr = top if lr is None else lr
        fixed = {"model": "-", "out": "-", "data": "-", "task": "causal-lm", "lr": lr}
        kind = "adamw" if isinstance(optimizer, AdamW) else "sgd"
        step = resolve_auto(resolve(FinetuneStep, {**fixed, **options, "optimizer": kind}), model, steps)
        loaded = Loaded(model, {name: name for name in model.state_dict()}, (), ())
        held = {id(param) for group in optimizer.param_groups for param in group["params"]}
        freeze_(step, loaded)
        prunable, weights = prunable_parameters(step, loaded, resumes=True, held=held)
        self.summary = kept_in_words(prunable).full
        self._say_left(prunable)
        super().__init__(step, model, weights, optimizer, steps)
        # Where a loop clips before it calls `after_backward`, clipping is to see only what lives, too.
        self._handles = [
            weight.register_post_accumulate_grad_hook(self._mask(name)) for name, weight in weights.items()
        ]

    def _say_left(self, prunable: Chosen) -> None:
        for why in ("frozen", "not in the optimizer"):
            left = [name for name, each in prunable.items() if each.reason == why]
            if left:
                others = sum(each.prunable for each in prunable.values())
                text = "%s: %s; stays as it is, and the target is of the other %d tensors"
                _log.warning(text, why, ", ".join(left[:4]) + ", ..." * (len(left) > 4), others)

    def _mask(self, name: str) -> Any:
        def hook(weight: Tensor) -> None:
            held = name in self.control.masks and not self.control.method.exchanges(self.done)
            if weight.grad is not None and held:
                keep_only_(weight.grad, self.control.masks[name])

        return hook

    def finish(self) -> bool:
        """Raises StateError where the model has other parameters by now."""
        there = {id(param) for param in self.model.parameters()}
        lost = [name for name, weight in self.control.weights.items() if id(weight) not in there]
        if lost:
            what = f"{lost[0]} is another parameter than at the start, which was not trained for the target"
            raise StateError(715, what, hint="load weights in place: load_state_dict without assign=True")
        cut = super().finish()
        for handle in self._handles:
            handle.remove()
        if cut:
            text = "cut to the target at the end, after %d of %d steps: measure the model again"
            _log.warning(text, self.done, self.control.phases.steps)
        return cut
