"""Which tensors may lose weights, and why: the one rule of every command."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import translate
from functools import cache
from typing import Any

from lpsparse.checkpoint.dtypes import DTYPES
from lpsparse.checkpoint.opening import Checkpoint
from lpsparse.checkpoint.rescue import config_of, folder_of
from lpsparse.checkpoint.weights import Named
from lpsparse.errors import UsageError
from lpsparse.parallel.progress import Brief
from lpsparse.parallel.threads import on_rank_0
from lpsparse.pruning.look import look
from lpsparse.pruning.quantised import quantised
from lpsparse.pruning.roles import PRUNED, ROLES, bare, guess_roles

_NOT_FLOAT = " is not a float that can be pruned"
_IN_SHORT = {  # reasons, as what such tensors are called, by ones and more
    "bias": ("bias", "biases"), "embedding": ("embedding", "embeddings"),
    "head": ("tensor of the output head", "tensors of the output head"), "mask": ("mask", "masks"),
    "norm": ("norm", "norms"), "position": ("position table", "position tables"),
    "router": ("router", "routers"), "scale": ("scale", "scales"), "state": ("state", "states"),
    "token": ("token", "tokens"), "unknown": ("of unknown role (cut with --include)",) * 2,
    "empty": ("empty tensor", "empty tensors"), "--exclude": ("by --exclude", "by --exclude"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Decision:
    """What is done with one tensor. The reason is its role, or what overrules that."""

    prunable: bool
    reason: str
    role: str = "unknown"
    by: str = "names and shapes"  # what told the role


Chosen = dict[str, Decision]


def recorded(prunable: bool, reason: str) -> Decision:
    """What a manifest says of a tensor. The reason is the role, where nothing overruled that."""
    return Decision(prunable, reason, reason if reason in ROLES else "unknown", "the manifest")


def decide(
    tensors: Iterable[Named], include: tuple[str, ...] = (), exclude: tuple[str, ...] = (),
    config: Mapping[str, Any] | None = None, known: Mapping[str, str] | None = None, known_by: str = "",
) -> Chosen:  # fmt: skip
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
    name: str, dtype: str, shape: tuple[int, ...], role: str, method: str | None, include: tuple[str, ...],
    exclude: tuple[str, ...],
) -> tuple[bool, str]:  # fmt: skip
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
    """All patterns as one: of tens of thousands of names."""
    return re.compile("|".join(translate(pattern) for pattern in patterns))


def choose(
    source: Checkpoint, include: tuple[str, ...] = (), exclude: tuple[str, ...] = (), *, needed: bool = True,
    strict: bool = True, always_look: bool = False,
) -> Chosen:  # fmt: skip
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
    table: Chosen, include: tuple[str, ...], exclude: tuple[str, ...], *, needed: bool = True,
    strict: bool = True,
) -> Chosen:  # fmt: skip
    """`table` itself. Raises as `choose` does."""
    for flag, patterns in (("--include", include), ("--exclude", exclude)):
        for pattern in patterns if strict else ():
            if not any(_matches(name, (pattern,)) for name in table):
                raise no_match(flag, pattern, table)
    if needed and not any(each.prunable for each in table.values()):
        raise UsageError(211, "no prunable tensor is left", hint="choose tensors with --include")
    return table


def no_match(flag: str, pattern: str, names: Iterable[str]) -> UsageError:
    """For a pattern that matches nothing."""
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
    )  # fmt: skip


def _told(table: Chosen) -> str:
    """What told the roles, where it was more than names and shapes."""
    counts = Counter(decision.by for decision in table.values())
    guessed = counts.pop("a guess", 0)
    others = [by for by in counts if by not in ("names and shapes", "the rule", "the manifest")]
    text = f" {others[0]} says what names leave open." if others else ""
    if guessed:
        text += f" The roles of {guessed} are guessed from their names; see `lpsparse inspect`."
    return text


def in_short(why: str, count: int = 1) -> str:
    """What tensors that are kept for this reason are called."""
    if why.endswith(_NOT_FLOAT):
        one = "integer buffer" if re.match("[IU][0-9]", why) else "buffer without floats"
        return one if count == 1 else one.replace("buffer", "buffers")
    one, more = _IN_SHORT.get(why, (why, why))
    return one if count == 1 else more
