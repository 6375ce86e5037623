"""Which tensor of BASE is which of MODEL: by its name, or by its name behind one prefix.

A class with a head calls what it takes from its base model `bert.encoder...`, where the base model alone says
`encoder...`. Names, shapes and dtypes of both sides tell the prefix; no table of model families is needed.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from lpsparse.checkpoint.dtypes import DTYPES
from lpsparse.checkpoint.layouts.retired import config_of
from lpsparse.checkpoint.names import LEGACY_NORMS
from lpsparse.checkpoint.open import Checkpoint
from lpsparse.checkpoint.tensors import Tensor
from lpsparse.pruning.roles import is_head

_MOST_PARTS = 8  # of a name that may be its prefix
_LEAST = 2  # tensors that a prefix must match: one may do so by accident
_WRAPPER = "module."  # of torch's DataParallel
# Heads by the names that pruning keeps, and what stands between a base model and its head.
_HEAD = re.compile(
    r"(\w+\.)?(pooler|pre_classifier)\."
    r"|(\w+_)?(heads?|classifier|predictions|projection)\.|vocab_(transform|layer_norm|projector)\."
)
Named = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Match:
    """`names` are BASE's -> MODEL's, of what both have. At most one of the prefixes is not empty."""

    names: dict[str, str]
    prefix_here: str = ""
    prefix_there: str = ""


def match(checkpoint: Checkpoint, base: Checkpoint) -> Match:
    """The pairs of tensors that are one, of whatever shapes. A prefix counts where it gives more pairs of one
    shape than no prefix and than any other does, and half of the smaller side at least."""
    ours, theirs = _bare(checkpoint.tensors), _bare(base.tensors)
    here, there = _prefixes(ours, theirs)
    found: dict[str, str] = {}
    used: set[str] = set()
    for way in (lambda name: _moved(name, here, there), lambda name: name):
        for name, tensor in theirs.items():
            mine = ours.get(way(name) or "")
            if tensor.name not in found and mine is not None and mine.name not in used:
                found[tensor.name] = mine.name
                used.add(mine.name)
    return Match(found, here, there)


def _bare(tensors: Iterable[Tensor]) -> Named:
    """By name without a wrapper's prefix, and with today's names of BERT's first norms."""
    given = list(tensors)
    wrapper = _WRAPPER if all(tensor.name.startswith(_WRAPPER) for tensor in given) else ""
    found: Named = {}
    for tensor in given:
        name = tensor.name.removeprefix(wrapper)
        for new, old in LEGACY_NORMS.items():
            if name.endswith(f"LayerNorm{old}"):
                name = name.removesuffix(old) + new
        found[tensor.name if name in found else name] = tensor
    return found


def _prefixes(ours: Named, theirs: Named) -> tuple[str, str]:
    """The prefix that names have here and not there, and the other way round."""
    plain = sum(_alike(tensor, theirs.get(name)) for name, tensor in ours.items())
    fewer = min(len(ours), len(theirs))
    if plain == fewer:
        return "", ""
    counts = Counter(
        [*((each, "") for each in _found(ours, theirs)), *(("", each) for each in _found(theirs, ours))]
    )
    (best, most), (_, second) = [*counts.most_common(2), (("", ""), 0), (("", ""), 0)][:2]
    return best if most > max(plain, second) and most >= max(_LEAST, fewer / 2) else ("", "")


def _found(longer: Named, shorter: Named) -> Iterator[str]:
    """The prefix of each tensor that has, without it, the name and form of one of the other side."""
    for name, tensor in longer.items():
        parts = name.split(".", _MOST_PARTS)
        for i in range(1, len(parts)):
            if _alike(tensor, shorter.get(".".join(parts[i:]))):
                yield ".".join((*parts[:i], ""))


def _alike(one: Tensor, other: Tensor | None) -> bool:
    if other is None or one.shape != other.shape:
        return False
    return DTYPES[one.dtype].is_float == DTYPES[other.dtype].is_float  # bf16 of float32 is the same tensor


def _moved(name: str, here: str, there: str) -> str | None:
    """A name of BASE as MODEL has it, by the prefix; None where it is beside BASE's base model."""
    return here + name.removeprefix(there) if name.startswith(there) else None


def left_behind(checkpoint: Checkpoint, base: Checkpoint, found: Match) -> tuple[str, ...]:
    """The tensors of BASE that MODEL, being of another class, has no place for or has for another task: heads
    and poolers. None where MODEL is of BASE's class, and needs them."""
    ours = {tensor.name: tensor.shape for tensor in checkpoint.tensors}
    lost = [
        tensor.name
        for tensor in base.tensors
        if ours.get(found.names.get(tensor.name, "")) != tensor.shape
        and _is_head(tensor.name, found.prefix_there)
    ]
    new = ours.keys() - found.names.values()
    reshaped = any(name in found.names for name in lost)  # a head for other labels
    is_other = reshaped or any(_is_head(name, found.prefix_here) for name in new)
    is_other = is_other or bool(found.prefix_here or found.prefix_there) or _is_other_class(checkpoint, base)
    return tuple(sorted(lost if is_other else _tied(lost, checkpoint, base)))


def _is_head(name: str, prefix: str) -> bool:
    bare = name.removeprefix(_WRAPPER)
    inner = bare.removeprefix(prefix)
    return not bare.startswith(prefix) or is_head(inner) or _HEAD.match(inner) is not None


def _is_other_class(checkpoint: Checkpoint, base: Checkpoint) -> bool:
    """Whether both config.json say so."""
    classes = [config_of(each.root).get("architectures") for each in (checkpoint, base)]
    return all(classes) and classes[0] != classes[1]


def _tied(lost: list[str], checkpoint: Checkpoint, base: Checkpoint) -> list[str]:
    """Of these those that a tied embedding stands for: an output projection has its shape, one row for each
    word. A config says that they are tied also where the class has no such projection."""
    config = config_of(checkpoint.root)
    words = config.get("vocab_size")
    if config.get("tie_word_embeddings") is not True or not isinstance(words, int):
        return []
    kept = {tensor.shape for tensor in checkpoint.tensors if tensor.shape[:1] == (words,)}
    return [name for name in lost if base[name].shape in kept]
