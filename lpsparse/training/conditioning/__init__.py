"""Weight conditioning: one file a method, one line here.
`condition` attaches one to a model, `fold` removes it.

A conditioned weight W_eff = f(V) is kept projected so that V = W_eff at every step; the tensor in the model
is then always the effective weight, and what is left of the reparametrisation is its gradient. So no
parameter is renamed, no forward pass changes, and any optimizer, checkpoint code or sharding sees an
ordinary model.
"""

from collections.abc import Iterable

from torch import nn

from lpsparse.errors import UsageError
from lpsparse.training.conditioning.rows import RowConditioning

METHODS = {"rows": RowConditioning}


def condition(model: nn.Module, method: str = "rows", names: Iterable[str] | None = None) -> RowConditioning:
    """Condition the weights of `model` (those in `names`; default every linear and convolution weight).

    The function of the model does not change. Each row then keeps its norm through training: gradients lose
    their part along the row, and rows are put back to their norm before the next forward pass, or by
    `.retract()`. Raises UsageError for an unknown method and for a model that is conditioned already.
    """
    if method not in METHODS:
        raise UsageError(222, f"condition {method!r}: not known", mend=f"one of {', '.join(METHODS)}")
    if getattr(model, "_lpsparse_conditioning", None) is not None:
        raise UsageError(223, "the model is conditioned already", mend="call fold(model) first")
    conditioning = METHODS[method](model, names)
    model._lpsparse_conditioning = conditioning  # pyright: ignore[reportArgumentType]
    return conditioning


def fold(model: nn.Module) -> nn.Module:
    """Finish conditioning: rows exactly at their norm,
    hooks gone, keys and shapes as before. Returns `model`."""
    conditioning = getattr(model, "_lpsparse_conditioning", None)
    if isinstance(conditioning, RowConditioning):
        conditioning.remove()
        del model._lpsparse_conditioning
    return model
