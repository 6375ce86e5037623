"""text-classification: a Hugging Face folder with a sequence
classification head, old or fresh. Metric: accuracy."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lpsparse.checkpoint.opening import Checkpoint
from lpsparse.checkpoint.progress import advance, phase
from lpsparse.errors import InputError
from lpsparse.recipe import EvalStep, FinetuneStep
from lpsparse.training.data import Row, find, held_out_of, read_rows
from lpsparse.training.model import load_transformer, read_config
from lpsparse.training.tasks.base import (
    Batch,
    Task,
    check_vocabulary,
    draws,
    hold_out,
    tokenizer_of,
    write_head,
)

_AT_ONCE = 1000  # rows that are tokenised between two signs of progress
NOISE = 0.15  # share of the tokens that --augment noise replaces


def prepare(step: FinetuneStep | EvalStep, checkpoint: Checkpoint) -> Task:
    from transformers import AutoModelForSequenceClassification

    config = read_config(checkpoint)
    train, held = _rows(step)
    labels = _labels(train or held, config, checkpoint, training=bool(train))
    changes = (
        {} if config.get("id2label") == {str(i): name for i, name in enumerate(labels)} else _changes(labels)
    )
    tokenizer = tokenizer_of(checkpoint)
    loaded = load_transformer(checkpoint, AutoModelForSequenceClassification, changes)
    if isinstance(step, EvalStep) and loaded.new:
        what = f"{checkpoint.name}: has no head to measure ({', '.join(loaded.new)})"
        raise InputError(399, what, hint="fine-tune it first")
    model: Any = loaded.module
    check_vocabulary(tokenizer, model.get_input_embeddings().weight.shape[0], checkpoint.name)
    pad = model.config.pad_token_id = _padding(tokenizer, config, checkpoint)
    encode = _encoder(tokenizer, labels, step.max_length)
    with phase("tokenising", len(train) + len(held), "rows"):
        train, held = encode(train), encode(held)
    return Task(
        loaded, train, held, _collate(pad), _predict, metric="accuracy", unit="rows",
        length=lambda example: len(example[0]),
        sidecars=lambda folder: write_head(folder, model, pad_token_id=pad),
        augment=_noise(tokenizer) if isinstance(step, FinetuneStep) and step.augment == "noise" else None,
    )  # fmt: skip


def _rows(step: FinetuneStep | EvalStep) -> tuple[list[Row], list[Row]]:
    def read(data: str, split: str) -> list[Row]:
        files, part, _ = find(data, split)
        return read_rows(files, part, step.text_field, step.label_field)

    rows = read(step.data, step.split)
    if isinstance(step, EvalStep):
        return [], rows
    held = held_out_of(step)
    return hold_out(rows, step.eval_fraction, step.seed) if held is None else (rows, read(*held))


def _labels(rows: list[Row], config: dict[str, Any], checkpoint: Checkpoint, *, training: bool) -> list[str]:
    """Label names by id: the checkpoint's own where the rows fit them,
    else the training rows' in sorted order."""
    known = _known_labels(config, checkpoint)
    seen = sorted({str(row.label) for row in rows}, key=lambda text: (not _is_number(text), text.zfill(9)))
    if all(label in _ids(known) for label in seen):
        return known
    has_head = any(tensor.name.startswith(("classifier.", "score.")) for tensor in checkpoint.tensors)
    if training and not has_head:
        return seen
    bad = next(row for row in rows if row.label not in _ids(known))
    what = f"{bad.where}: label {bad.label!r} is outside the model's set ({', '.join(known[:8])})"
    raise InputError(349, what, hint="fix the row, or start from a checkpoint without a head")


def _known_labels(config: dict[str, Any], checkpoint: Checkpoint) -> list[str]:
    """The names in config.json by their ids, which count from 0."""
    table = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    if not isinstance(table, dict) or set(table) != {str(i) for i in range(len(table))}:
        what = f"{checkpoint.name}: config.json: id2label is no table of ids from 0"
        raise InputError(392, what, hint="fix config.json")
    return [str(table[str(i)]) for i in range(len(table))]


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal()


def _ids(labels: list[str]) -> dict[str | None, int]:
    """Id of each label: by name, and by number where no name is a number itself."""
    ids: dict[str | None, int] = (
        {} if any(map(_is_number, labels)) else {str(i): i for i in range(len(labels))}
    )
    return ids | {name: i for i, name in enumerate(labels)}


def _changes(labels: list[str]) -> dict[str, Any]:
    table = dict(enumerate(labels))
    return {"num_labels": len(labels), "id2label": table, "label2id": {name: i for i, name in table.items()}}


def _encoder(tokenizer: Any, labels: list[str], max_length: int) -> Any:
    ids = _ids(labels)

    def encode(rows: list[Row]) -> list[tuple[list[int], int]]:
        for row in rows:
            if row.label not in ids:
                what = f"{row.where}: label {row.label!r} is outside the set ({', '.join(labels[:8])})"
                raise InputError(349, what, hint="fix or drop the row")
        found: list[tuple[list[int], int]] = []
        for first in range(0, len(rows), _AT_ONCE):
            some = rows[first : first + _AT_ONCE]
            tokens = tokenizer([row.text for row in some], truncation=True, max_length=max_length)[
                "input_ids"
            ]
            found += [(token_ids, ids[row.label]) for token_ids, row in zip(tokens, some, strict=True)]
            advance(len(some), "rows")
        return found

    return encode


def _padding(tokenizer: Any, config: dict[str, Any], checkpoint: Checkpoint) -> int:
    """The token that fills short rows up: the model's own, the tokenizer's, or the end of text."""
    for token in (config.get("pad_token_id"), tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int) and 0 <= token < len(tokenizer):
            return token
    what = f"{checkpoint.name}: neither model nor tokenizer has a padding or end-of-text token"
    raise InputError(389, what, hint="set pad_token_id in config.json")


def _collate(pad: int) -> Any:
    def collate(examples: list[tuple[list[int], int]]) -> Batch:
        width = max(len(tokens) for tokens, _ in examples)
        ids = torch.full((len(examples), width), pad)  # (batch, tokens)
        mask = torch.zeros_like(ids)
        for i, (tokens, _) in enumerate(examples):
            ids[i, : len(tokens)] = torch.tensor(tokens)
            mask[i, : len(tokens)] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([y for _, y in examples])}

    return collate


def _noise(tokenizer: Any) -> Callable[[Batch, list[int]], Batch]:
    """Some tokens become the mask (where the tokenizer has one) or another token of the batch, half and half:
    new inputs for a teacher to label (as TinyBERT's augmentation: Jiao et al. 2020, arXiv 1909.10351)."""
    special = torch.tensor(sorted(tokenizer.all_special_ids))
    mask = tokenizer.mask_token_id

    def augment(batch: Batch, seeds: list[int]) -> Batch:
        ids = batch["input_ids"]  # (batch, tokens)
        words = ~torch.isin(ids, special.to(ids.device)) & batch["attention_mask"].bool()
        pool = ids[words] if words.any() else ids.flatten()
        chance, draw = draws(seeds, 2, ids.shape[1]).to(ids.device)
        draw = (draw * len(pool)).long()
        noisy = torch.where(words & (chance < NOISE), pool[draw], ids)
        if mask is not None:
            noisy = torch.where(words & (chance < NOISE / 2), mask, noisy)
        return {**batch, "input_ids": noisy}

    return augment


def _predict(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits.float(), batch["labels"]
