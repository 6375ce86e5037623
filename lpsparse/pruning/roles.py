"""What each tensor of a checkpoint is, told by names, shapes and config.json alone.

The words are those that model code uses for its modules and parameters. They were checked against the modules
of every architecture of transformers that builds (benchmarks/architectures.py). What they leave open is
marked: `sure` is False, and who can build the model knows better.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

Role = Literal[
    "linear",
    "convolution",
    "embedding",
    "head",
    "router",
    "norm",
    "bias",
    "state",
    "mask",
    "scale",
    "position",
    "token",
    "unknown",
]
ROLES: tuple[str, ...] = get_args(Role)
PRUNED = ("linear", "convolution")  # the roles whose weights may be cut


@dataclass(frozen=True, slots=True)
class Guess:
    role: Role
    sure: bool = True


def _any(words: str) -> re.Pattern[str]:
    return re.compile(words, re.IGNORECASE)


# Put around a model by torch.compile, FSDP, activation checkpointing, DataParallel and Lightning.
_INSIDE = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_AROUND = re.compile(r"^(?:(?:module|model|net|student)\.)+")
_WEIGHT = re.compile(  # the own names, after the last dot, of what multiplies an input
    r"weight|weight_(v|orig|ih_l\d+(_reverse)?|hh_l\d+(_reverse)?|hr_l\d+(_reverse)?)|\w+_weights?|kernel|\w+_kernel"
    r"|[wvW]\d?|[qkvor]|proj|\w+_proj(ection)?"
)
_OWN: tuple[tuple[Role, re.Pattern[str]], ...] = (  # the own names of all else; the first that is found
    (
        "position",
        _any(
            r"(^|_)(pos(itions?|itional)?|inv_freq|freqs|rotary|alibi|slopes?)(_|$)|relative_position"
            r"|^(relative_attention_bias|seg_embed|emb_rel_[kv]|time_embeddings?|level_embed)$"
        ),
    ),
    ("bias", _any(r"(^|_)bias(es)?(_|$)|^b\d*$")),
    (
        "token",
        _any(r"(^|_)(tokens?|latents?|quer(y|ies)|probe|prompts?)(_\w+)?$|^(class_embedding|cls_emb)$"),
    ),
    ("mask", _any(r"(^|_)masks?$")),
    ("scale", _any(r"(^|_)(scales?|gammas?|lambdas?|absmax|g|alphas?|std|mean|temperature)$")),
    (
        "state",
        _any(r"^(A|D|A_log|dt|running_\w+|time_\w+|\w*decay|\w+_state|embed_avg|embed_sum|cluster_size)$"),
    ),
)
_NORM = _any(
    r"(^|_)(layer|batch|group|rms|instance)?_?norm(s|_?\d+)?(_|$)|norm\d*$|^(ln|bn)(_?\d+|_\w+)?$|^grn$"
)
_POSITION = _any(
    r"^(wpe|pos_emb(ed)?(ding)?s?|\w*position_embeddings?|\w*positional_embeddings?|relative_pos_embeddings|embed_positions"
    r"|relative_attention_bias|\w*position_bias)$"
)
_EMBEDDING = _any(
    r"^(wte|emb|embed|embeds|embeddings?|shared|embed_(tokens?|in|words?)"
    r"|(\w+_)?(word|tok|tokens?|type|segment|char|lang|language)_emb(ed)?(ding)?s?)(_?\d+)?$"
)
# Linear layers beside, before and after embeddings bear such a word too; tables bear others.
_NEAR_EMBEDDING = _any(r"emb|table|codebook|tokens?$|queries|points$|^(scale|shift)$|bias_values|pe_k|feat$")
_PROJECTION = _any(r"proj|linear|mapping|mlp|dense|transformation|^fc")
_ROUTER = _any(r"(^|_)(router|routers)$")
_GATE = _any(r"^(gate|wg|gate_layer)$|expert_gate$")
_HEAD = _any(
    r"^(lm_head|heads?|\w*classifier\w*|score|cls|qa_outputs|embed_out|output_layer|classification_head|predictions?"
    r"|vocab_projector|pooler|\w+_pooler|pre_classifier|fc|(?![qkvor]_)\w+_heads?)$"
)
_BUFFER = _any(r"(^|_)(masks?|bias|ids?|idx|index|indices|positions?|tracked|tid2eid|g_idx)(_|$)")
_HEADS = {"output.weight", "linear.weight", "proj_out.weight"}  # whole names
_LONGEST = 1000  # letters of a name; looking at one of millions would take hours
# What has such behind a name of a head is a model of its own.
_BLOCKS = frozenset({"layers", "layer", "blocks", "block", "h", "stages"})


def guess_roles(
    tensors: Iterable[tuple[str, tuple[int, ...]]], config: Mapping[str, Any] | None = None
) -> dict[str, Guess]:
    """The role of each tensor by name. `config` is config.json: it tells an embedding by its rows."""
    given = dict(tensors)
    shapes = {name: shape for name, shape in given.items() if len(name) <= _LONGEST}
    with_experts = {parent for name in shapes for parent in _holders_of_experts(bare(name))}
    words = _vocabularies(config or {})
    found = dict.fromkeys(given, Guess("unknown", sure=False))
    return found | {name: _guess(bare(name), shape, with_experts, words) for name, shape in shapes.items()}


def bare(name: str) -> str:
    """A name without what wrappers put before and into it."""
    return _AROUND.sub("", _INSIDE.sub("", name))


def is_head(name: str) -> bool:
    """Whether a name is one of an output head or a pooler, whatever its shape."""
    name = bare(name)
    modules = name.split(".")[:-1]
    found = next((i for i, each in enumerate(modules) if _HEAD.match(each)), None)
    if found is None:
        return name in _HEADS
    if modules[found] == "fc" and found > 1:  # a block's, but for those of a model's top
        return False
    return _BLOCKS.isdisjoint(modules[found + 1 :])


def is_buffer(name: str) -> bool:
    """Whether an integer tensor of this name holds masks, places or indexes, which stand for themselves."""
    own = name.rpartition(".")[2]
    return _BUFFER.search(own) is not None


def _holders_of_experts(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[:i]) for i, part in enumerate(parts) if "expert" in part)


def _vocabularies(config: Mapping[str, Any]) -> set[int]:
    """The sizes of vocabularies that no other number of a config equals."""
    sizes: set[int] = set()
    others: set[int] = set()

    def walk(table: Mapping[str, Any], depth: int = 0) -> None:
        for key, value in table.items():
            if isinstance(value, dict) and depth < 4:
                walk(value, depth + 1)  # pyright: ignore[reportUnknownArgumentType]
            elif type(value) is int:
                (sizes if "vocab" in str(key) else others).add(value)

    walk(config)
    return sizes - others


def _guess(name: str, shape: tuple[int, ...], with_experts: set[str], vocabularies: set[int]) -> Guess:
    parts = [part for part in name.split(".") if part != "parametrizations"]
    *modules, own = parts
    if own in ("original0", "original1"):  # torch's weight norm: a magnitude for each row, and directions
        own = "weight_g" if own == "original0" else "weight_v"
        modules = modules[:-1]
    if own != "weight":
        for role, words in _OWN:
            if words.search(own):
                return Guess(role)
    last = next((module for module in reversed(modules) if not module.isdigit()), "")
    if _NORM.search(modules[-1] if modules else ""):
        return Guess("norm")
    is_matrix = sum(size != 1 for size in shape) > 1 or len(shape) == 2
    if not is_matrix:
        return Guess("norm" if _NORM.search(last) else "scale")
    if not _WEIGHT.fullmatch(own):
        return Guess("embedding" if _EMBEDDING.match(own) else "unknown", sure=False)
    if any(_ROUTER.search(module) for module in modules[-2:]):
        return Guess("router")
    for i in range(max(len(modules) - 2, 0), len(modules)):  # a gate, or a layer of one
        if _GATE.search(modules[i]) and ("expert" in modules[i] or ".".join(modules[:i]) in with_experts):
            return Guess("router")
    if is_head(name):
        return Guess("head")
    if len(shape) == 2:
        in_block = any(module.isdigit() for module in modules)  # where sizes may agree by accident
        found = _guess_matrix(shape, last, set() if in_block else vocabularies)
        if found.role == "linear" and any(_EMBEDDING.match(each) for each in modules[-2:-1]):
            return found if _PROJECTION.search(last) or "patch" in last else Guess("embedding", sure=False)
        return found
    is_kernel = len(shape) > 3 or "conv" in name or shape[-1:] < (32,)
    return Guess("convolution" if is_kernel and "expert" not in name else "linear")


def _guess_matrix(shape: tuple[int, ...], last: str, words: set[int]) -> Guess:
    """Of a tensor of two dimensions in a module that is called `last`."""
    if shape[0] in words:
        return Guess("head" if re.search("proj|decoder|out|loss|pred", last) else "embedding")
    if _POSITION.match(last):
        return Guess("position", sure=re.search("bias|relative_pos_", last) is None)
    if _PROJECTION.search(last):
        return Guess("linear")
    if _EMBEDDING.match(last) and "patch" not in last:
        return Guess("embedding")
    if _NEAR_EMBEDDING.search(last):
        return Guess("linear" if "patch" in last else "embedding", sure=False)
    return Guess("linear")
