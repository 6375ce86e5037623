"""Settings of finetune, recover and eval."""

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, cast

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, model_validator
from typing_extensions import TypeIs

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
    Setting,
    Step,
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
    task: Task = Setting(help="What the model does.", panel="Input", inherited=True, of_loop=True)
    split: str = Setting(
        "train",
        help="Part of DATA to train on: file stem or name, with an optional [from:to].",
        panel="Input",
    )
    text_field: str | None = Setting(
        None,
        help="Column of the text. Default: text or sentence; the first of two columns without a heading.",
        panel="Input",
        inherited=True,
        advanced=True,
    )
    label_field: str | None = Setting(
        None, help="Column of the label. Default: label.", panel="Input", inherited=True, advanced=True
    )
    max_length: int = Setting(
        128,
        ge=2,
        help="Longest text, or length of a block (causal-lm), in tokens. At most the positions that MODEL "
        "has.",
        panel="Input",
        inherited=True,
    )
    model_fn: str | None = Setting(
        None,
        help="MODULE:CALLABLE or FILE.py:CALLABLE that builds the torch module of a bare state dict.",
        panel="Input",
        recorded=False,
        is_path=True,
        inherited=True,
    )
    mean: Floats | None = Setting(
        None,
        help="Mean of each image channel, 0..1, separated by commas. Default: from MODEL's "
        "preprocessor_config.json, else 0.5.",
        panel="Input",
        inherited=True,
        advanced=True,
    )
    std: Floats | None = Setting(
        None,
        help="Standard deviation of each image channel; same form and default as --mean.",
        panel="Input",
        inherited=True,
        advanced=True,
    )
    batch_size: int = Setting(
        32, ge=1, help="Rows, images or blocks per step, over all ranks.", panel="Training", of_loop=True
    )
    seed: int = Setting(
        0, ge=0, help="Seed of data order, new heads and dropout.", panel="Training", advanced=True
    )

    @model_validator(mode="after")
    def _channels(self) -> Self:
        mean, std = self.mean or (0.5,), self.std or (0.5,)
        if len(mean) != len(std) or min(std) <= 0:
            raise ValueError("--mean and --std need as many values, --std above 0")
        return self


class EvalStep(DataStep):
    """Measure a model's quality on data."""

    command: ClassVar[str] = "eval"
    measures: ClassVar[bool] = True

    # `as_trained` fills it in, or refuses.
    task: Task = Setting(
        cast("Any", None),
        help="What the model does. Default: what `finetune` trained MODEL for.",
        panel="Input",
        inherited=True,
        has_default=False,
        of_loop=True,
    )
    data: str = Setting(
        help="File or folder of data, or hub data set id.",
        panel="Input",
        recorded=False,
        is_path=True,
        of_loop=True,
    )
    split: str = Setting(
        "validation",
        help="Part of DATA to measure on: file stem or name, with an optional [from:to]. validation also "
        "finds dev.",
        panel="Input",
    )
    against: str | None = Setting(
        None,
        help="Dense model to measure on the same rows: the quality before.",
        panel="Input",
        is_path=True,
        is_made=True,
    )
    save: bool = Setting(
        False,
        help="Record the result in MODEL, a folder that lpsparse wrote, for `report --max-quality-drop`. "
        "Replaces a result on the same data.",
        panel="Output",
    )
    dry_run: bool = Setting(
        False, help="With --save: measure, and write nothing.", panel="Output", local=True, needs={"save": ()}
    )


class FinetuneStep(DataStep):
    """Train so that most weights go to zero by themselves, then cut them and recover."""

    command: ClassVar[str] = "finetune"
    trains: ClassVar[bool] = True

    out: Path = OUT
    data: str = Setting(
        help="File or folder of data, or hub data set id.",
        panel="Input",
        recorded=False,
        is_path=True,
        of_loop=True,
    )
    eval_data: str | None = Setting(
        None,
        help="Held-out data. Default: DATA.",
        panel="Input",
        recorded=False,
        is_path=True,
        advanced=True,
        of_loop=True,
    )
    eval_split: str | None = Setting(
        None,
        help="Held-out part. Default: validation (or dev) if DATA has it, else --eval-fraction of the "
        "training rows.",
        panel="Input",
    )
    eval_fraction: float = Setting(
        0.1,
        gt=0,
        lt=1,
        help="Share of the training rows to hold out if there is no held-out part.",
        panel="Input",
        advanced=True,
    )
    method: Method = Setting(
        "lp",
        help="How weights go to zero: lp (L_p decay); for comparison gradual magnitude pruning, one-shot, "
        "l1, dwf, rigl; or dense (not at all).",
        headline=True,
    )
    target_sparsity: Fraction | None = Setting(
        None,
        ge=0,
        lt=1,
        help="Fraction of prunable weights that is zero in OUT, met exactly. Default: no cut.",
        aliases=("sparsity",),
        is_swept=True,
        headline=True,
    )
    p: float = Setting(
        0.5,
        gt=0,
        help="Exponent of the norm. Below 1, weights reach exact zero.",
        needs={"method": ("lp",)},
        advanced=True,
    )
    lambda_p: Annotated[float, Field(ge=0)] | Literal["auto"] = Setting(
        "auto",
        alias="lambda",
        help="Strength of the decay: p times the lambda of the authors' code. auto: from the sum of "
        "learning rates.",
        needs={"method": ("lp", "l1", "dwf")},
        advanced=True,
    )
    lambda_convention: Literal["ours", "authors"] = Setting(
        "ours",
        help="Whether a number in --lambda is ours or the authors'.",
        needs={"method": ("lp", "l1", "dwf")},
        advanced=True,
    )
    p_start: float | None = Setting(
        None,
        gt=0,
        help="Exponent at the start of the decay phase; it changes linearly to --p. Default: --p.",
        needs={"method": ("lp",)},
        advanced=True,
        noted=True,
    )
    lambda_2: float = Setting(
        0.0,
        ge=0,
        help="Strength of L2 decay beside the L_p decay (elastic net); 0 is none.",
        needs={"method": ("lp", "l1")},
        advanced=True,
        noted=True,
    )
    selective: bool = Setting(
        True,
        help="With a target, decay only the weights that are about to be cut.",
        needs={"method": ("lp",), "target_sparsity": ()},
        advanced=True,
        noted=True,
    )
    cautious: bool = Setting(
        False,
        help="Decay only if the optimizer's step moves the weight towards zero.",
        needs={"method": ("lp", "l1")},
        advanced=True,
        noted=True,
    )
    prox: Literal["pwd", "irl1"] = Setting(
        "pwd",
        help="Form of the decay step: the paper's division (pwd) or the reweighted L1 threshold (irl1).",
        needs={"method": ("lp",)},
        advanced=True,
        noted=True,
    )
    score: Annotated[str, OneOf(SCORES, ("auto",))] = Setting(
        "auto",
        help="What ranks weights for the cut: |w|, or |w| times the root of AdamW's average squared "
        "gradient (fisher). auto: fisher with --method lp and adamw, unless the model has batch "
        "normalisation or the cut comes within 20 steps.",
        needs={"target_sparsity": ()},
        advanced=True,
    )
    masked_forward: bool = Setting(
        True,
        help="During the decay phase, use zero in the forward pass for the weights that --selective chose. "
        "They keep training and may return.",
        needs={"method": ("lp",), "target_sparsity": ()},
        advanced=True,
        noted=True,
    )
    condition: Annotated[str, OneOf(CONDITIONINGS, ("auto", "none"))] = Setting(
        "auto",
        help="Weight conditioning. rows: each row keeps its norm; weight-norm: norms are learned; others: "
        "docs/method.md. auto: rows with --method lp and no target, unless the model has batch "
        "normalisation; else none.",
        advanced=True,
    )
    gain_lr_ratio: float = Setting(
        1.0,
        ge=0,
        help="Learning rate of the norms in --condition weight-norm, as a multiple of --lr.",
        needs={"condition": ("weight-norm",)},
        advanced=True,
        noted=True,
    )
    path_penalty: float = Setting(
        0.0,
        ge=0,
        help="Weight of the 1-path-norm in --condition l1-rows.",
        needs={"condition": ("l1-rows",)},
        advanced=True,
        noted=True,
    )
    factors: int = Setting(
        2,
        ge=2,
        le=4,
        help="Factors of each weight in --method dwf.",
        needs={"method": ("dwf",)},
        advanced=True,
        noted=True,
    )
    distill: float = Setting(
        0.0,
        ge=0,
        le=1,
        help="Share of the loss that is the divergence from MODEL's own outputs, 0..1. MODEL must have its "
        "head.",
        noted=True,
    )
    temperature: float = Setting(
        2.0, gt=0, help="Softmax temperature of both outputs in --distill.", advanced=True
    )
    distill_blocks: float = Setting(
        0.0,
        ge=0,
        help="Weight of the relative squared error between each block's output and MODEL's own.",
        advanced=True,
        noted=True,
    )
    r_drop: float = Setting(
        0.0,
        ge=0,
        help="Weight of the divergence between two passes with dropout (R-Drop's alpha). Helps with few "
        "labels; doubles the time.",
        advanced=True,
        noted=True,
    )
    keep_zeros: bool = Setting(
        False, help="Hold every weight at zero that is zero in MODEL, in all tensors.", advanced=True
    )
    decay_share: float = Setting(
        0.4,
        gt=0,
        le=1,
        help="Share of the steps after which the target is met. The rest recovers; 1 is no recovery.",
        needs={"target_sparsity": ()},
        advanced=True,
    )
    ramp: Literal["cubic", "none"] = Setting(
        "cubic",
        help="How the target rises in the decay phase; none: it is whole from the start.",
        needs={"target_sparsity": ()},
        advanced=True,
        noted=True,
    )
    cut: Literal["auto", "end", "gradual"] = Setting(
        "auto",
        help="When --method lp cuts for good: at the end of --decay-share (weights may return before), or "
        "as the target rises. auto: end, unless the model has batch normalisation.",
        needs={"method": ("lp",), "target_sparsity": ()},
        advanced=True,
    )
    allocation: Literal["global", "lamp", "uniform", "erk"] = Setting(
        "global",
        help="How tensors share the target: by score over all, by LAMP scores (spare tensors of small "
        "scale), evenly, or by Erdos-Renyi densities (spare small tensors).",
        needs={"target_sparsity": ()},
        advanced=True,
        noted=True,
    )
    include: Patterns = INCLUDE
    exclude: Patterns = EXCLUDE
    allow_empty: bool = ALLOW_EMPTY
    epochs: float = Setting(
        3.0, gt=0, help="Passes over the training data.", panel="Training", headline=True, of_loop=True
    )
    steps: int | None = Setting(
        None, ge=1, help="Optimizer steps; overrides --epochs.", panel="Training", headline=True, of_loop=True
    )
    optimizer: Annotated[str, AfterValidator(_optimizer)] = Setting(
        "adamw",
        help="Base optimizer: adamw, sgd (momentum 0.9), adafactor, muon (matrices only, adamw for the "
        "rest), or MODULE:CLASS or FILE.py:CLASS with torch's interface.",
        panel="Training",
        advanced=True,
        of_loop=True,
    )
    lr: float = Setting(1e-4, gt=0, help="Peak learning rate.", panel="Training", aliases=("learning_rate",))
    lr_schedule: Literal["cosine", "linear", "restart"] = Setting(
        "restart",
        help="How the learning rate falls to zero. restart: to half by the end of --decay-share, then from "
        "the peak again (cosine if no recovery follows).",
        panel="Training",
        advanced=True,
        noted=True,
    )
    warmup: float = Setting(
        0.05,
        ge=0,
        lt=1,
        help="Share of the steps in which the learning rate and lambda rise.",
        panel="Training",
        aliases=("warmup_ratio",),
        advanced=True,
    )
    weight_decay: float = Setting(
        0.0,
        ge=0,
        help="Ordinary weight decay, for tensors without L_p decay.",
        panel="Training",
        advanced=True,
    )
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = Setting(
        "auto",
        help="Arithmetic of the forward pass; master weights stay in fp32. auto: bf16 if the device has "
        "it, else fp32.",
        panel="Hardware",
    )
    clip: float = Setting(
        1.0,
        ge=0,
        help="Largest gradient norm; 0 is no clipping.",
        panel="Training",
        aliases=("max_grad_norm",),
        advanced=True,
        of_loop=True,
    )
    freeze: Patterns = Setting(
        (), help="Glob of tensor names that are not trained; repeatable.", panel="Training", advanced=True
    )
    augment: Literal["none", "crop-flip", "noise"] = Setting(
        "none",
        help="Random changes of training data: crop-flip for images; noise for texts (tokens are masked or "
        "swapped; best with --distill).",
        panel="Training",
        advanced=True,
        noted=True,
    )
    log_every: int = Setting(
        20,
        ge=1,
        help="Steps between lines of metrics.jsonl.",
        panel="Reporting",
        aliases=("logging_steps",),
        advanced=True,
    )
    threads: int | None = Setting(
        None,
        ge=1,
        help="CPU threads. Default: torch's choice; 1 is fastest for a tiny language model.",
        panel="Hardware",
        advanced=True,
    )
    accumulate: int = Setting(
        1,
        ge=1,
        help="Split each batch into N micro-batches: less memory, same result.",
        panel="Hardware",
        aliases=("gradient_accumulation_steps",),
        advanced=True,
    )
    checkpointing: bool = Setting(
        False,
        help="Recompute activations in the backward pass: less memory, a third more time (Hugging Face "
        "models).",
        panel="Hardware",
        aliases=("gradient_checkpointing",),
        advanced=True,
    )
    compile: bool = Setting(
        False, help="Compile the model with torch.compile.", panel="Hardware", advanced=True
    )
    processes: int | None = Setting(
        None,
        ge=1,
        help="Processes to start on this machine, one per GPU. Default: this one, or those of a launcher "
        "such as `accelerate launch -m lpsparse`.",
        panel="Hardware",
        aliases=("num_processes",),
        local=True,
    )
    shard: bool = Setting(
        False,
        help="Shard weights, gradients and optimizer states over the ranks (FSDP2).",
        panel="Hardware",
        aliases=("fsdp",),
        local=True,
        advanced=True,
    )
    workers: int = Setting(
        0, ge=0, help="Data loader processes per rank.", panel="Hardware", local=True, advanced=True
    )
    resume: str = Setting(
        "auto",
        help="auto: resume from the training state in OUT.partial, if there is one; never: delete it and "
        "start over; or the folder of a state.",
        panel="Output",
        local=True,
    )
    save_every: int | None = Setting(
        None,
        ge=1,
        help="Steps between training states. Default: every 15 minutes.",
        panel="Output",
        aliases=("save_steps",),
        local=True,
        advanced=True,
    )
    keep_last: int = Setting(
        2,
        ge=1,
        help="Training states to keep.",
        panel="Output",
        aliases=("save_total_limit",),
        local=True,
        advanced=True,
    )
    track: Literal["none", "tensorboard", "wandb", "trackio"] = Setting(
        "none",
        help="Experiment tracker that also gets the metrics; tensorboard writes to runs/.",
        panel="Reporting",
        aliases=("report_to",),
        local=True,
        advanced=True,
    )
    rank_timeout: float = Setting(
        600.0,
        gt=0,
        help="Seconds that a rank waits for the others before the run ends with exit code 6.",
        panel="Hardware",
        local=True,
        advanced=True,
    )
    max_time: float | None = Setting(
        None,
        gt=0,
        help="Minutes after which to save the state and exit 75; the same command resumes.",
        panel="Output",
        local=True,
        advanced=True,
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


def is_training(step: Step) -> TypeIs[FinetuneStep]:
    return step.trains


class RecoverStep(FinetuneStep):
    """Train on with every zero of MODEL held, so that what a cut cost comes back. A word of recipes for
    `finetune --method dense --keep-zeros`."""

    command: ClassVar[str] = "recover"
    same_selection: ClassVar[bool] = True
    fixed: ClassVar[Mapping[str, Any]] = {"method": "dense", "keep_zeros": True}

    method: Method = Setting("dense", help="dense: nothing decays, and nothing more is cut.", headline=True)
    keep_zeros: bool = Setting(True, help="Hold every weight at zero that is zero in MODEL: always on here.")

    @model_validator(mode="after")
    def _recovers(self) -> Self:
        if any(getattr(self, name) != value for name, value in self.fixed.items()):
            raise ValueError(
                "recover is method dense with keep_zeros: for anything else the step is finetune"
            )
        return self

    def as_command(self) -> FinetuneStep:
        settings = {**self.model_dump(exclude_unset=True), **self.fixed}
        return FinetuneStep.model_validate(settings, by_name=True)
