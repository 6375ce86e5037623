"""What the tensors of a torch module are, told by the modules that hold them."""

from torch import nn

from lpsparse.pruning.roles import PRUNED, Guess, Role, guess_roles, is_head

_KINDS: tuple[tuple[Role, tuple[type[nn.Module], ...]], ...] = (
    ("embedding", (nn.Embedding, nn.EmbeddingBag)),
    ("linear", (nn.Linear, nn.Bilinear, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)),
    ("convolution", (nn.Conv1d, nn.Conv2d, nn.Conv3d)),
    ("convolution", (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)),
    ("norm", (nn.LayerNorm, nn.GroupNorm)),
)
_NAMED_WELL = ("bias", "router", "scale", "mask")  # roles within a linear layer that names tell surely


def roles_of(model: nn.Module) -> dict[str, Role]:
    """The role of each tensor of a state dict whose module tells it; the others are left to their names.

    Output embeddings and the layers of a task are heads; what is tied to an embedding is one.
    """
    guesses = guess_roles((name, tuple(value.shape)) for name, value in model.state_dict().items())
    outputs = getattr(model, "get_output_embeddings", lambda: None)()
    tied = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
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
            elif module is outputs or is_head(name):
                found[name] = "head"
            else:
                found[name] = "embedding" if id(param) in tied else role
    return found | _buffers(model, guesses)


def _role(module: nn.Module) -> Role | None:
    if type(module).__name__ == "Conv1D":  # GPT-2's linear layer, with its weight transposed
        return "linear"
    return next((role for role, kinds in _KINDS if isinstance(module, kinds)), None)


def _buffers(model: nn.Module, guesses: dict[str, Guess]) -> dict[str, Role]:
    """A buffer is never a weight, whatever it is called."""
    names = [name for name, _ in model.named_buffers(remove_duplicate=False) if name in guesses]
    return {name: "state" for name in names if guesses[name].role in PRUNED or not guesses[name].sure}
