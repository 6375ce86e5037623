"""Where the output units of a weight lie: rows of linear layers, convolutions, transformers' Conv1D and
experts."""

from collections.abc import Iterable

from torch import Tensor, nn

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def as_rows(weight: Tensor, axis: int, groups: int = 1) -> Tensor:
    """A view or copy of `weight` as (output units, rest). `axis` is the output dimension.

    axis 1 is transformers' Conv1D (in, out) and transposed convolutions (in, out / groups, ...), whose
    output unit is a (group, channel) pair; axis -2 is a stack of experts (experts, out, in), one row an
    expert and output.
    """
    if axis == 0:
        return weight.reshape(weight.shape[0], -1)
    if axis == -2:
        return weight.reshape(-1, weight.shape[-1])
    split = weight.reshape(
        groups, weight.shape[0] // groups, weight.shape[1], -1
    )  # (groups, in, out, kernel)
    return split.transpose(1, 2).reshape(groups * weight.shape[1], -1)


def from_rows(rows: Tensor, like: Tensor, axis: int, groups: int = 1) -> Tensor:
    """The inverse of `as_rows`: (output units, rest) in the shape of `like`."""
    if axis != 1:
        return rows.reshape(like.shape)
    inputs = like.shape[0] // groups
    split = rows.reshape(groups, like.shape[1], inputs, -1)  # (groups, out, in, kernel)
    return split.transpose(1, 2).reshape(like.shape)


def row_scale(weight: Tensor, scale: Tensor, axis: int, groups: int = 1) -> Tensor:
    """`scale`, one number an output unit, shaped so that it multiplies `weight`."""
    if axis == 0:
        return scale.reshape(-1, *[1] * (weight.ndim - 1))
    if axis == -2:
        return scale.reshape(*weight.shape[:-1], 1)
    inputs = weight.shape[0] // groups
    spread = scale.reshape(groups, 1, weight.shape[1]).expand(groups, inputs, weight.shape[1])
    return spread.reshape(weight.shape[0], weight.shape[1], *[1] * (weight.ndim - 2))


def row_weights(model: nn.Module) -> Iterable[tuple[str, Tensor, int, int]]:
    """Weights whose output dimension is known: (parameter name, weight, axis, groups)."""
    for prefix, module in model.named_modules():
        weight = getattr(module, "weight", None)
        name = f"{prefix}.weight" if prefix else "weight"
        if isinstance(module, _TRANSPOSED):
            yield name, module.weight, 1, module.groups
        elif isinstance(module, _PLAIN):
            yield name, module.weight, 0, 1
        elif type(module).__name__ == "Conv1D" and isinstance(weight, Tensor) and weight.ndim == 2:
            yield name, weight, 1, 1  # transformers stores (in, out)
        else:
            for key, value in module.named_parameters(recurse=False):
                if value.ndim == 3 and "expert" in prefix:
                    yield f"{prefix}.{key}", value, -2, 1
