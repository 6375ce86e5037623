"""The record that every task gives to the loop, and what tasks share."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from lpsparse.checkpoint.files import write_json
from lpsparse.checkpoint.open import Checkpoint
from lpsparse.errors import InputError, UsageError
from lpsparse.steps.finetune import EvalStep, FinetuneStep, is_training
from lpsparse.training.data import held_out_of
from lpsparse.training.labels import Classes, Labelled, check_rows, unseen
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
    notes: tuple[str, ...] = ()  # how the data were understood
    view: str = ""  # in words, what is done to an image before the model sees it

    @property
    def higher_is_better(self) -> bool:
        return self.metric == "accuracy"


E = TypeVar("E", bound=Labelled)


@dataclass(frozen=True, slots=True)
class Read(Generic[E]):
    """The examples of one split."""

    examples: list[E]  # of the part that was asked for
    places: dict[str, str]  # every label of the split -> where it stands first
    notes: tuple[str, ...] = ()
    told: tuple[str, ...] = ()  # names that the data give to numbers


@dataclass(frozen=True, slots=True)
class Examples(Generic[E]):
    """Labelled examples, looked through before anything is trained."""

    train: list[E]
    held: list[E]
    places: dict[str, str]  # every label of all that was read -> where it stands first
    notes: tuple[str, ...]
    told: tuple[str, ...]  # names that the data give to numbers
    shared: bool = False  # whether those held out were set aside from those that train

    @property
    def all(self) -> list[E]:
        return [*self.train, *self.held]

    def check(self, classes: Classes) -> None:
        """Raises InputError for classes that cannot be learnt from these examples."""
        if self.train:
            check_rows(classes, self.train, self.held, shared=self.shared)


def examples_of(step: FinetuneStep | EvalStep, read: Callable[[str, str], Read[E]]) -> Examples[E]:
    """Those that train and those that are held out (the only ones, for `eval`), with the labels of both."""
    first = read(step.data, step.split)
    if not is_training(step):
        return Examples([], first.examples, first.places, first.notes, first.told)
    apart = held_out_of(step)
    if apart is None:
        train, held = hold_out(first.examples, step.eval_fraction, step.seed)
        notes = (*first.notes, *unseen(first.examples, first.places))
        return Examples(train, held, first.places, notes, first.told, shared=True)
    other = read(*apart)
    if first.told and other.told and first.told != other.told:
        what = f"{apart[1]} of {apart[0]} gives other names to the numbers of its labels than {step.data}"
        raise InputError(349, what, hint="write the labels as names")
    places = other.places | first.places
    notes = (*first.notes, *other.notes, *unseen(first.examples, places))
    return Examples(first.examples, other.examples, places, notes, first.told or other.told)


def hold_out(examples: Sequence[E], fraction: float, seed: int) -> tuple[list[E], list[E]]:
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


def length_of(step: FinetuneStep | EvalStep, model: Any, name: str) -> int:
    """Most tokens of a row or block: --max-length, as far as it is the default within the model's positions.

    Raises UsageError for a --max-length above them, InputError for a model that has fewer than two.
    """
    most = _positions(model)
    if most is None or step.max_length <= most:
        return step.max_length
    if most < 2:
        what = f"{name}: config.json: max_position_embeddings leaves {most} positions"
        raise InputError(392, what, hint="fix config.json")
    if "max_length" in step.model_fields_set:
        what = f"--max-length {step.max_length}: {name} has {most} positions"
        raise UsageError(253, what, hint=f"give --max-length {most} or less")
    return most


def _positions(model: Any) -> int | None:
    """Tokens that the model has positions for; None where it does not say. Models like RoBERTa count from
    behind the place of padding, which is a row of the table of positions."""
    most: Any = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(most, int):
        return None
    words = model.get_input_embeddings()
    for part in model.modules():
        if isinstance(part, nn.Embedding) and part is not words and part.num_embeddings == most:
            return most if part.padding_idx is None else most - part.padding_idx - 1
    return most


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
        "architectures": [type(model).__name__],
        "id2label": table,
        "label2id": {name: int(i) for i, name in table.items()},
        "problem_type": "single_label_classification",
        **more,
    }
    if "num_labels" in config:  # transformers takes it before the table
        changed["num_labels"] = len(table)
    if any(config.get(key) != value for key, value in changed.items()):
        write_json(path, config | changed)
