"""What a model keeps dense, known by its modules: embeddings, the output head, and what is tied to either."""

from collections.abc import Iterator
from typing import Any

from torch import nn

_EMBEDDING, _HEAD = "embedding", "output head"  # as in pruning.prunable
_ASKED = (  # of transformers and timm
    ("get_input_embeddings", _EMBEDDING), ("get_output_embeddings", _HEAD), ("get_classifier", _HEAD),
)  # fmt: skip


def kept_by_module(model: nn.Module) -> dict[int, str]:
    """Id of a parameter -> why it is kept. A tied one is the same parameter under both names."""
    kept: dict[int, str] = {}
    for part in model.modules():
        for module, why in _said(part):
            for param in module.parameters():
                kept.setdefault(id(param), why)
    return kept


def _said(part: Any) -> Iterator[tuple[nn.Module, str]]:
    if isinstance(part, (nn.Embedding, nn.EmbeddingBag)):
        yield part, _EMBEDDING
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
        yield head, _HEAD


def _last_linear(part: Any) -> nn.Module | None:
    """The last linear layer that a transformers model has beside its base model, which is a task's head."""
    prefix = getattr(part, "base_model_prefix", None)
    base: Any = getattr(part, prefix, None) if isinstance(prefix, str) and prefix else None
    if not isinstance(base, nn.Module) or base is part:
        return None
    inside = {id(module) for module in base.modules()}
    beside = [each for each in part.modules() if id(each) not in inside and isinstance(each, nn.Linear)]
    return beside[-1] if beside else None
