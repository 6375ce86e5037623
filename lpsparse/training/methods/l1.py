"""The L1 prox on all weights, then a cut to the target: the loop of `lp` at p = 1, without selection."""

from lpsparse.training.methods.lp import Lp


class L1(Lp):
    words = "L_1 decay"
    needs_target = True
    selects = False
    holds_zeros = False

    def norm(self) -> tuple[float, str]:
        return 1.0, "irl1"
