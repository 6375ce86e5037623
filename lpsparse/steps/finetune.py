"""Settings of finetune, recover and eval."""

from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, cast

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, model_validator

from lpsparse.families import CONDITIONINGS, METHODS, SCORES, TASKS
from lpsparse.steps.base import (
    ALLOW_EMPTY,
    DRY_RUN,
    EXCLUDE,
    INCLUDE,
    KEY,
    MODEL,
    OUT,
    OVERWRITE,
    WEIGHTS,
    Fraction,
    OneOf,
    Patterns,
    Step,
    flag,
    listed,
)

Task = Annotated[str, OneOf(TASKS)]

Method = Annotated[str, OneOf(METHODS)]


def _optimizer(value: str) -> str:
    if value not in OPTIMIZERS and ":" not in value:
        near = [f"; did you mean {name}?" for name in get_close_matches(value, OPTIMIZERS, n=1)]
        raise ValueError(f"--optimizer {value}: not {', '.join(OPTIMIZERS)} or MODULE:CLASS{''.join(near)}")
    return value


OPTIMIZERS = ("adamw", "sgd", "adafactor", "muon")

Floats = Annotated[tuple[float, ...], BeforeValidator(listed)]


class DataStep(Step):
    """What finetune and eval share: the task and its data."""

    model: str = MODEL
    weights: str | None = WEIGHTS
    key: str | None = KEY
    task: Task = Field(description="What the model does.")
    split: str = Field(
        "train", description="Part of DATA to use: file stem or name, with an optional [from:to]."
    )
    text_field: str | None = Field(
        None,
        description="Column of the text. Default: text or sentence; in a table of two columns without a "
        "heading, the first.",
    )
    label_field: str | None = Field(None, description="Column of the label. Default: label.")
    max_length: int = Field(
        128,
        ge=2,
        description="Tokens a text is cut at (classification) or a block has (causal-lm). Default: 128, or "
        "the positions that MODEL has.",
    )
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


class EvalStep(DataStep):
    """Measure a model's quality on data."""

    # What a fine-tune of MODEL was told, and need not be said again.
    inherited: ClassVar[tuple[str, ...]] = (
        "task",
        "text_field",
        "label_field",
        "max_length",
        "model_fn",
        "mean",
        "std",
    )

    # `as_trained` fills it in, or refuses.
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


class FinetuneStep(DataStep):
    """Train so that most weights go to zero by themselves, then cut them and recover."""

    decides: ClassVar[frozenset[str]] = frozenset({"threads"})  # sums in floating point

    out: Path = OUT
    data: str = Field(description="File or folder of data, or hub data set id.")
    eval_data: str | None = Field(None, description="Held-out data. Default: DATA.")
    eval_split: str | None = Field(
        None,
        description="Held-out part. Default: validation (or dev) if DATA has it, else a share of --split.",
    )
    eval_fraction: float = Field(
        0.1, gt=0, lt=1, description="Share of --split set aside when no --eval-split."
    )
    method: Method = Field(
        "lp",
        description="How weights get to zero: L_p decay; the rivals gradual magnitude pruning, one-shot with "
        "masked training, L1 prox, deep weight factorisation, RigL's regrowth; or not at all.",
    )
    target_sparsity: Fraction | None = Field(
        None,
        ge=0,
        lt=1,
        description="Fraction of the prunable weights that is zero in OUT, exactly. Default: no cut.",
    )
    p: float = Field(0.5, gt=0, description="Exponent of the norm; below 1 weights reach exact zero.")
    lambda_p: Annotated[float, Field(ge=0)] | Literal["auto"] = Field(
        "auto",
        alias="lambda",
        description="Strength of the decay (ours: the authors' lambda times p); auto takes it from the sum "
        "of learning rates.",
    )
    lambda_convention: Literal["ours", "authors"] = Field(
        "ours", description="How a number in --lambda is meant."
    )
    p_start: float | None = Field(
        None,
        gt=0,
        description="Exponent at the start of the decay phase, from where it goes linearly to --p. Default: "
        "--p throughout.",
    )
    lambda_2: float = Field(0.0, ge=0, description="Ridge beside the L_p decay (elastic net); 0 is none.")
    selective: bool = Field(
        True, description="With a target, decay only the weights that the current target would cut."
    )
    cautious: bool = Field(False, description="Decay only where the step itself moves a weight towards zero.")
    prox: Literal["pwd", "irl1"] = Field(
        "pwd", description="The decay's step: the paper's division, or the reweighted L1 threshold."
    )
    score: Annotated[str, OneOf(SCORES, ("auto",))] = Field(
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
    condition: Annotated[str, OneOf(CONDITIONINGS, ("auto", "none"))] = Field(
        "auto",
        description="Weight conditioning. rows: each keeps the norm that it has in the checkpoint; "
        "weight-norm: norms are learnt; the others: docs/method.md. auto: rows with --method lp where "
        "all weights decay (no target), unless the model has batch normalisation; else none.",
    )
    gain_lr_ratio: float = Field(
        1.0, ge=0, description="Learning rate of the norms in --condition weight-norm, as a multiple of --lr."
    )
    path_penalty: float = Field(0.0, ge=0, description="Weight of the 1-path-norm in --condition l1-rows.")
    factors: int = Field(2, ge=2, le=4, description="Factors of each weight in --method dwf.")
    distill: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the loss that is the divergence from MODEL's own outputs; needs a MODEL with "
        "its head.",
    )
    temperature: float = Field(2.0, gt=0, description="Softening of both outputs in --distill.")
    distill_blocks: float = Field(
        0.0,
        ge=0,
        description="Weight of keeping every block's output near MODEL's own, as a relative squared error.",
    )
    r_drop: float = Field(
        0.0,
        ge=0,
        description="Weight of the divergence between two passes with dropout (R-Drop's alpha): helps where "
        "labelled data is short, at twice the time.",
    )
    keep_zeros: bool = Field(False, description="Never revive a weight that is zero in MODEL, of any tensor.")
    decay_share: float = Field(
        0.4,
        gt=0,
        le=1,
        description="Share of the steps after which the target is met; the rest recovers. 1: no recovery.",
    )
    ramp: Literal["cubic", "none"] = Field(
        "cubic", description="How the target rises in the decay phase; none: all of it from the start."
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
    include: Patterns = INCLUDE
    exclude: Patterns = EXCLUDE
    allow_empty: bool = ALLOW_EMPTY
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
        0.0, ge=0, description="Ordinary decay of the tensors that L_p decay leaves alone."
    )
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
        1,
        ge=1,
        description="Backward passes a step, each on a part of --batch-size: less memory, the same step.",
    )
    checkpointing: bool = Field(
        False,
        description="Compute a block's activations again in the backward pass instead of keeping them: less "
        "memory, a third more time (Hugging Face models).",
    )
    compile: bool = Field(False, description="Compile the model with torch.compile.")
    processes: int | None = Field(
        None,
        ge=1,
        description="Processes to start on this machine, one a GPU. Default: this one (or what a launcher "
        "such as `accelerate launch -m lpsparse` starts).",
    )
    shard: bool = Field(
        False, description="Share weights, gradients and averages out among the processes (FSDP2)."
    )
    workers: int = Field(0, ge=0, description="Processes that prepare batches, beside each that trains.")
    resume: str = Field(
        "auto",
        description="auto goes on from the training state that an unfinished run left in OUT.partial; never "
        "starts afresh and deletes it; or the folder of a state.",
    )
    save_every: int | None = Field(
        None, ge=1, description="Steps between training states. Default: every 15 minutes."
    )
    keep_last: int = Field(2, ge=1, description="Training states to keep.")
    track: Literal["none", "tensorboard", "wandb", "trackio"] = Field(
        "none", description="Experiment tracker that also gets the metrics; tensorboard's files: runs/."
    )
    rank_timeout: float = Field(
        600.0,
        gt=0,
        description="Seconds that a process waits for the others before the run ends with exit code 6.",
    )
    max_time: float | None = Field(
        None, gt=0, description="Minutes after which to save the state and exit 75; the same command goes on."
    )
    overwrite: bool = OVERWRITE
    dry_run: bool = DRY_RUN

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
    "p": ("method", ("lp",)),
    "lambda_p": ("method", ("lp", "l1", "dwf")),
    "lambda_convention": ("method", ("lp", "l1", "dwf")),
    "cautious": ("method", ("lp", "l1")),
    "lambda_2": ("method", ("lp", "l1")),
    "prox": ("method", ("lp",)),
    "cut": ("method", ("lp",)),
    "p_start": ("method", ("lp",)),
    "selective": ("method", ("lp",)),
    "masked_forward": ("method", ("lp",)),
    "factors": ("method", ("dwf",)),
    "gain_lr_ratio": ("condition", ("weight-norm",)),
    "path_penalty": ("condition", ("l1-rows",)),
}

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
