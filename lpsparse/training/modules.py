"""The roles of a torch module's tensors, by the modules that hold them."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from lpsparse.pruning.roles import PRUNED, Guess, Role, guess_roles, is_head

_KINDS: tuple[tuple[Role, tuple[type[nn.Module], ...]], ...] = (
    ("embedding", (nn.Embedding, nn.EmbeddingBag)),
    ("linear", (nn.Linear, nn.Bilinear, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)),
    ("convolution", (nn.Conv1d, nn.Conv2d, nn.Conv3d)),
    ("convolution", (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)),
    ("norm", (nn.LayerNorm, nn.GroupNorm)),
)
_ASKED: tuple[tuple[str, Role], ...] = (  # of transformers and timm
    ("get_output_embeddings", "head"),
    ("get_classifier", "head"),
)
_NAMED_WELL = ("bias", "router", "scale", "mask")  # roles within a linear layer that names tell surely


def roles_of(model: nn.Module) -> dict[str, Role]:
    """The role of each tensor of a state dict whose module tells it; the others are left to their names.

    Output embeddings and the layers of a task are heads; what is tied to an embedding is one.
    """
    guesses = guess_roles((name, tuple(value.shape)) for name, value in model.state_dict().items())
    kept = kept_by_module(model)
    found: dict[str, Role] = {}
    for place, module in model.named_modules(remove_duplicate=False):
        role = _role(module)
        for own, param in module.named_parameters(recurse=False):
            name = f"{place}.{own}" if place else own
            guess = guesses.get(name)
            if role is None or guess is None or guess.role in _NAMED_WELL:
                continue
            if role == "embedding":
                found[name] = guess.role if guess.role in ("position", "token") else role
            else:
                found[name] = kept.get(id(param)) or ("head" if is_head(name) else role)
    return found | _buffers(model, guesses)


def _role(module: nn.Module) -> Role | None:
    if type(module).__name__ == "Conv1D":  # GPT-2's linear layer, with its weight transposed
        return "linear"
    return next((role for role, kinds in _KINDS if isinstance(module, kinds)), None)


def _buffers(model: nn.Module, guesses: dict[str, Guess]) -> dict[str, Role]:
    """A buffer is never a weight, whatever it is called."""
    names = [name for name, _ in model.named_buffers(remove_duplicate=False) if name in guesses]
    return {name: "state" for name in names if guesses[name].role in PRUNED or not guesses[name].sure}


def kept_by_module(model: nn.Module) -> dict[int, Role]:
    """Id of a parameter -> why it is kept. A tied one is the same parameter under both names."""
    kept: dict[int, Role] = {}
    for part in model.modules():
        for module, why in _said(part):
            for param in module.parameters():
                kept.setdefault(id(param), why)
    return kept


def _said(part: Any) -> Iterator[tuple[nn.Module, Role]]:
    if isinstance(part, (nn.Embedding, nn.EmbeddingBag)):
        yield part, "embedding"
    for method, why in _ASKED:
        if callable(ask := getattr(part, method, None)):
            try:
                found: Any = ask()
            except (NotImplementedError, AttributeError, TypeError):  # what transformers' base class does
                continue
            for module in found if isinstance(found, (tuple, list)) else (found,):
                if isinstance(module, nn.Module) and module is not part:
                    yield module, why
    head = _last_linear(part)
    if head is not None:
        yield head, "head"


def _last_linear(part: Any) -> nn.Module | None:
    """The last linear layer that a transformers model has beside its base model, which is a task's head."""
    prefix = getattr(part, "base_model_prefix", None)
    base: Any = getattr(part, prefix, None) if isinstance(prefix, str) and prefix else None
    if not isinstance(base, nn.Module) or base is part:
        return None
    inside = {id(module) for module in base.modules()}
    beside = [each for each in part.modules() if id(each) not in inside and isinstance(each, nn.Linear)]
    return beside[-1] if beside else None
