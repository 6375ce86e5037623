"""Keywords of the public functions, for editors and type checkers: made from the steps by
tests/steps/test_options.py, which holds them true."""

from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Literal, TypedDict


class FinetuneOptions(TypedDict, total=False):
    weights: str | None
    key: str | None
    task: str
    split: str
    text_field: str | None
    label_field: str | None
    max_length: int
    model_fn: str | None
    mean: float | Sequence[float] | None
    std: float | Sequence[float] | None
    batch_size: int
    seed: int
    data: str
    eval_data: str | None
    eval_split: str | None
    eval_fraction: float
    method: str
    target_sparsity: float | str | Decimal | None
    p: float
    lambda_p: float | Literal["auto"]
    lambda_convention: Literal["ours", "authors"]
    p_start: float | None
    lambda_2: float
    selective: bool
    cautious: bool
    prox: Literal["pwd", "irl1"]
    score: str
    masked_forward: bool
    condition: str
    gain_lr_ratio: float
    path_penalty: float
    factors: int
    distill: float
    temperature: float
    distill_blocks: float
    r_drop: float
    keep_zeros: bool
    decay_share: float
    ramp: Literal["cubic", "none"]
    cut: Literal["auto", "end", "gradual"]
    allocation: Literal["global", "lamp", "uniform", "erk"]
    include: str | Sequence[str]
    exclude: str | Sequence[str]
    allow_empty: bool
    epochs: float
    steps: int | None
    optimizer: str
    lr: float
    lr_schedule: Literal["cosine", "linear", "restart"]
    warmup: float
    weight_decay: float
    mixed_precision: Literal["auto", "no", "bf16", "fp16"]
    clip: float
    freeze: str | Sequence[str]
    augment: Literal["none", "crop-flip", "noise"]
    log_every: int
    threads: int | None
    accumulate: int
    checkpointing: bool
    compile: bool
    processes: int | None
    shard: bool
    workers: int
    resume: str
    save_every: int | None
    keep_last: int
    track: Literal["none", "tensorboard", "wandb", "trackio"]
    rank_timeout: float
    max_time: float | None
    overwrite: bool


class PruneOptions(TypedDict, total=False):
    weights: str | None
    key: str | None
    sparsity: float | str | Decimal | None
    below: float | None
    gap: bool
    n_m: str | None
    scope: Literal["global", "tensor", "row"]
    criterion: str
    block: str | None
    include: str | Sequence[str]
    exclude: str | Sequence[str]
    look: bool
    allow_empty: bool
    layout: str
    threads: int | None
    overwrite: bool


class PackOptions(TypedDict, total=False):
    weights: str | None
    key: str | None
    layout: str
    level: Literal["fast", "default", "max"]
    threads: int | None
    overwrite: bool


class UnpackOptions(TypedDict, total=False):
    weights: str | None
    key: str | None
    threads: int | None
    overwrite: bool


class EvalOptions(TypedDict, total=False):
    weights: str | None
    key: str | None
    task: str
    split: str
    text_field: str | None
    label_field: str | None
    max_length: int
    model_fn: str | None
    mean: float | Sequence[float] | None
    std: float | Sequence[float] | None
    batch_size: int
    seed: int
    data: str
    against: str | None
    save: bool


class ReportOptions(TypedDict, total=False):
    min_sparsity: str | Sequence[str]
    max_bytes: str | Sequence[str]
    max_quality_drop: str | Sequence[str]
    max_layer_sparsity: str | Sequence[str]
    min_nm: str | Sequence[str]
    weights: str | None
    key: str | None
    threads: int | None
    include: str | Sequence[str]
    exclude: str | Sequence[str]
    warn: str | Sequence[str]
    baseline: str | Path | None
    max_regression: float | str | Decimal
    spectra: bool
    json: str | Path
    html: str | Path
    markdown: str | Path
    comment: str | Path
    junit: str | Path
    csv: str | Path


class InspectOptions(TypedDict, total=False):
    weights: str | None
    key: str | None
    look: bool


class PushOptions(TypedDict, total=False):
    private: bool
    revision: str | None
    message: str
    create_pr: bool
    delete_others: bool
    threads: int | None
