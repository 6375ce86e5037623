"""text-classification: a Hugging Face folder with a sequence
classification head, old or fresh. Metric: accuracy."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from lpsparse.checkpoint.open import Checkpoint
from lpsparse.errors import InputError, UsageError
from lpsparse.parallel.progress import advance, phase
from lpsparse.steps.finetune import EvalStep, FinetuneStep, is_training
from lpsparse.training.data import Row, class_names, find, read_rows
from lpsparse.training.labels import Classes, config_names, first_places, number
from lpsparse.training.model import has_head, load_transformer, read_config
from lpsparse.training.tasks.base import (
    Batch,
    Read,
    Task,
    check_vocabulary,
    draws,
    examples_of,
    length_of,
    tokenizer_of,
    write_head,
)

_AT_ONCE = 1000  # rows that are tokenised between two signs of progress
NOISE = 0.15  # share of the tokens that --augment noise replaces


def prepare(step: FinetuneStep | EvalStep, checkpoint: Checkpoint) -> Task:
    from transformers import AutoModelForSequenceClassification

    config = read_config(checkpoint)
    examples = examples_of(step, partial(_read, step))
    names = config_names(config, checkpoint)
    head = has_head(checkpoint, AutoModelForSequenceClassification)
    classes = number(examples.places, names, checkpoint, head=head, told=examples.told)
    examples.check(classes)
    tokenizer = tokenizer_of(checkpoint)
    loaded = load_transformer(checkpoint, AutoModelForSequenceClassification, classes.changes())
    if not step.trains and loaded.new:
        what = f"{checkpoint.name}: has no head to measure ({', '.join(loaded.new)})"
        raise InputError(399, what, hint="fine-tune it first")
    model: Any = loaded.module
    check_vocabulary(tokenizer, model.get_input_embeddings().weight.shape[0], checkpoint.name)
    pad = model.config.pad_token_id = _padding(tokenizer, config, checkpoint)
    encode = _encoder(tokenizer, classes, length_of(step, model, checkpoint.name))
    with phase("tokenising", len(examples.all), "rows"):
        train, held = encode(examples.train), encode(examples.held)
    return Task(
        loaded,
        train,
        held,
        _collate(pad),
        _predict,
        metric="accuracy",
        unit="rows",
        length=lambda example: len(example[0]),
        sidecars=lambda folder: write_head(folder, model, pad_token_id=pad),
        augment=_noise(tokenizer) if is_training(step) and step.augment == "noise" else None,
        notes=(*examples.notes, *classes.notes),
    )


def _read(step: FinetuneStep | EvalStep, data: str, split: str) -> Read[Row]:
    files, part, _ = find(data, split)
    notes: list[str] = []
    rows = read_rows(files, slice(None), step.text_field, step.label_field, say=notes.append)
    if not rows[part]:
        raise InputError(376, f"{files[0]}: no rows in the part of {split!r}", hint="give another part")
    return Read(rows[part], first_places(rows), tuple(notes), class_names(files, step.label_field))


def _encoder(tokenizer: Any, classes: Classes, max_length: int) -> Any:
    """Rows -> token ids and number of the class. Raises InputError naming a row whose text has no tokens."""
    marks = tokenizer("")["input_ids"]
    if max_length <= len(marks):
        what = f"--max-length {max_length} leaves no token between the marks"
        raise UsageError(253, what, hint="give a larger one")

    def encode(rows: list[Row]) -> list[tuple[list[int], int]]:
        found: list[tuple[list[int], int]] = []
        for first in range(0, len(rows), _AT_ONCE):
            some = rows[first : first + _AT_ONCE]
            texts = [row.text for row in some]
            tokens = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
            for token_ids, row in zip(tokens, some, strict=True):
                if token_ids == marks:
                    raise InputError(
                        377, f"{row.where}: the text gives no tokens", hint="fix or drop the row"
                    )
                found.append((token_ids, classes.ids[row.label]))
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
