"""causal-lm: next-token loss of a Hugging Face folder on blocks of a text. Metric: loss, nats a token."""

from typing import Any

import torch
from torch import nn

from lpsparse.checkpoint.opening import Checkpoint
from lpsparse.errors import InputError
from lpsparse.recipe import EvalStep, FinetuneStep
from lpsparse.training.data import find, read_text
from lpsparse.training.model import load_transformer
from lpsparse.training.tasks.base import Batch, Task, check_vocabulary, tokenizer_of


def prepare(step: FinetuneStep | EvalStep, checkpoint: Checkpoint) -> Task:
    from transformers import AutoModelForCausalLM

    train_text, held_text = _texts(step)
    tokenizer = tokenizer_of(checkpoint)
    loaded = load_transformer(checkpoint, AutoModelForCausalLM, {})
    if loaded.new:
        what = f"{checkpoint.name}: is no language model: it lacks {', '.join(loaded.new)}"
        raise InputError(396, what, mend="check --task")
    model: Any = loaded.module
    check_vocabulary(tokenizer, model.get_input_embeddings().weight.shape[0], checkpoint.name)
    most: Any = getattr(model.config, "max_position_embeddings", None)
    length = min(step.max_length, most) if isinstance(most, int) else step.max_length
    if length < 2:
        what = f"{checkpoint.name}: config.json: max_position_embeddings is {most}"
        raise InputError(392, what, mend="mend config.json")
    train = _blocks(tokenizer, train_text, length, step.data) if train_text else []
    held = _blocks(tokenizer, held_text, length, step.data)
    return Task(loaded, train, held, _collate, _predict, metric="loss", unit="tokens")


def _texts(step: FinetuneStep | EvalStep) -> tuple[str, str]:
    """Training and held-out text; without an eval split, the last share of the training text is held out."""

    def read(data: str, split: str) -> str:
        files, part, _ = find(data, split)
        return read_text(files, part, step.text_field)

    text = read(step.data, step.split)
    if isinstance(step, EvalStep):
        return "", text
    if step.eval_split is None and step.eval_data is None:
        cut = int(len(text) * (1 - step.eval_fraction))
        return text[:cut], text[cut:]
    return text, read(step.eval_data or step.data, step.eval_split or "validation")


def _blocks(tokenizer: Any, text: str, length: int, data: str) -> list[torch.Tensor]:
    """Consecutive blocks of `length` tokens; the rest is dropped."""
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    if len(tokens) < length:
        what = f"{data}: {len(tokens)} tokens are fewer than one block of {length}"
        raise InputError(374, what, mend="give more text or a smaller --max-length")
    return list(tokens[: len(tokens) // length * length].view(-1, length))


def _collate(blocks: list[torch.Tensor]) -> Batch:
    return {"input_ids": torch.stack(blocks)}  # (batch, tokens)


def _predict(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    ids = batch["input_ids"]
    logits = model(input_ids=ids).logits[:, :-1].float()  # (batch, tokens - 1, vocabulary)
    return logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1)
