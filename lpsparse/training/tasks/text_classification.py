"""text-classification: a Hugging Face folder with a sequence
classification head, old or fresh. Metric: accuracy."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lpsparse.checkpoint.opening import Checkpoint
from lpsparse.checkpoint.writer import write_json
from lpsparse.errors import InputError
from lpsparse.recipe import EvalStep, FinetuneStep
from lpsparse.training.data import Row, find, read_rows
from lpsparse.training.model import load_transformer, read_config
from lpsparse.training.tasks.base import Batch, Task, check_vocabulary, hold_out, tokenizer_of


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
        raise InputError(399, what, mend="fine-tune it first")
    model: Any = loaded.module
    check_vocabulary(tokenizer, model.get_input_embeddings().weight.shape[0], checkpoint.name)
    if model.config.pad_token_id is None and tokenizer.pad_token_id is not None:
        model.config.pad_token_id = tokenizer.pad_token_id
    encode = _encoder(tokenizer, labels, step.max_length)
    return Task(
        loaded, encode(train), encode(held), _collate(tokenizer), _predict, metric="accuracy", unit="rows",
        length=lambda example: len(example[0]), sidecars=lambda folder: _write_labels(folder, model),
    )  # fmt: skip


def _rows(step: FinetuneStep | EvalStep) -> tuple[list[Row], list[Row]]:
    def read(data: str, split: str) -> list[Row]:
        files, part, _ = find(data, split)
        return read_rows(files, part, step.text_field, step.label_field)

    rows = read(step.data, step.split)
    if isinstance(step, EvalStep):
        return [], rows
    if step.eval_split is None and step.eval_data is None:
        return hold_out(rows, step.eval_fraction, step.seed)
    return rows, read(step.eval_data or step.data, step.eval_split or "validation")


def _labels(rows: list[Row], config: dict[str, Any], checkpoint: Checkpoint, *, training: bool) -> list[str]:
    """Label names by id: the checkpoint's own where the rows fit them,
    else the training rows' in sorted order."""
    table = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    known = [str(table[key]) for key in sorted(table, key=int)]
    seen = sorted({str(row.label) for row in rows}, key=lambda text: (not text.isdigit(), text.zfill(9)))
    if all(label in known or (label.isdigit() and int(label) < len(known)) for label in seen):
        return known
    has_head = any(tensor.name.startswith(("classifier.", "score.")) for tensor in checkpoint.tensors)
    if training and not has_head:
        return seen
    bad = next(row for row in rows if row.label not in known and not _is_id(row.label, known))
    what = f"{bad.where}: label {bad.label!r} is outside the model's set ({', '.join(known[:8])})"
    raise InputError(400, what, mend="mend the row, or start from a checkpoint without a head")


def _is_id(label: str | None, known: list[str]) -> bool:
    return label is not None and label.isdigit() and int(label) < len(known)


def _changes(labels: list[str]) -> dict[str, Any]:
    table = dict(enumerate(labels))
    return {"num_labels": len(labels), "id2label": table, "label2id": {name: i for i, name in table.items()}}


def _encoder(tokenizer: Any, labels: list[str], max_length: int) -> Any:
    ids = {str(i): i for i in range(len(labels))} | {name: i for i, name in enumerate(labels)}

    def encode(rows: list[Row]) -> list[tuple[list[int], int]]:
        for row in rows:
            if row.label not in ids:
                what = f"{row.where}: label {row.label!r} is outside the set ({', '.join(labels[:8])})"
                raise InputError(400, what, mend="mend or drop the row")
        texts = [row.text for row in rows]
        tokens = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"] if texts else []
        return [(token_ids, ids[str(row.label)]) for token_ids, row in zip(tokens, rows, strict=True)]

    return encode


def _collate(tokenizer: Any) -> Any:
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0

    def collate(examples: list[tuple[list[int], int]]) -> Batch:
        width = max(len(tokens) for tokens, _ in examples)
        ids = torch.full((len(examples), width), pad)  # (batch, tokens)
        mask = torch.zeros_like(ids)
        for i, (tokens, _) in enumerate(examples):
            ids[i, : len(tokens)] = torch.tensor(tokens)
            mask[i, : len(tokens)] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([y for _, y in examples])}

    return collate


def _predict(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits.float(), batch["labels"]


def _write_labels(folder: Path, model: Any) -> None:
    """config.json of OUT: the source's own, plus what a head changes."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    table = {str(i): name for i, name in model.config.id2label.items()}
    changed = {
        "architectures": [type(model).__name__], "id2label": table,
        "label2id": {name: int(i) for i, name in table.items()},
        "problem_type": "single_label_classification",
    }  # fmt: skip
    if any(config.get(key) != value for key, value in changed.items()):
        write_json(path, config | changed)
