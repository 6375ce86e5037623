"""What processes tell one another. The only file that uses torch.distributed."""

from collections.abc import Sequence

import torch
from torch import Tensor, distributed


def average_(tensors: Sequence[Tensor]) -> None:
    """Replace each 1-D tensor by its mean over the processes, in place; alone, leave them."""
    if not tensors or not distributed.is_available() or not distributed.is_initialized():
        return
    flat = torch.cat(list(tensors))
    distributed.all_reduce(flat)
    means = flat.div_(distributed.get_world_size()).split([len(tensor) for tensor in tensors])
    for tensor, mean in zip(tensors, means, strict=True):
        tensor.copy_(mean)
