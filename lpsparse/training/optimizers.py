"""The base optimizers by name, and any class of torch's interface that the person at the terminal names."""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, AdamW, Muon, Optimizer

from lpsparse.errors import UsageError
from lpsparse.families import METHODS
from lpsparse.steps.finetune import FinetuneStep
from lpsparse.training.model_fn import load_code

Group = dict[str, Any]


def make_optimizer(step: FinetuneStep, model: nn.Module, weights: dict[str, Tensor]) -> Optimizer:
    """The base optimizer; its own weight decay acts only where L_p decay does not."""
    chosen = {id(weight) for weight in weights.values()} if METHODS[step.method].decays else set[int]()
    trained = [param for param in model.parameters() if param.requires_grad]
    plain = [param for param in trained if id(param) not in chosen]
    groups = [
        {"params": [param for param in trained if id(param) in chosen], "weight_decay": 0.0},
        {"params": [param for param in plain if param.ndim >= 2], "weight_decay": step.weight_decay},
        {"params": [param for param in plain if param.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return _make(step.optimizer, groups, step.lr)


def _make(name: str, groups: list[Group], lr: float) -> Optimizer:
    """The optimizer `name` over `groups`, each with its own "weight_decay".

    Raises UsageError for MODULE:CLASS that is no optimizer or cannot be made of groups and a learning rate.
    """
    if name == "adamw":
        return AdamW(groups, lr=lr)
    if name == "sgd":
        return SGD(groups, lr=lr, momentum=0.9, nesterov=True)
    if name == "adafactor":
        return Adafactor(groups, lr=lr)
    if name == "muon":
        return MuonAdamW(groups, lr)
    kind = load_code(name, "--optimizer")
    try:
        made = kind(groups, lr=lr)
    except Exception as error:  # another's code
        what = f"--optimizer {name}: {type(error).__name__}: {error}"
        raise UsageError(234, what, hint="it is called with parameter groups and lr=") from error
    if not isinstance(made, Optimizer):
        what = f"--optimizer {name}: gave a {type(made).__name__}"
        raise UsageError(234, what, hint="name a class of torch.optim's interface")
    return made


def switch(optimizer: Any, mode: Literal["train", "eval"]) -> None:
    """For an optimizer that trains other weights than those to use, and exchanges them (schedule-free)."""
    change = getattr(optimizer, mode, None)
    if callable(change):
        change()


class MuonAdamW(Optimizer):
    """Muon (Jordan et al. 2024) of every matrix, AdamW of all else: one optimizer with one state.

    The size of Muon's update is made AdamW's (Liu et al. 2025, arXiv 2502.16982), so that one learning rate
    serves both.
    """

    def __init__(self, groups: list[Group], lr: float) -> None:
        self._muon: Muon | None = None
        self._adamw: AdamW | None = None
        split = [part for group in groups for part in _split(group)]
        super().__init__(split, {"lr": lr, "weight_decay": 0.0, "muon": False})
        self._link()

    def _link(self) -> None:
        """The two over the same groups and the same state as this one, which may be new ones after a load."""
        rate, matrices = self.defaults["lr"], [group for group in self.param_groups if group["muon"]]
        rest = [group for group in self.param_groups if not group["muon"]]
        self._muon = Muon(matrices, lr=rate, adjust_lr_fn="match_rms_adamw") if matrices else None
        self._adamw = AdamW(rest, lr=rate) if rest else None
        for part, own in ((self._muon, matrices), (self._adamw, rest)):
            if part is not None:
                part.param_groups, part.state = own, self.state

    def add_param_group(self, param_group: Group) -> None:
        super().add_param_group(param_group)
        if self._adamw is not None or self._muon is not None:  # later than the first ones
            self._link()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._link()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in (self._muon, self._adamw):
            if part is not None:
                part.step()
        return loss


def _split(group: Group) -> list[Group]:
    params: list[Tensor] = list(group["params"])
    parts = (
        {**group, "params": [param for param in params if param.ndim == 2], "muon": True},
        {**group, "params": [param for param in params if param.ndim != 2], "muon": False},
    )
    return [part for part in parts if part["params"]]
