"""causal-lm: next-token loss of a Hugging Face folder on blocks of a text. Metric: loss, nats a token."""

from typing import Any

import torch
from torch import nn

from lpsparse.checkpoint.open import Checkpoint
from lpsparse.errors import InputError
from lpsparse.steps.finetune import EvalStep, FinetuneStep
from lpsparse.training.model import load_transformer
from lpsparse.training.tasks.base import Batch, Task, check_vocabulary, length_of, tokenizer_of
from lpsparse.training.tasks.blocks import make_blocks


def prepare(step: FinetuneStep | EvalStep, checkpoint: Checkpoint) -> Task:
    from transformers import AutoModelForCausalLM

    tokenizer = tokenizer_of(checkpoint)
    loaded = load_transformer(checkpoint, AutoModelForCausalLM, {})
    if loaded.new:
        what = f"{checkpoint.name}: not a language model; missing {', '.join(loaded.new)}"
        raise InputError(396, what, hint="check --task")
    model: Any = loaded.module
    check_vocabulary(tokenizer, model.get_input_embeddings().weight.shape[0], checkpoint.name)
    length = length_of(step, model, checkpoint.name)
    train, held = make_blocks(step, tokenizer, length)
    return Task(loaded, train, held, _collate, _predict, metric="loss", unit="tokens")


def _collate(blocks: list[torch.Tensor]) -> Batch:
    return {"input_ids": torch.stack(blocks)}  # (batch, tokens)


def _predict(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    ids = batch["input_ids"]
    logits = model(input_ids=ids).logits[:, :-1].float()  # (batch, tokens - 1, vocabulary)
    return logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1)
