"""The method as four calls around a loop's optimizer: of `lpsparse finetune`, and of anybody's loop."""

from typing import Any

from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lpsparse.errors import StateError, UsageError
from lpsparse.recipe import FinetuneStep
from lpsparse.settings import resolve
from lpsparse.training.allocation import keep_only_
from lpsparse.training.conditioning import fold
from lpsparse.training.control import SparsityControl
from lpsparse.training.model import Loaded
from lpsparse.training.phases import plan_phases
from lpsparse.training.setup import choose_weights, make_conditioning, resolve_auto

_OF_THE_LOOP = {  # fields of FinetuneStep that mean nothing here
    "model", "out", "data", "task", "steps", "epochs", "batch_size", "clip", "optimizer", "eval_data",
}  # fmt: skip


class Method:
    """What a run of `steps` optimizer steps does beside its loop. `step` is one that `resolve_auto` has seen.

    Call `before_step` before the forward pass, `after_backward` when the gradients are there (before they are
    clipped), `after_step` after the optimizer's step, and `finish` at the end.
    """

    def __init__(
        self, step: FinetuneStep, model: nn.Module, weights: dict[str, Tensor], optimizer: Optimizer,
        steps: int,
    ) -> None:  # fmt: skip
        self.options = step.recorded()
        self.model, self.done = model, 0
        self.conditioning = make_conditioning(step, model, weights, optimizer)
        self.control = SparsityControl(step, weights, optimizer, plan_phases(step, steps))

    def before_step(self) -> None:
        for group in self.control.optimizer.param_groups:
            group["lr"] = self.control.rates[self.done] * group.get("lr_ratio", 1.0)
        if self.conditioning is not None:
            self.conditioning.progress(self.control.phases.progress(self.done + 1))
        self.control.before_step(self.done)

    def after_backward(self) -> None:
        if self.conditioning is not None:
            self.conditioning.restore()
        self.control.after_backward(self.done)

    def after_step(self) -> None:
        if self.conditioning is not None:
            self.conditioning.retract()
        self.control.after_step(self.done)
        self.done += 1

    def finish(self) -> None:
        """Leave an ordinary model with the target's zeros, and the optimizer as it was."""
        fold(self.model)
        self.control.after_step(self.control.phases.steps)  # hold the mask through the last retraction
        if self.control.decay is not None:
            self.control.decay.remove()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed loop needs beside the weights and the optimizer's state: tensors, numbers, text."""
        kept = {} if self.conditioning is None else self.conditioning.state_dict()
        return {
            "options": self.options, "done": self.done, "control": self.control.state_dict(),
            "conditioning": kept,
        }  # fmt: skip

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


class Sparsity(Method):
    """Bring a model's weights to a target sparsity in a loop of `steps` optimizer steps.

    It sets the learning rate of every step: `lr` is its peak. Options are the fields of `recipe.FinetuneStep`
    about sparsity, selection, decay, conditioning and the learning rate's shape. The optimizer's own weight
    decay should be 0 for the weights that are to be sparse. Raises UsageError for an option that is the
    loop's, and for what FinetuneStep refuses.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, *, steps: int, lr: float, **options: Any
    ) -> None:
        theirs = sorted(set(options) & _OF_THE_LOOP)
        if theirs:
            raise UsageError(250, f"{theirs[0]} is the loop's own", hint="leave it out")
        fixed = {"model": "-", "out": "-", "data": "-", "task": "causal-lm", "lr": lr}
        kind = "adamw" if isinstance(optimizer, AdamW) else "sgd"
        step = resolve_auto(resolve(FinetuneStep, {**fixed, **options, "optimizer": kind}), model, steps)
        loaded = Loaded(model, {name: name for name in model.state_dict()}, (), ())
        _, weights = choose_weights(step, loaded, resumes=True)  # a cut may have emptied a tensor
        super().__init__(step, model, weights, optimizer, steps)
        # Where a loop clips before it calls `after_backward`, clipping is to see only what lives, too.
        self._handles = [
            weight.register_post_accumulate_grad_hook(self._mask(name)) for name, weight in weights.items()
        ]

    def _mask(self, name: str) -> Any:
        def hook(weight: Tensor) -> None:
            if weight.grad is not None and name in self.control.masks:
                keep_only_(weight.grad, self.control.masks[name])

        return hook

    def finish(self) -> None:
        super().finish()
        for handle in self._handles:
            handle.remove()
