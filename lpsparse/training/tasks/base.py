"""What every task hands to the loop."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lpsparse.checkpoint.opening import Checkpoint
from lpsparse.checkpoint.writer import write_json
from lpsparse.errors import InputError
from lpsparse.training.model import Loaded, first_line, quiet_transformers

Batch = dict[str, Tensor]


def rows_of(batch: Batch) -> int:
    return len(next(iter(batch.values())))


@dataclass(frozen=True, slots=True)
class Task:
    """A model with its data, ready to train and to measure."""

    loaded: Loaded
    train: Sequence[Any]  # examples; empty for eval
    held_out: Sequence[Any]
    collate: Callable[[list[Any]], Batch]
    predict: Callable[[nn.Module, Batch], tuple[Tensor, Tensor]]  # (count, classes) logits, (count,) labels
    metric: str  # accuracy or loss
    unit: str  # what a label stands for: rows, images, tokens
    length: Callable[[Any], int] | None = None  # to put examples of like length into one batch
    augment: Callable[[Batch, list[int]], Batch] | None = None  # with a seed for each example
    # The same of held-out batches, whose seeds are their places; none by default.
    measured: Callable[[Batch, list[int]], Batch] | None = None
    count: Callable[[Batch], int] = rows_of  # labels of a batch, as far as batches are weighed by them
    sidecars: Callable[[Path], None] | None = None  # files that the task changes in OUT (config.json)

    @property
    def higher_is_better(self) -> bool:
        return self.metric == "accuracy"


def hold_out(examples: Sequence[Any], fraction: float, seed: int) -> tuple[list[Any], list[Any]]:
    """Split at random, a pure function of the seed; at least one example on each side."""
    if len(examples) < 2:
        raise InputError(
            388, f"{len(examples)} example cannot be split", hint="give more data or --eval-data"
        )
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    held = max(1, min(len(examples) - 1, round(fraction * len(examples))))
    return [examples[i] for i in sorted(order[held:])], [examples[i] for i in sorted(order[:held])]


def tokenizer_of(checkpoint: Checkpoint) -> Any:
    """The folder's own tokenizer. Raises InputError when there is none."""
    from transformers import AutoTokenizer

    quiet_transformers()
    try:
        return AutoTokenizer.from_pretrained(checkpoint.root, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a broken file makes transformers stumble over anything
        what = f"{checkpoint.name}: no tokenizer: {first_line(error)}"
        raise InputError(389, what, hint="add or fix tokenizer.json") from None


def check_vocabulary(tokenizer: Any, rows: int, name: str) -> None:
    if len(tokenizer) > rows:
        what = f"{name}: the tokenizer has {len(tokenizer)} tokens, the embedding {rows} rows"
        raise InputError(399, what, hint="use the tokenizer of this checkpoint")


def draws(seeds: list[int], kinds: int, each: int) -> Tensor:
    """(kinds, examples, each) uniform random numbers; an example's follow from its own seed."""
    generator = torch.Generator()
    rows = [torch.rand(each, kinds, generator=generator.manual_seed(seed)) for seed in seeds]
    return torch.stack(rows).permute(2, 0, 1)  # a longer row begins with the same numbers


def write_head(folder: Path, model: Any, **more: Any) -> None:
    """config.json of OUT: the source's own, plus what a classification head changes, and `more`."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    table = {str(i): name for i, name in model.config.id2label.items()}
    changed = {
        "architectures": [type(model).__name__], "id2label": table,
        "label2id": {name: int(i) for i, name in table.items()},
        "problem_type": "single_label_classification", **more,
    }  # fmt: skip
    if any(config.get(key) != value for key, value in changed.items()):
        write_json(path, config | changed)
