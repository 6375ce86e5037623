"""Choose the tensors that may be cut, with a reason for each; find and refuse quantised checkpoints."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import translate
from functools import cache
from pathlib import Path
from typing import Any

from lpsparse.checkpoint.dtypes import DTYPES
from lpsparse.checkpoint.layouts.retired import CONFIGS, config_of, folder_of, is_only_sparse
from lpsparse.checkpoint.loader_entry import is_ours
from lpsparse.checkpoint.open import Checkpoint
from lpsparse.checkpoint.safetensors_writer import Named
from lpsparse.errors import InputError, UsageError
from lpsparse.families import RETIRED_LAYOUTS
from lpsparse.parallel.progress import Brief
from lpsparse.parallel.threads import on_rank_0
from lpsparse.pruning.look import look
from lpsparse.pruning.roles import PRUNED, ROLES, bare, guess_roles, is_buffer

_NOT_FLOAT = " is not a float that can be pruned"


_IN_SHORT = {  # reasons, as what such tensors are called, by ones and more
    "bias": ("bias", "biases"),
    "embedding": ("embedding", "embeddings"),
    "head": ("tensor of the output head", "tensors of the output head"),
    "mask": ("mask", "masks"),
    "norm": ("norm", "norms"),
    "position": ("position table", "position tables"),
    "router": ("router", "routers"),
    "scale": ("scale", "scales"),
    "state": ("state", "states"),
    "token": ("token", "tokens"),
    "unknown": ("of unknown role (cut with --include)",) * 2,
    "empty": ("empty tensor", "empty tensors"),
    "--exclude": ("by --exclude", "by --exclude"),
}


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether a tensor may be cut. The reason is its role, or what overrules it."""

    prunable: bool
    reason: str
    role: str = "unknown"
    by: str = "names and shapes"  # what told the role


Chosen = dict[str, Decision]


def recorded(prunable: bool, reason: str) -> Decision:
    """The decision that a manifest records. The reason is the role, unless something overruled it."""
    return Decision(prunable, reason, reason if reason in ROLES else "unknown", "the manifest")


def decide(
    tensors: Iterable[Named],
    include: tuple[str, ...] = (),
    exclude: tuple[str, ...] = (),
    config: Mapping[str, Any] | None = None,
    known: Mapping[str, str] | None = None,
    known_by: str = "",
) -> Chosen:
    """A decision for each tensor. Linear and convolution weights are cut and all else is kept.

    `include` names all that may be cut, whatever its role; `exclude` wins over it. `config` is the model's
    config.json. `known` are roles that `known_by`, the model's own modules, told; they win over those from
    names.
    """
    named = list(tensors)
    guesses = guess_roles(((name, shape) for name, _, shape in named), config)
    methods = quantised(named)
    found: Chosen = {}
    for name, dtype, shape in named:
        role = (known or {}).get(name)
        by = known_by if role else "names and shapes" if guesses[name].sure else "a guess"
        role = role or guesses[name].role
        prunable, reason = _rule(name, dtype, shape, role, methods.get(name), include, exclude)
        by = by if reason == role else "the rule"
        found[name] = Decision(prunable, reason, role, by)
    return found


def _rule(
    name: str,
    dtype: str,
    shape: tuple[int, ...],
    role: str,
    method: str | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
) -> tuple[bool, str]:
    """Whether a tensor is prunable, and why."""
    if method is not None:
        return False, f"quantised ({method})"
    if not DTYPES[dtype].is_float:
        return False, f"{dtype}{_NOT_FLOAT}"
    if 0 in shape:
        return False, "empty"
    if _matches(name, exclude):
        return False, "--exclude"
    if include:
        return (True, "--include") if _matches(name, include) else (False, "not in --include")
    return role in PRUNED, role


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a pattern matches a name, as it is or without what wrappers put into it."""
    if not patterns:
        return False
    found = _any_of(patterns)
    return found.match(name) is not None or found.match(bare(name)) is not None


@cache
def _any_of(patterns: tuple[str, ...]) -> re.Pattern[str]:
    """All patterns as one, for tens of thousands of names."""
    return re.compile("|".join(translate(pattern) for pattern in patterns))


def choose(
    source: Checkpoint,
    include: tuple[str, ...] = (),
    exclude: tuple[str, ...] = (),
    *,
    needed: bool = True,
    strict: bool = True,
    always_look: bool = False,
) -> Chosen:
    """`decide` of a checkpoint, with its config.json. Where names and shapes leave a matrix open, the model's
    own modules are asked; with `always_look` they decide of all.

    Raises UsageError for a pattern that matches nothing, where it is `strict`, and when nothing is left
    although something is `needed`.
    """
    named = [(tensor.name, tensor.dtype, tensor.shape) for tensor in source.tensors]
    config = config_of(folder_of(source))
    table = decide(named, include, exclude, config)
    asked = {name: shape for name, _, shape in named if always_look or table[name].by == "a guess"}
    if asked and (seen := on_rank_0(lambda: look(config, asked))) is not None:  # the same in all processes
        table = decide(named, include, exclude, config, seen[1], seen[0])
    return check_chosen(table, include, exclude, needed=needed, strict=strict)


def check_chosen(
    table: Chosen,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    *,
    needed: bool = True,
    strict: bool = True,
) -> Chosen:
    """`table` itself. Raises as `choose` does."""
    for flag, patterns in (("--include", include), ("--exclude", exclude)):
        for pattern in patterns if strict else ():
            if not any(_matches(name, (pattern,)) for name in table):
                raise no_match(flag, pattern, table)
    if needed and not any(each.prunable for each in table.values()):
        raise UsageError(211, "no prunable tensor is left", hint="choose tensors with --include")
    return table


def no_match(flag: str, pattern: str, names: Iterable[str]) -> UsageError:
    """The error for a pattern that matches nothing, with the nearest name."""
    known = list(names)
    near = get_close_matches(pattern, known, n=1, cutoff=0.5)
    words = [word for word in re.split(r"[*?.\[\]]+", pattern) if word]  # *.mpl.* is near what has an mlp
    parts = dict.fromkeys(part for name in known for part in name.split("."))
    for cutoff in (0.6, 0):
        for part in (part for word in words for part in get_close_matches(word, parts, n=1, cutoff=cutoff)):
            near = near or [name for name in known if part in name.split(".")]
    all_names = "see the names with `lpsparse inspect`"
    hint = f"nearest tensor: {near[0]}; {all_names}" if near else all_names
    return UsageError(210, f"{flag} {pattern}: matches no tensor", hint=hint)


def kept_in_words(table: Chosen) -> Brief:
    """One line that says how much is kept and why, for the person at the terminal; in full with the names."""
    names: dict[str, list[str]] = {}
    for name, decision in table.items():
        if not decision.prunable:
            names.setdefault(decision.reason, []).append(name)
    count = sum(decision.prunable for decision in table.values())
    head = f"{count} tensor{'' if count == 1 else 's'} can be pruned"
    short = ", ".join(f"{len(some)} {in_short(why, len(some))}" for why, some in sorted(names.items()))
    full = "; ".join(f"{why}: {', '.join(some)}" for why, some in sorted(names.items()))
    told = _told(table)
    return Brief(
        f"{head}. Kept dense: {short or 'none'}.{told}", f"{head}. Kept dense: {full or 'none'}.{told}"
    )


def _told(table: Chosen) -> str:
    """The source of the roles, if it was more than names and shapes."""
    counts = Counter(decision.by for decision in table.values())
    guessed = counts.pop("a guess", 0)
    others = [by for by in counts if by not in ("names and shapes", "the rule", "the manifest")]
    text = f" {others[0]} says what names leave open." if others else ""
    if guessed:
        text += f" The roles of {guessed} are guessed from their names; see `lpsparse inspect`."
    return text


def in_short(why: str, count: int = 1) -> str:
    """A name for tensors that are kept for this reason."""
    if why.endswith(_NOT_FLOAT):
        one = "integer buffer" if re.match("[IU][0-9]", why) else "buffer without floats"
        return one if count == 1 else one.replace("buffer", "buffers")
    one, more = _IN_SHORT.get(why, (why, why))
    return one if count == 1 else more


_UNSCALED = ("F64", "F32", "F16", "BF16")  # values that stand for themselves, whatever lies beside them


_METHODS = (  # ends of the names of stored values and of their scales, and what writes such a pair
    (".qweight", ".wscales", "Nunchaku"),
    (".qweight", ".scales", "GPTQ or AWQ"),
    (".weight_packed", ".weight_scale", "compressed-tensors"),
    (".weight", ".weight_scale", "compressed-tensors"),
    (".weight", ".weight_scale_inv", "fp8 in scaled blocks"),
    (".weight", ".scale_weight", "scaled fp8"),
    (".weight", ".weight.absmax", "bitsandbytes"),
    (".weight", ".SCB", "bitsandbytes"),
    (".weight", ".scales", "MLX"),
    ("._data", "._scale", "quanto"),
    (".W_q", ".scale", "HQQ"),
    (".codes", ".codebooks", "AQLM"),
    ("_blocks", "_scales", "MXFP4"),
)


_INTEGERS = ("I8", "U8", "I16", "I32", "U32")  # wider ones are indexes


_ANY = "integers with scales"


def quantised(tensors: Iterable[Named]) -> dict[str, str]:
    """Name -> method of the tensors that hold quantised values, and of all floats beside them.

    An integer (or 8-bit) matrix with a float of the same prefix is quantised, whoever wrote it; a bias alone
    makes no scale. The pairs that are known give the method its name.
    """
    dtypes = {name: (dtype, shape) for name, dtype, shape in tensors}
    beside_integers: dict[str, list[str]] = {_prefix(name): [] for name in dtypes}
    scales: dict[str, list[str]] = {_prefix(name): [] for name in dtypes}
    for name, (dtype, _) in dtypes.items():
        if DTYPES[dtype].is_float and not name.endswith("bias"):
            beside_integers[_prefix(name)].append(name)
            if dtype in _UNSCALED and "scale" in name:
                scales[_prefix(name)].append(name)
    found: dict[str, str] = {}
    for name, (dtype, shape) in dtypes.items():
        if dtype in _UNSCALED:
            continue
        for values, ends, method in _METHODS:
            beside = name.removesuffix(values) + ends
            if name.endswith(values) and beside in dtypes:
                found |= {each: found.get(each, method) for each in (name, beside)}
        small = DTYPES[dtype].bits <= 8 if DTYPES[dtype].is_float else dtype in _INTEGERS
        prefix = _prefix(name)
        if small and prefix and sum(size > 1 for size in shape) > 1 and not is_buffer(name):
            floats = scales[prefix] if DTYPES[dtype].is_float else beside_integers[prefix]
            if floats:
                method = found.get(name, _ANY)
                found |= {each: method for each in (name, *floats)}
    return found


def _prefix(name: str) -> str:
    return name.rpartition(".")[0]


def refuse_quantised(source: Checkpoint) -> None:
    """Raises InputError for a quantised checkpoint, by its tensors or its config.json. Float8 values without
    scales stand for themselves, and so do values that are only sparse."""
    found = quantised((tensor.name, tensor.dtype, tensor.shape) for tensor in source.tensors)
    method = next(iter(found.values()), None)
    rescued = source.layout in RETIRED_LAYOUTS
    if rescued or any(tensor.dtype not in (*_UNSCALED, "I64", "BOOL") for tensor in source.tensors):
        method = (
            _configured(folder_of(source) if rescued else source.root) or method
        )  # of values that stand for themselves it says nothing
    if method is not None:
        names = [tensor.name for tensor in source.tensors if tensor.name in found]
        shown = f": {', '.join(names[:3])}" if names else ""
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        what = f"{source.name}: is quantised ({method}), which cannot be pruned or trained{shown}{more}"
        if rescued:
            what = f"{source.name}: is sparse and quantised ({method}), which cannot be unpacked{shown}{more}"
        raise InputError(337, what, hint="use the model before quantisation, or dequantise it")


def _configured(folder: Path | None) -> str | None:
    """The quantisation that config.json names, at its top or in a part such as text_config."""
    config = config_of(folder)
    parts: list[Any] = [config, *config.values()]
    for settings in (part.get(key) for part in parts if isinstance(part, dict) for key in CONFIGS):
        if settings and not is_only_sparse(settings) and not is_ours(settings):
            method: Any = settings.get("quant_method") if isinstance(settings, dict) else None
            return method if isinstance(method, str) and method else "by its config.json"
    return None
