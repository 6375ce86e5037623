"""L_p decay of the weights that the current target would cut (selective decay), or of all without a target.

Its lambda is steered so that weights arrive near zero as the target rises; then the target is cut exactly
(`cut`: or in parts, as it rises). Without a target no cut follows, and the run ends by settling (`schedule`).
"""

from typing import TYPE_CHECKING, Any

from lpsparse.training.methods import REFRESH, Method

if TYPE_CHECKING:
    from torch import Tensor

    from lpsparse.training.control import SparsityControl
    from lpsparse.training.decay import LpDecay

# A weight that is to go has a share of the run's steps to do so, so selective decay starts at a multiple
# of the budget lambda, which gives a weight all of them; the loop then moves it by at most MOST_STEERING
# either way.
SELECTIVE = 20.0
MOST_STEERING = 10.0
STEER = 1.15
SETTLE_EDGE = 0.25  # of w_kill: without a target, what falls in the last steps (see schedule)


class Lp(Method):
    words = "L_p decay"
    needs_target = False
    decays = True
    selects = True
    holds_zeros = True  # p < 2: an exact zero stays zero

    def __init__(self, control: "SparsityControl") -> None:
        super().__init__(control)
        self.p, self.prox = self.norm()
        self.steering = 1.0
        self.spare: dict[str, Tensor] = {}  # True where the current target would keep a weight
        self.decay: LpDecay | None = None
        self.base_lambda = self._base_lambda()

    def norm(self) -> tuple[float, str]:
        """The exponent, and the decay's step (`decay.PROXES`)."""
        return self.control.step.p, self.control.step.prox

    @property
    def selective(self) -> bool:
        return self.selects and self.control.target is not None and self.control.step.selective

    @property
    def w_kill(self) -> float:
        """Magnitude below which a weight that the loss does not hold dies in this run; 0 for none."""
        from lpsparse.training.decay import kill_magnitude

        if self.p >= 2 or self.base_lambda == 0:
            return 0.0
        return kill_magnitude(self.p, self.base_lambda, self.control.sum_lr)

    def _base_lambda(self) -> float:
        from lpsparse.training.decay import budget_lambda

        step, sum_lr = self.control.step, self.control.sum_lr
        if step.lambda_p != "auto":
            return step.lambda_p * (self.p if step.lambda_convention == "authors" else 1.0)
        if self.p >= 2:
            return 0.01  # no weight dies at p >= 2, so there is no budget to meet: a usual weight decay
        # An untouched weight is asked to die at the target's quantile, or without a target at the median.
        magnitude = max(self.control.aim.values())
        budget = budget_lambda(self.p, magnitude, sum_lr) if magnitude > 0 else 0.0
        return budget * (SELECTIVE if self.selective else 1.0)

    def begin(self) -> None:
        from lpsparse.training.decay import LpDecay

        control = self.control
        self.decay = LpDecay(
            control.optimizer,
            p=self.p,
            lambda_p=0.0,
            prox=self.prox,
            cautious=control.step.cautious,
            params=control.weights.values(),
        )

    def before_step(self, t: int) -> None:
        """Set lambda, p and the decayed weights of step t; cover what is to go, if asked for."""
        control, phases = self.control, self.control.phases
        decaying = phases.start <= t < phases.cut_at
        if control.target is not None and decaying and (t - phases.start) % REFRESH == 0:
            self._refresh(t)
        self._set_decay(t, acts=decaying or control.target is None)
        if self.selective and control.step.masked_forward and self.spare and decaying:
            control.cover(self.spare)

    def _set_decay(self, t: int, *, acts: bool) -> None:
        assert self.decay is not None, "begin() comes before the first step"
        step = self.control.step
        self.lambda_p = self._lambda(t) if acts else 0.0
        self.decay.set_lambda(self.lambda_p)
        for group in self.control.optimizer.param_groups:
            if step.lambda_p == "auto":  # alike in all groups, whatever their learning rates
                group["lp_lambda"] = self.lambda_p / self.control.share_of_rate(group)
            group["lp_l2"] = step.lambda_2 if acts else 0.0
        if step.p_start is not None:
            share = self.control.phases.progress(t)
            self.decay.set_p(step.p_start + (self.p - step.p_start) * share)

    def _lambda(self, t: int) -> float:
        control = self.control
        if control.target is None and t >= control.phases.cut_at:  # settling
            edge = SETTLE_EDGE * self.w_kill
            self._spare({name: part.abs() >= edge for name, part in control.parts().items()})
            top = max(control.rates)
            return self.base_lambda * top / max(control.rates[t], 1e-9 * top)
        return self.base_lambda * self.steering * min(1.0, (t + 1) / control.phases.warmup)

    def _spare(self, keep: "dict[str, Tensor]") -> None:
        assert self.decay is not None
        self.decay.spare = {id(self.control.weights[name]): each for name, each in keep.items()}

    def _refresh(self, t: int) -> None:
        """Choose what is to go until the next refresh, and steer lambda by what has arrived."""
        control = self.control
        if self.selective:
            self.spare = control.choose(control.scheduled(t + REFRESH))
            self._spare(self.spare)
        if t > control.phases.start and control.step.lambda_p == "auto" and not self.rises:
            late = control.near_zero() < control.scheduled(max(0, t - REFRESH)) / control.size
            self.steering *= STEER if late else 1 / STEER
            self.steering = min(MOST_STEERING, max(1 / MOST_STEERING, self.steering))

    def end(self) -> None:
        if self.decay is not None:
            self.decay.remove()

    def in_short(self) -> str:
        return f" (p {self.p:g}, lambda {self.base_lambda:.3g})"

    def in_full(self) -> str:
        control = self.control
        text = (
            f"; p {self.p:g}, lambda_p {self.base_lambda:.4g} (ours; the authors' "
            f"{self.base_lambda / self.p:.4g})"
        )
        if self.selective:
            return f"{text}, on the weights that the current target would cut"
        if self.p >= 2:
            return f"{text}; with p of 2 or more no weight reaches zero by itself: give a --target-sparsity"
        text += f", sum of learning rates {control.sum_lr:.4g}"
        if control.step.p_start is None:  # with one the budget's formula does not hold
            text += f", w_kill {self.w_kill:.4g}"
        settling = control.phases.steps - control.phases.cut_at
        if self.p >= 1 or control.target is not None or settling == 0:
            return text
        return (
            f"{text}; in the last {settling} steps what is far under w_kill falls, its lambda rising as lr "
            "ends"
        )

    def state_dict(self) -> dict[str, Any]:
        return {"steering": self.steering, "spare": dict(self.spare), "base_lambda": self.base_lambda}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steering, self.base_lambda = float(state["steering"]), state["base_lambda"]
        self.spare = dict(state["spare"])
        if self.selective:
            self._spare(self.spare)
