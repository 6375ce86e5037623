"""Weight conditioning, one file per method.
`condition` attaches one to a model, `fold` removes it. How they work: `base`.
"""

from collections.abc import Iterable
from typing import Any

from torch import nn

from lpsparse.errors import UsageError
from lpsparse.families import CONDITIONINGS
from lpsparse.training.conditioning.base import Conditioning


def condition(
    model: nn.Module, method: str = "rows", names: Iterable[str] | None = None, **options: Any
) -> Conditioning:
    """Condition the weights of `model` (those in `names`; default every linear and convolution weight).

    The function of the model in eval mode does not change. `rows`: each row keeps its norm through training.
    `weight-norm` (gain_lr_ratio), `l1-rows` (sparsity, path_penalty) and `modular` need `.attach(optimizer)`;
    `denoise` (sparsity) and `l1-rows` are told by `.progress(share)` how far the run is. Weights are put back
    where the method keeps them before the next forward pass or by `.retract()`. Raises UsageError for
    an unknown method or option and for a model that is conditioned already.
    """
    if method not in CONDITIONINGS:
        raise UsageError(222, f"condition {method!r}: not known", hint=f"one of {', '.join(CONDITIONINGS)}")
    if getattr(model, "_lpsparse_conditioning", None) is not None:
        raise UsageError(223, "the model is conditioned already", hint="call fold(model) first")
    conditioning = CONDITIONINGS[method](model, names, **options)
    model._lpsparse_conditioning = conditioning  # pyright: ignore[reportArgumentType]
    return conditioning


def fold(model: nn.Module) -> nn.Module:
    """Finish conditioning: weights where the method keeps them,
    hooks gone, keys and shapes as before. Returns `model`."""
    conditioning = getattr(model, "_lpsparse_conditioning", None)
    if isinstance(conditioning, Conditioning):
        conditioning.remove()
        del model._lpsparse_conditioning
    return model
