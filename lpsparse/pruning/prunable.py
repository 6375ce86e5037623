"""Which tensors may lose weights, and why: by name, dtype and shape alone, the same rule in every command."""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from fnmatch import translate
from functools import cache

from lpsparse.checkpoint.dtypes import DTYPES
from lpsparse.checkpoint.progress import Brief
from lpsparse.checkpoint.weights import Named
from lpsparse.errors import UsageError
from lpsparse.pruning.quantised import quantised

# Kept by default: they are small or every output depends on them, and pruning them costs the most quality.
_EMBEDDINGS = (
    "*embed*", "*wte.*", "*wpe.*", "*position_ids*", "shared.weight", "*.shared.weight",
    "*relative_attention_bias.*",
)  # fmt: skip
_NORMS = ("*norm*", "*.ln_*", "ln_*", "*.bn?.*", "bn?.*")
_HEADS = (
    "lm_head.*", "*.lm_head.*", "classifier.*", "*.classifier.*", "score.*", "head.*", "heads.head.*", "fc.*",
    "model.fc.*", "linear.weight", "cls.*", "qa_outputs.*", "embed_out.*", "output.weight", "proj_out.weight",
    "output_layer.weight", "*.output_layer.weight", "*vocab_projector.*", "*.cls.predictions.*",
    "*.qa_outputs.*", "*.embed_out.*",
)  # fmt: skip
_NOT_FLOAT = " is not a float that can be pruned"
_IN_SHORT = {  # reasons, as what such tensors are called, by ones and more
    "embedding": ("embedding", "embeddings"), "normalisation": ("norm", "norms"),
    "output head": ("tensor of the output head", "tensors of the output head"),
    "fewer than 2 dimensions": ("bias/norm", "biases/norms"), "empty": ("empty tensor", "empty tensors"),
    "--exclude": ("by --exclude", "by --exclude"), "not in --include": ("not in --include",) * 2,
}  # fmt: skip
# Parts of a name that wrappers put there: DataParallel, torch.compile, FSDP, checkpointing, Lightning.
_INSIDE = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_AROUND = re.compile(r"(?:(?:module|model|net|student)\.)+")
KEPT = {"embedding": _EMBEDDINGS, "normalisation": _NORMS, "output head": _HEADS}


def prunable(
    name: str,
    dtype: str,
    shape: tuple[int, ...],
    include: tuple[str, ...] = (),
    exclude: tuple[str, ...] = (),
) -> tuple[bool, str]:
    """Whether a tensor is cut, and the reason in words.

    `include` names all that may be cut, kept kinds too; `exclude` wins over it. What wrappers put into a name
    is looked through.
    """
    bare = without_wrappers(name)
    if not DTYPES[dtype].is_float:
        return False, f"{dtype}{_NOT_FLOAT}"
    if 0 in shape:
        return False, "empty"
    if _matches(name, bare, exclude):
        return False, "--exclude"
    if include:
        return (True, "--include") if _matches(name, bare, include) else (False, "not in --include")
    if len(shape) < 2:
        return False, "fewer than 2 dimensions"
    for kind, patterns in KEPT.items():
        if _matches(name, bare, patterns):
            return False, kind
    return True, "matrix"


def without_wrappers(name: str) -> str:
    """`name` as the innermost model knows it."""
    inside = _INSIDE.sub("", name)
    around = _AROUND.match(inside)
    return inside if around is None else inside[around.end() :]


def _matches(name: str, bare: str, patterns: tuple[str, ...]) -> bool:
    if not patterns:
        return False
    found = _any_of(patterns)
    return found.match(name) is not None or (bare != name and found.match(bare) is not None)


@cache
def _any_of(patterns: tuple[str, ...]) -> re.Pattern[str]:
    """All patterns as one: of tens of thousands of names."""
    return re.compile("|".join(translate(pattern) for pattern in patterns))


def choose(
    tensors: Iterable[Named], include: tuple[str, ...], exclude: tuple[str, ...], *, needed: bool = True,
    strict: bool = True,
) -> dict[str, tuple[bool, str]]:  # fmt: skip
    """`prunable` of every tensor that is not part of a quantised one. Raises UsageError for a pattern that
    matches nothing, where it is `strict`, and when nothing is left although something is `needed`."""
    named = list(tensors)
    table = {name: prunable(name, dtype, shape, include, exclude) for name, dtype, shape in named}
    table |= {name: (False, f"quantised ({method})") for name, method in quantised(named).items()}
    for flag, patterns in (("--include", include), ("--exclude", exclude)):
        for pattern in patterns if strict else ():
            if not any(_matches(name, without_wrappers(name), (pattern,)) for name in table):
                raise no_match(flag, pattern, table)
    if needed and not any(yes for yes, _ in table.values()):
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


def kept_in_words(table: dict[str, tuple[bool, str]]) -> Brief:
    """One line that says how much is kept and why, for the person at the terminal; in full with the names."""
    names: dict[str, list[str]] = {}
    for name, (yes, why) in table.items():
        if not yes:
            names.setdefault(why, []).append(name)
    count = sum(yes for yes, _ in table.values())
    head = f"{count} tensor{'' if count == 1 else 's'} can be pruned"
    short = ", ".join(f"{len(some)} {in_short(why, len(some))}" for why, some in sorted(names.items()))
    full = "; ".join(f"{why}: {', '.join(some)}" for why, some in sorted(names.items()))
    return Brief(f"{head}. Kept dense: {short or 'none'}.", f"{head}. Kept dense: {full or 'none'}.")


def in_short(why: str, count: int = 1) -> str:
    """What tensors that are kept for this reason are called."""
    one, more = _IN_SHORT.get(why, (why, why))
    if why.endswith(_NOT_FLOAT):
        one, more = "buffer without floats", "buffers without floats"
        if re.match("[IU][0-9]", why):
            one, more = "integer buffer", "integer buffers"
    return one if count == 1 else more
