"""masked-lm: a Hugging Face folder guesses hidden tokens of blocks of a text. Metric: loss, nats a hidden
token.

As BERT (Devlin et al. 2019, arXiv 1810.04805, section 3.1): 15 % of the tokens are to be guessed; of them
80 % become the mask, 10 % any token, 10 % stay. Drawn anew in every epoch for training; of the held-out
blocks once, from their place alone, so that every measurement is of the same tokens.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lpsparse.checkpoint.open import Checkpoint
from lpsparse.errors import InputError, UsageError
from lpsparse.steps.finetune import EvalStep, FinetuneStep
from lpsparse.training.model import load_transformer
from lpsparse.training.tasks.base import Batch, Task, check_vocabulary, draws, length_of, tokenizer_of
from lpsparse.training.tasks.blocks import make_blocks

SHARE = 0.15
_NOT = -100  # the label of what is not to be guessed


def prepare(step: FinetuneStep | EvalStep, checkpoint: Checkpoint) -> Task:
    from transformers import AutoModelForMaskedLM

    tokenizer = tokenizer_of(checkpoint)
    if tokenizer.mask_token_id is None:
        what = f"{checkpoint.name}: its tokenizer has no mask token"
        raise InputError(389, what, hint="use --task causal-lm, or fix the tokenizer")
    loaded = load_transformer(checkpoint, AutoModelForMaskedLM, {})
    if loaded.new:
        what = f"{checkpoint.name}: not a masked language model; missing {', '.join(loaded.new)}"
        raise InputError(396, what, hint="check --task")
    model: Any = loaded.module
    rows = model.get_input_embeddings().weight.shape[0]
    check_vocabulary(tokenizer, rows, checkpoint.name)
    mask = _mask(tokenizer, rows)
    marks = [token for token in (tokenizer.cls_token_id, tokenizer.sep_token_id) if token is not None]
    length = length_of(step, model, checkpoint.name) - len(marks)
    if length < 1:
        what = f"--max-length {step.max_length} leaves no token between the marks"
        raise UsageError(253, what, hint="give a larger one")
    train, held = make_blocks(step, tokenizer, length)
    frame = _frame(tokenizer)

    def collate(blocks: list[Tensor]) -> Batch:
        return {"input_ids": torch.stack([frame(block) for block in blocks])}  # (batch, tokens)

    return Task(
        loaded,
        train,
        held,
        collate,
        _predict,
        metric="loss",
        unit="tokens",
        augment=mask,
        count=_hidden,
        measured=mask,
    )


def _frame(tokenizer: Any) -> Any:
    """A block between the marks of a text, as far as the tokenizer has them."""
    ends = (tokenizer.cls_token_id, tokenizer.sep_token_id)
    first, last = (torch.tensor([] if token is None else [token], dtype=torch.int64) for token in ends)
    return lambda block: torch.cat([first, block, last])


def _mask(tokenizer: Any, vocabulary: int) -> Any:
    special = torch.tensor(sorted(tokenizer.all_special_ids))

    def mask(batch: Batch, seeds: list[int]) -> Batch:
        ids = batch["input_ids"]  # (batch, tokens)
        chance, kind, other = draws(seeds, 3, ids.shape[1]).to(ids.device)
        chance = chance.masked_fill(torch.isin(ids, special.to(ids.device)), 2.0)
        chosen = (chance < SHARE) | (chance == chance.min(1, keepdim=True).values)  # one at least
        hidden = torch.where(kind < 0.8, tokenizer.mask_token_id, ids)
        hidden = torch.where(kind >= 0.9, (other * vocabulary).long(), hidden)
        return {"input_ids": torch.where(chosen, hidden, ids), "labels": torch.where(chosen, ids, _NOT)}

    return mask


def _hidden(batch: Batch) -> int:
    return int((batch["labels"] != _NOT).sum())


def _predict(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    chosen = batch["labels"] != _NOT
    return model(input_ids=batch["input_ids"]).logits[chosen].float(), batch["labels"][chosen]
