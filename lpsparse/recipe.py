"""The steps and their defaults, written here and nowhere else: flags, LPSPARSE_* and YAML only override them.

Light on purpose: this module is imported by `--help`.
"""

import re
from collections.abc import Collection
from decimal import Decimal
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from lpsparse.limits import BUDGETS, limit_of

Task = Literal["causal-lm", "masked-lm", "text-classification", "image-classification"]
Method = Literal["lp", "gradual", "one-shot", "l1", "dwf", "rigl", "dense"]


def _listed(value: Any) -> Any:
    """A single value, or text with commas, where several may stand."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return [value] if isinstance(value, (int, float)) else value


def fraction(value: Any) -> Any:
    """80% is 0.8, where a fraction is wanted."""
    text = str(value).strip()
    if not text.endswith("%"):
        return value
    try:
        found = Decimal(text[:-1].strip()) / 100
    except ArithmeticError:  # no number, or one of a million digits
        return value
    return found if found.is_finite() else value


def _optimizer(value: str) -> str:
    if value not in OPTIMIZERS and ":" not in value:
        near = [f"; did you mean {name}?" for name in get_close_matches(value, OPTIMIZERS, n=1)]
        raise ValueError(f"--optimizer {value}: not {', '.join(OPTIMIZERS)} or MODULE:CLASS{''.join(near)}")
    return value


def _n_m(value: Any) -> Any:
    if isinstance(value, int):
        raise ValueError('--n-m: write it in quotes in YAML, such as "2:4"')  # 2:4 is a time of day there
    n, _, m = str(value).partition(":")
    if not (n.isdecimal() and m.isdecimal() and 0 < int(n) < int(m) <= 1024):
        raise ValueError(f"--n-m {value}: N:M with 0 < N < M <= 1024, such as 2:4")
    return f"{int(n)}:{int(m)}"


def _block(value: Any) -> Any:
    rows, _, columns = str(value).partition("x")
    if not (rows.isdecimal() and columns.isdecimal() and int(rows) > 0 and int(columns) > 0):
        raise ValueError(f"--block {value}: ROWSxCOLUMNS, such as 4x1 or 16x16")
    return f"{int(rows)}x{int(columns)}"


def pair(text: str | None) -> tuple[int, int] | None:
    """The two numbers of --n-m or --block."""
    if text is None:
        return None
    first, second = text.replace("x", ":").split(":")
    return int(first), int(second)


def _repo(value: str) -> str:
    if not _REPO.fullmatch(value) or "--" in value or ".." in value or value.endswith(".git"):
        at = " (a branch goes into --revision)" if "@" in value else ""
        at = at or (" (your user name goes before it)" if "/" not in value else "")
        raise ValueError(f"REPO {value!r}: not org/name, of letters, digits and -_.{at}")
    return value


def _branch(value: str) -> str:
    if not value or not value[0].isalnum() or any(c.isspace() or c in "~^:?*[\\" for c in value):
        raise ValueError(f"--revision {value!r}: not the name of a branch")
    if re.fullmatch("[0-9a-f]{40}", value):
        raise ValueError(f"--revision {value}: a commit; a branch is needed to add one to")
    return value


def _texts(value: Any) -> Any:
    return [str(each) for each in value] if isinstance(value, (list, tuple)) else [str(value)]


def _levels(value: tuple[str, ...]) -> tuple[str, ...]:
    for each in value:
        if each not in (*BUDGETS, "baseline", "finite"):
            near = [f"; did you mean {name}?" for name in get_close_matches(each, BUDGETS, n=1)]
            raise ValueError(f"--warn {each}: not {', '.join(BUDGETS)}, finite or baseline{''.join(near)}")
    return value


_REPO = re.compile(r"\w(?:[\w.-]{0,94}\w)?/\w(?:[\w.-]{0,94}\w)?", re.ASCII)
OPTIMIZERS = ("adamw", "sgd", "adafactor", "muon")
Patterns = Annotated[tuple[str, ...], BeforeValidator(_listed)]
Limits = Annotated[
    tuple[str, ...], BeforeValidator(_texts),
    WithJsonSchema({"type": "array", "items": {"type": ["number", "string"]}}),
]  # fmt: skip
Fraction = Annotated[
    Decimal, BeforeValidator(fraction),
    WithJsonSchema({"anyOf": [
        {"type": "number", "minimum": 0, "maximum": 1},
        {"type": "string", "pattern": r"^\s*(0*(\.\d*)?|0*1(\.0*)?|\d+(\.\d*)? *%)\s*$"},
    ]}),
]  # fmt: skip
Floats = Annotated[tuple[float, ...], BeforeValidator(_listed)]
_INCLUDE = Field(
    (),
    description="Glob over tensor names that may be cut; repeatable. Default: linear and convolution "
    "weights, except output heads and routers.",
)
_EXCLUDE = Field((), description="Glob over tensor names that are kept; repeatable, wins over --include.")
MODEL = Field(min_length=1, description="Folder, weight file, *.index.json, or hub id org/name[@revision].")
_WEIGHTS = Field(
    None,
    description="Weight file or index in MODEL that is meant, a name alone. Default: the one that is there.",
)
_KEY = Field(
    None,
    description="Table of tensors to read from a torch file, such as params_ema or ema.model. Default: the "
    "only one.",
)
_COMPONENT = Field(
    (),
    description="Glob over the components of MODEL, a diffusers pipeline's folder, that are pruned, each by "
    "itself; repeatable. All else is copied.",
)
_OUT = Field(description="Folder to write; must not exist yet.")
_OVERWRITE = Field(False, description="Replace an OUT that lpsparse wrote.")
_THREADS = Field(None, ge=1, description="Threads; the result is the same. Default: one a core.")
_LOOK = Field(
    False,
    description="Ask transformers what each tensor is: it builds the model without values. Default: only of "
    "what names and shapes leave open.",
)
_ALLOW_EMPTY = Field(
    False, description="Exit 0 also where a tensor or a layer type is left without weights. Default: exit 1."
)
_DRY_RUN = Field(False, description="Say what would be done and write nothing.")
_DRY_PRUNE = Field(
    False,
    description="Say what would be zero, with disk, memory and time, and write nothing; of a hub id that is "
    "not in the cache from its headers alone.",
)

POSITIONAL = ("model", "out", "base", "source", "folder", "repo")
REPEATED = (  # flags that may be given more than once
    "component", "include", "exclude", "freeze", "min_sparsity", "max_bytes", "max_quality_drop",
    "max_layer_sparsity", "min_nm", "warn",
)  # fmt: skip
_UNRECORDED = {
    "model", "weights", "out", "overwrite", "dry_run", "threads", "source", "base", "data", "eval_data",
    "model_fn", "processes", "shard", "workers", "resume", "save_every", "keep_last", "max_time", "track",
    "rank_timeout", "look", "allow_empty", "component",
}  # fmt: skip


OTHER_NAMES = {  # what people call a setting -> the field, where a step has no such field of its own
    "learning_rate": "lr", "sparsity": "target_sparsity",
}  # fmt: skip


def other_names(fields: Collection[str]) -> dict[str, str]:
    """Of OTHER_NAMES those that a step with these fields takes."""
    return {name: of for name, of in OTHER_NAMES.items() if of in fields and name not in fields}


def flag(field: str) -> str:
    """The command line's name of a field."""
    return "--lambda" if field == "lambda_p" else "--" + field.replace("_", "-")


class Step(BaseModel):
    """One command's settings."""

    # Validators are built when they are first needed, which --help does not.
    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=(), defer_build=True
    )
    decides: ClassVar[frozenset[str]] = frozenset()  # what is recorded here, other than elsewhere

    def recorded(self) -> dict[str, Any]:
        """The settings that decide the bytes of the result: no paths of this machine."""
        return self.model_dump(mode="json", exclude=_UNRECORDED - type(self).decides)

    def at_default(self, name: str) -> bool:
        return getattr(self, name) == type(self).model_fields[name].default

    def options(self, among: Collection[str] | None = None) -> list[str]:
        """The options (`among` these fields) that are not at their defaults, as a person would type them."""
        words: list[str] = []
        for name in type(self).model_fields:
            if name in POSITIONAL or self.at_default(name) or (among is not None and name not in among):
                continue
            value = getattr(self, name)
            if isinstance(value, bool):
                words.append(flag(name) if value else f"--no-{flag(name)[2:]}")
            elif name in REPEATED:
                for pattern in value:
                    words += [flag(name), pattern]
            else:
                text = ",".join(f"{part:g}" for part in value) if isinstance(value, tuple) else str(value)
                words += [flag(name), text]
        return words


class PruneStep(Step):
    """Cut the smallest weights to exact zeros."""

    rivals: ClassVar[tuple[str, ...]] = ("sparsity", "below", "gap", "n_m")  # one of them says how much

    model: str = MODEL
    weights: str | None = _WEIGHTS
    key: str | None = _KEY
    component: Patterns = _COMPONENT
    out: Path = _OUT
    sparsity: Fraction | None = Field(
        None, ge=0, le=1,
        description="Fraction of the prunable weights that is zero afterwards, 0..1, met exactly within "
        "each scope.",
    )  # fmt: skip
    below: float | None = Field(None, ge=0, description="Cut every |w| below this.")
    gap: bool = Field(
        False,
        description="Cut inside the empty band that decay with p < 1 leaves; exit 1 if none.",
    )
    n_m: Annotated[str, BeforeValidator(_n_m)] | None = Field(
        None,
        description="Leave at most N non-zeros, the largest, in each M neighbours of a row, as 2:4.",
    )
    scope: Literal["global", "tensor", "row"] = Field("global", description="Where --sparsity holds.")
    block: Annotated[str, BeforeValidator(_block)] | None = Field(
        None,
        description="Cut whole blocks of ROWSxCOLUMNS, those with the smallest sum of magnitudes; "
        "--sparsity is then met in blocks.",
    )
    include: Patterns = _INCLUDE
    exclude: Patterns = _EXCLUDE
    look: bool = _LOOK
    allow_empty: bool = _ALLOW_EMPTY
    layout: Literal["dense", "bitmask", "packed"] = Field("dense", description="How the result is stored.")
    threads: int | None = _THREADS
    overwrite: bool = _OVERWRITE
    dry_run: bool = _DRY_PRUNE

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        given = [n for n, v in (("--sparsity", self.sparsity), ("--below", self.below)) if v is not None]
        given += ["--gap"] * self.gap + ["--n-m"] * (self.n_m is not None)
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of --sparsity, --below, --gap, --n-m (got {', '.join(given) or 'none'})"
            )
        if self.block is not None and (self.sparsity is None or self.scope == "row"):
            raise ValueError("--block goes with --sparsity, of --scope global or tensor")
        if self.scope != "global" and self.sparsity is None:
            raise ValueError(f"--scope {self.scope} goes with --sparsity only")
        if self.component and (self.overwrite or self.weights or self.key):
            raise ValueError("--component goes without --overwrite, --weights and --key")
        return self


class PackStep(Step):
    """Store zeros as no bytes, losslessly."""

    model: str = MODEL
    weights: str | None = _WEIGHTS
    key: str | None = _KEY
    out: Path = _OUT
    layout: Literal["packed", "bitmask"] = Field(
        "packed",
        description="packed is near the entropy bound; bitmask is the retired layout of compressed-tensors.",
    )
    level: Literal["fast", "default", "max"] = Field(
        "default", description="How much is tried to save more bytes, of packed."
    )
    threads: int | None = _THREADS
    overwrite: bool = _OVERWRITE
    dry_run: bool = _DRY_RUN

    @model_validator(mode="after")
    def _level_of_packed(self) -> Self:
        if self.level != "default" and self.layout != "packed":
            raise ValueError(f"--level {self.level} goes with --layout packed")
        return self


class UnpackStep(Step):
    """Turn a packed model back into an ordinary dense one, bit for bit."""

    model: str = MODEL
    weights: str | None = _WEIGHTS
    key: str | None = _KEY
    out: Path = _OUT
    threads: int | None = _THREADS
    overwrite: bool = _OVERWRITE
    dry_run: bool = _DRY_RUN


class VerifyStep(Step):
    """Check that a folder is what its manifest says: files, hashes, zeros, finiteness."""

    model: str = Field(min_length=1, description="Folder that lpsparse wrote, with its lpsparse.json.")
    source: str | None = Field(
        None,
        description="What it was cut from: names (but for one prefix), shapes and dtypes must be its, every "
        "value its bits or 0.",
    )
    key: str | None = Field(None, description="Table of tensors that is meant in SOURCE, a torch file.")
    threads: int | None = _THREADS

    @model_validator(mode="after")
    def _key_of_source(self) -> Self:
        if self.key is not None and self.source is None:
            raise ValueError(f"--key {self.key} goes with SOURCE: MODEL is not a torch file")
        return self


class InspectStep(Step):
    """Say what a checkpoint holds, from its headers alone."""

    model: str = MODEL
    weights: str | None = _WEIGHTS
    key: str | None = _KEY
    look: bool = _LOOK


class PushStep(Step):
    """Upload a folder that lpsparse wrote to the Hugging Face hub: checked, in one commit, compared there."""

    folder: Path = Field(description="Folder that lpsparse wrote.")
    repo: Annotated[str, AfterValidator(_repo)] = Field(
        description="Model repository org/name; it is made if it is not there."
    )
    private: bool = Field(False, description="Make it private; one that is public already is refused.")
    revision: Annotated[str, AfterValidator(_branch)] | None = Field(
        None, description="Branch, made from main if it is not there. Default: main."
    )
    message: str = Field("Upload with lpsparse", min_length=1, description="What the commit says.")
    create_pr: bool = Field(False, description="Open a pull request in place of a commit to main.")
    delete_others: bool = Field(
        False,
        description="Delete in the same commit what is in REPO and not in FOLDER (hidden files stay, and all "
        "stays in the history). Without it, weights there that FOLDER has not are refused.",
    )
    threads: int | None = _THREADS
    dry_run: bool = Field(False, description="Check FOLDER and list what would be sent; ask nobody.")

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if self.create_pr and self.revision not in (None, "main"):
            raise ValueError("--create-pr asks for a merge into main: leave --revision out")
        return self


class ReportStep(Step):
    """Measure sparsity and bytes from the files, and check budgets."""

    model: str = MODEL
    weights: str | None = _WEIGHTS
    key: str | None = _KEY
    base: str | None = Field(None, description="The checkpoint it came from, to compare with.")
    threads: int | None = _THREADS
    include: Patterns = _INCLUDE
    exclude: Patterns = _EXCLUDE
    min_sparsity: Limits = Field(
        (),
        description="Budget [GLOB=]FRACTION: least sparsity of the prunable weights, or of all that match.",
    )
    max_bytes: Limits = Field(
        (), description="Budget [GLOB=]BYTES: most bytes of the weight files, or of tensors; 20MB, 1.5GiB."
    )
    max_quality_drop: Limits = Field(
        (),
        description="Budget: most that the quality recorded by finetune or `eval --save` may fall, in the "
        "metric's own unit, or in % of what it was.",
    )
    max_layer_sparsity: Limits = Field(
        (), description="Budget [GLOB=]FRACTION: most sparsity of any one prunable (or matching) tensor."
    )
    min_nm: Limits = Field(
        (),
        description="Budget [GLOB=]N:M=FRACTION: least share of groups of M that hold at most N non-zeros.",
    )
    warn: Annotated[Patterns, AfterValidator(_levels)] = Field(
        (),
        description="A budget, by its name, that only warns; repeatable. baseline: those of "
        "--baseline; finite: NaN or Inf, which fails where there is a budget.",
    )
    baseline: Path | None = Field(
        None,
        description="Earlier report.json, or a folder with one: sparsity, bytes and quality may be no "
        "worse than there.",
    )
    max_regression: Fraction = Field(
        Decimal(0), ge=0, le=1, description="Share by which they may be worse than --baseline."
    )
    spectra: bool = Field(
        False, description="Largest and smallest singular value of each prunable matrix (slow)."
    )

    @field_validator(*(name.replace("-", "_") for name in BUDGETS))
    @classmethod
    def _understood(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        for each in value:
            limit_of(str(info.field_name).replace("_", "-"), each)
        return value

    @model_validator(mode="after")
    def _of_something(self) -> Self:
        """A gate that lost what it is about would pass for ever."""
        given = {name for name in (*BUDGETS, "baseline") if getattr(self, name.replace("-", "_"))}
        given |= {"finite"} if given else set()
        for name in self.warn:
            if name not in given:
                missing = f"--{name}" if name != "finite" else "a budget"
                raise ValueError(f"--warn {name}: {missing} is not given")
        if self.max_regression and self.baseline is None:
            raise ValueError(f"--max-regression {self.max_regression}: --baseline is not given")
        return self


class _DataStep(Step):
    """What finetune and eval share: the task and its data."""

    model: str = MODEL
    weights: str | None = _WEIGHTS
    key: str | None = _KEY
    task: Task = Field(description="What the model does.")
    split: str = Field(
        "train",
        description="Part of DATA to use: file stem or name, with an optional [from:to].",
    )
    text_field: str | None = Field(
        None,
        description="Column of the text. Default: text or sentence; in a table of two columns without a "
        "heading, the first.",
    )
    label_field: str | None = Field(None, description="Column of the label. Default: label.")
    max_length: int = Field(
        128, ge=2,
        description="Tokens a text is cut at (classification) or a block has (causal-lm). Default: 128, or "
        "the positions that MODEL has.",
    )  # fmt: skip
    model_fn: str | None = Field(
        None,
        description="MODULE:CALLABLE or FILE.py:CALLABLE that builds the torch module of a bare state dict.",
    )
    mean: Floats | None = Field(
        None,
        description="Mean of each image channel, on 0..1, comma separated. Default: as MODEL's "
        "preprocessor_config.json says, else 0.5.",
    )
    std: Floats | None = Field(None, description="Standard deviation of each image channel, likewise.")
    batch_size: int = Field(32, ge=1, description="Rows, images or blocks a step (all processes together).")
    seed: int = Field(0, ge=0, description="Seed of data order, new heads and dropout.")

    @model_validator(mode="after")
    def _channels(self) -> Self:
        mean, std = self.mean or (0.5,), self.std or (0.5,)
        if len(mean) != len(std) or min(std) <= 0:
            raise ValueError("--mean and --std need as many values, --std above 0")
        return self


def _without_default(schema: dict[str, Any]) -> None:
    del schema["default"]


class EvalStep(_DataStep):
    """Measure a model's quality on data."""

    # What a fine-tune of MODEL was told, and need not be said again.
    inherited: ClassVar[tuple[str, ...]] = (
        "task", "text_field", "label_field", "max_length", "model_fn", "mean", "std"
    )  # fmt: skip

    # `settings.as_trained` fills it in, or refuses.
    task: Task = Field(
        cast("Any", None),
        json_schema_extra=_without_default,
        description="What the model does. Default: what `finetune` trained MODEL for.",
    )
    data: str = Field(description="File or folder of data, or hub data set id.")
    split: str = Field(
        "validation",
        description="Part of DATA to use: file stem or name, with an optional [from:to]; validation also "
        "finds dev.",
    )
    against: str | None = Field(
        None, description="Dense model to measure on the same rows: the quality before."
    )
    save: bool = Field(
        False,
        description="Record the result in MODEL, a folder that lpsparse wrote, for `report "
        "--max-quality-drop`. One of the same data is replaced.",
    )
    dry_run: bool = Field(False, description="With --save: measure, and write nothing.")

    @model_validator(mode="after")
    def _saves(self) -> Self:
        if self.dry_run and not self.save:
            raise ValueError("--dry-run goes with --save: nothing else is written")
        return self


class FinetuneStep(_DataStep):
    """Train so that most weights go to zero by themselves, then cut them and recover."""

    decides: ClassVar[frozenset[str]] = frozenset({"threads"})  # sums in floating point

    out: Path = _OUT
    data: str = Field(description="File or folder of data, or hub data set id.")
    eval_data: str | None = Field(None, description="Held-out data. Default: DATA.")
    eval_split: str | None = Field(
        None,
        description="Held-out part. Default: validation (or dev) if DATA has it, else a share of --split.",
    )
    eval_fraction: float = Field(
        0.1, gt=0, lt=1,
        description="Share of --split set aside when no --eval-split.",
    )  # fmt: skip
    method: Method = Field(
        "lp",
        description="How weights get to zero: L_p decay; the rivals gradual magnitude pruning, one-shot with "
        "masked training, L1 prox, deep weight factorisation, RigL's regrowth; or not at all.",
    )
    target_sparsity: Fraction | None = Field(
        None, ge=0, lt=1,
        description="Fraction of the prunable weights that is zero in OUT, exactly. Default: no cut.",
    )  # fmt: skip
    p: float = Field(0.5, gt=0, description="Exponent of the norm; below 1 weights reach exact zero.")
    lambda_p: Annotated[float, Field(ge=0)] | Literal["auto"] = Field(
        "auto", alias="lambda",
        description="Strength of the decay (ours: the authors' lambda times p); auto takes it from the sum "
        "of learning rates.",
    )  # fmt: skip
    lambda_convention: Literal["ours", "authors"] = Field(
        "ours",
        description="How a number in --lambda is meant.",
    )
    p_start: float | None = Field(
        None, gt=0,
        description="Exponent at the start of the decay phase, from where it goes linearly to --p. Default: "
        "--p throughout.",
    )  # fmt: skip
    lambda_2: float = Field(0.0, ge=0, description="Ridge beside the L_p decay (elastic net); 0 is none.")
    selective: bool = Field(
        True,
        description="With a target, decay only the weights that the current target would cut.",
    )
    cautious: bool = Field(False, description="Decay only where the step itself moves a weight towards zero.")
    prox: Literal["pwd", "irl1"] = Field(
        "pwd",
        description="The decay's step: the paper's division, or the reweighted L1 threshold.",
    )
    score: Literal["auto", "magnitude", "fisher"] = Field(
        "auto",
        description="What says which weights go: |w|, or |w| times the root of AdamW's average squared "
        "gradient (the rise of the loss without it). auto: fisher for --method lp with adamw, unless the "
        "model has batch normalisation or the cut comes within 20 steps.",
    )
    masked_forward: bool = Field(
        True,
        description="In the decay phase, leave what --selective chooses out of the forward pass already; it "
        "still learns and decays, and may come back.",
    )
    condition: Literal["auto", "none", "rows", "weight-norm", "l1-rows", "spectral", "modular", "denoise"] = (
        Field(
            "auto",
            description="Weight conditioning. rows: each keeps the norm that it has in the checkpoint; "
            "weight-norm: norms are learnt; the others: docs/method.md. auto: rows with --method lp where "
            "all weights decay (no target), unless the model has batch normalisation; else none.",
        )
    )
    gain_lr_ratio: float = Field(
        1.0, ge=0,
        description="Learning rate of the norms in --condition weight-norm, as a multiple of --lr.",
    )  # fmt: skip
    path_penalty: float = Field(
        0.0, ge=0,
        description="Weight of the 1-path-norm in --condition l1-rows.",
    )  # fmt: skip
    factors: int = Field(2, ge=2, le=4, description="Factors of each weight in --method dwf.")
    distill: float = Field(
        0.0, ge=0, le=1,
        description="Share of the loss that is the divergence from MODEL's own outputs; needs a MODEL with "
        "its head.",
    )  # fmt: skip
    temperature: float = Field(2.0, gt=0, description="Softening of both outputs in --distill.")
    distill_blocks: float = Field(
        0.0, ge=0,
        description="Weight of keeping every block's output near MODEL's own, as a relative squared error.",
    )  # fmt: skip
    r_drop: float = Field(
        0.0, ge=0,
        description="Weight of the divergence between two passes with dropout (R-Drop's alpha): helps where "
        "labelled data is short, at twice the time.",
    )  # fmt: skip
    keep_zeros: bool = Field(False, description="Never revive a weight that is zero in MODEL, of any tensor.")
    decay_share: float = Field(
        0.4, gt=0, le=1,
        description="Share of the steps after which the target is met; the rest recovers. 1: no recovery.",
    )  # fmt: skip
    ramp: Literal["cubic", "none"] = Field(
        "cubic",
        description="How the target rises in the decay phase; none: all of it from the start.",
    )
    cut: Literal["auto", "end", "gradual"] = Field(
        "auto",
        description="When what --method lp chose is cut for good: all at the end of --decay-share, before "
        "which it may come back, or as the target rises. auto: end, unless the model has batch "
        "normalisation.",
    )
    allocation: Literal["global", "lamp", "uniform", "erk"] = Field(
        "global",
        description="How the target is shared among tensors: by score over all; by LAMP scores, which spare "
        "tensors of small scale; evenly; or by Erdos-Renyi densities, which spare small tensors.",
    )
    include: Patterns = _INCLUDE
    exclude: Patterns = _EXCLUDE
    allow_empty: bool = _ALLOW_EMPTY
    epochs: float = Field(3.0, gt=0, description="Passes over the training data.")
    steps: int | None = Field(None, ge=1, description="Optimizer steps; overrides --epochs.")
    optimizer: Annotated[str, AfterValidator(_optimizer)] = Field(
        "adamw",
        description="Base optimizer: adamw, sgd (momentum 0.9), adafactor, muon (of matrices, adamw of the "
        "rest), or MODULE:CLASS or FILE.py:CLASS of torch's interface.",
    )
    lr: float = Field(1e-4, gt=0, description="Peak learning rate.")
    lr_schedule: Literal["cosine", "linear", "restart"] = Field(
        "restart",
        description="How lr falls to zero; restart: half-way by the end of --decay-share, then from the peak "
        "again (a cosine where no recovery follows).",
    )
    warmup: float = Field(0.05, ge=0, lt=1, description="Share of the steps in which lr and lambda rise.")
    weight_decay: float = Field(
        0.0, ge=0,
        description="Ordinary decay of the tensors that L_p decay leaves alone.",
    )  # fmt: skip
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = Field(
        "auto",
        description="Arithmetic of the forward pass; the weights stay in fp32 masters. auto: bf16 where the "
        "device has it, else fp32.",
    )
    clip: float = Field(1.0, ge=0, description="Largest gradient norm; 0 is no clipping.")
    freeze: Patterns = Field((), description="Glob over tensor names that are not trained; repeatable.")
    augment: Literal["none", "crop-flip", "noise"] = Field(
        "none",
        description="Random changes of the training data: crop-flip of images; noise in texts to "
        "classify, where tokens are masked or exchanged (best with --distill).",
    )
    log_every: int = Field(20, ge=1, description="Steps between lines of metrics.jsonl.")
    threads: int | None = Field(
        None,
        ge=1,
        description="CPU threads. Default: torch's choice; 1 is fastest for a tiny language model.",
    )
    accumulate: int = Field(
        1, ge=1,
        description="Backward passes a step, each on a part of --batch-size: less memory, the same step.",
    )  # fmt: skip
    checkpointing: bool = Field(
        False,
        description="Compute a block's activations again in the backward pass instead of keeping them: less "
        "memory, a third more time (Hugging Face models).",
    )
    compile: bool = Field(False, description="Compile the model with torch.compile.")
    processes: int | None = Field(
        None, ge=1,
        description="Processes to start on this machine, one a GPU. Default: this one (or what a launcher "
        "such as `accelerate launch -m lpsparse` starts).",
    )  # fmt: skip
    shard: bool = Field(
        False,
        description="Share weights, gradients and averages out among the processes (FSDP2).",
    )
    workers: int = Field(0, ge=0, description="Processes that prepare batches, beside each that trains.")
    resume: str = Field(
        "auto",
        description="auto goes on from the training state that an unfinished run left in OUT.partial; never "
        "starts afresh and deletes it; or the folder of a state.",
    )
    save_every: int | None = Field(
        None, ge=1, description="Steps between training states. Default: every 15 minutes."
    )  # fmt: skip
    keep_last: int = Field(2, ge=1, description="Training states to keep.")
    track: Literal["none", "tensorboard", "wandb", "trackio"] = Field(
        "none", description="Experiment tracker that also gets the metrics; tensorboard's files: runs/."
    )  # fmt: skip
    rank_timeout: float = Field(
        600.0, gt=0,
        description="Seconds that a process waits for the others before the run ends with exit code 6.",
    )  # fmt: skip
    max_time: float | None = Field(
        None, gt=0,
        description="Minutes after which to save the state and exit 75; the same command goes on.",
    )  # fmt: skip
    overwrite: bool = _OVERWRITE
    dry_run: bool = _DRY_RUN

    model_config = ConfigDict(populate_by_name=True)

    @model_validator(mode="after")
    def _method_needs(self) -> Self:
        if self.method not in ("lp", "dense") and self.target_sparsity is None:
            raise ValueError(f"--method {self.method} needs --target-sparsity")
        if self.method == "dense" and self.target_sparsity is not None:
            raise ValueError("--method dense cannot meet a --target-sparsity")
        if self.method == "rigl" and self.keep_zeros:
            raise ValueError("--method rigl revives zeros; leave --keep-zeros out")
        if self.condition == "denoise" and self.target_sparsity is None:
            raise ValueError("--condition denoise prepares for a cut: it needs --target-sparsity")
        return self

    @model_validator(mode="after")
    def _parts(self) -> Self:
        if self.accumulate > self.batch_size:
            raise ValueError(f"--accumulate {self.accumulate}: a step has {self.batch_size} examples")
        return self

    @model_validator(mode="after")
    def _score_needs(self) -> Self:
        if self.score == "fisher" and self.optimizer != "adamw":
            raise ValueError(
                "--score fisher reads AdamW's averages; use --optimizer adamw or --score magnitude"
            )
        if self.score == "fisher" and self.method in ("one-shot", "rigl", "dwf"):
            raise ValueError(f"--method {self.method} has no averages to score by; use --score magnitude")
        return self

    @model_validator(mode="after")
    def _has_use(self) -> Self:
        """Refuse an option, not at its default, that means nothing to the method, conditioning or target."""
        for name, (of, users) in _USERS.items():
            if not self.at_default(name) and getattr(self, of) not in users:
                wanted = f"{flag(name)} is for {flag(of)} {' or '.join(users)}"
                raise ValueError(f"{wanted}, not {getattr(self, of)}")
        for name in _OF_A_TARGET:
            if not self.at_default(name) and self.target_sparsity is None:
                raise ValueError(f"{flag(name)} needs --target-sparsity")
        return self


_USERS = {  # option -> the option that must have one of these values for it to mean anything
    "p": ("method", ("lp",)), "lambda_p": ("method", ("lp", "l1", "dwf")),
    "lambda_convention": ("method", ("lp", "l1", "dwf")),
    "cautious": ("method", ("lp", "l1")), "lambda_2": ("method", ("lp", "l1")), "prox": ("method", ("lp",)),
    "cut": ("method", ("lp",)), "p_start": ("method", ("lp",)), "selective": ("method", ("lp",)),
    "masked_forward": ("method", ("lp",)),
    "factors": ("method", ("dwf",)), "gain_lr_ratio": ("condition", ("weight-norm",)),
    "path_penalty": ("condition", ("l1-rows",)),
}  # fmt: skip
_OF_A_TARGET = ("decay_share", "ramp", "cut", "allocation", "score", "selective", "masked_forward")


class RecoverStep(FinetuneStep):
    """Train on with every zero of MODEL held, so that what a cut cost comes back. A word of recipes for
    `finetune --method dense --keep-zeros`."""

    method: Method = Field("dense", description="dense: nothing decays, and nothing more is cut.")
    keep_zeros: bool = Field(True, description="Never revive a weight that is zero in MODEL: always so here.")

    @model_validator(mode="after")
    def _recovers(self) -> Self:
        if self.method != "dense" or not self.keep_zeros:
            raise ValueError(
                "recover is method dense with keep_zeros: for anything else the step is finetune"
            )
        return self

    def as_finetune(self) -> FinetuneStep:
        """The command that does it."""
        settings = self.model_dump(exclude_unset=True) | {
            "method": self.method,
            "keep_zeros": self.keep_zeros,
        }
        return FinetuneStep.model_validate(settings, by_name=True)


STEPS: dict[str, type[Step]] = {
    "finetune": FinetuneStep, "prune": PruneStep, "recover": RecoverStep, "pack": PackStep,
    "unpack": UnpackStep, "eval": EvalStep, "report": ReportStep, "verify": VerifyStep,
}  # fmt: skip
