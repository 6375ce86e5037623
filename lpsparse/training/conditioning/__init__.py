"""Weight conditioning: one file a method, one line here.
`condition` attaches one to a model, `fold` removes it. How they work: `base`.
"""

from collections.abc import Iterable
from typing import Any

from torch import nn

from lpsparse.errors import UsageError
from lpsparse.training.conditioning.base import Conditioning
from lpsparse.training.conditioning.denoise import Denoise
from lpsparse.training.conditioning.l1_rows import L1Rows
from lpsparse.training.conditioning.modular import Modular
from lpsparse.training.conditioning.rows import RowConditioning
from lpsparse.training.conditioning.spectral import Spectral
from lpsparse.training.conditioning.weight_norm import WeightNorm

METHODS: dict[str, type[Conditioning]] = {
    "rows": RowConditioning,
    "weight-norm": WeightNorm,
    "l1-rows": L1Rows,
    "spectral": Spectral,
    "modular": Modular,
    "denoise": Denoise,
}


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
    if method not in METHODS:
        raise UsageError(222, f"condition {method!r}: not known", hint=f"one of {', '.join(METHODS)}")
    if getattr(model, "_lpsparse_conditioning", None) is not None:
        raise UsageError(223, "the model is conditioned already", hint="call fold(model) first")
    conditioning = METHODS[method](model, names, **options)
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
