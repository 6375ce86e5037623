"""How weights go to zero, one file per method: a subclass of `Method`, named in `lpsparse/families.py`.

These modules import torch only inside functions: a method's facts are also read where torch is not loaded.
"""

from decimal import Decimal
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    from lpsparse.training.control import SparsityControl

REFRESH = 10  # steps between choices of what is to go


class Method:
    """One method in one run. The class holds what others ask about it; the hooks around a step do its work,
    with what `control` offers: masks, choosing, cutting, holding. Only `before_step` and later hooks may
    change weights."""

    words: ClassVar[str] = ""  # in a summary; empty: its name in the family
    needs_target: ClassVar[bool] = True
    # When the target is cut: before step 0, as the target rises, at the end of the decay phase, or never.
    cuts: ClassVar[Literal["start", "rising", "end", "never"]] = "end"
    decays: ClassVar[bool] = False  # has an LpDecay on the weights, in place of the optimizer's weight decay
    selects: ClassVar[bool] = False  # can spare what the target would keep; `resolve_auto` serves it
    holds_zeros: ClassVar[bool] = False  # a tensor of zeros alone would never leave zero
    shards: ClassVar[bool] = True  # works on parts of tensors (--shard)

    lambda_p = 0.0  # strength of the decay in this step, for the log

    @property
    def w_kill(self) -> float:
        """Magnitude below which a weight that the loss does not hold dies in this run; 0 for none."""
        return 0.0

    def __init__(self, control: "SparsityControl") -> None:
        self.control = control

    @property
    def rises(self) -> bool:
        """Return whether the cut is made in parts, as the target rises."""
        return self.cuts == "rising" or self.control.step.cut == "gradual"

    def begin(self) -> None:
        """Attach to the optimizer. Weights stay as they are."""

    def before_step(self, t: int) -> None:
        """Before the forward pass of step t (from 0)."""
        if self.cuts == "start" and t == 0:
            self.control.cut(self.control.count(self.control.target or Decimal(0)))

    def after_backward(self, t: int) -> None:
        """When the gradients are there, before those of what was cut become zero."""

    def due(self, done: int) -> int | None:
        """How many weights are to be zero after `done` steps, where a cut is due then; else None."""
        control, phases = self.control, self.control.phases
        ends = done == phases.cut_at
        if self.rises:
            again = done > phases.start and (done - phases.start) % REFRESH == 0
            return control.scheduled(done) if ends or (again and done < phases.cut_at) else None
        if not ends or self.cuts != "end" or control.target is None:
            return None
        return control.count(control.target)

    def before_cut(self) -> None:
        """Just before weights are cut, at `due` or at the end of a run."""

    def end(self) -> None:
        """Detach from the optimizer."""

    def exchanges(self, t: int) -> bool:
        """Return whether step t needs the gradients of what was cut, too."""
        return False

    def in_short(self) -> str:
        """What a summary of one line says after `words`."""
        return ""

    def in_full(self) -> str:
        """What the full summary says at its end."""
        return ""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside weights, masks and the optimizer's state: tensors and numbers."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`, before the optimizer's state is loaded."""
