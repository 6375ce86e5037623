"""Blocks of a running text: what the language-model tasks train and are measured on.

A text of LARGE bytes and more is never held in memory: it is tokenised line by line, once, into a file of
token ids beside the data, named by what it was made of, and read from there block by block.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lpsparse.checkpoint.files import write_text
from lpsparse.errors import InputError
from lpsparse.parallel import ranks
from lpsparse.parallel.progress import advance, phase
from lpsparse.steps.finetune import EvalStep, FinetuneStep, is_training
from lpsparse.training.data import find, held_out_of, read_text

LARGE = 32 * 2**20  # bytes
CACHE = ".lpsparse-tokens"  # folder beside the data
_PIECE = 2**20  # characters of a line read at once
_LINES = 2**12  # tokenised at once
_VERSION = 1
Ids = NDArray[np.integer[Any]]


class Blocks(Sequence[Tensor]):
    """Consecutive blocks of `length` tokens of a flat array of ids, int64; the rest is dropped."""

    def __init__(self, tokens: Ids, length: int) -> None:
        self.tokens, self.length = tokens, length

    def __len__(self) -> int:
        return len(self.tokens) // self.length

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        first = index % len(self) * self.length
        return torch.from_numpy(np.array(self.tokens[first : first + self.length], np.int64))


def make_blocks(
    step: FinetuneStep | EvalStep, tokenizer: Any, length: int
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Training and held-out blocks; without an eval split the last share of the training text is held out.
    All processes call it: one of them makes what is to be kept. Raises InputError for less than a block."""
    if not is_training(step):
        return (), _checked(_tokens(step, step.data, step.split, tokenizer), length, step.data)
    apart = held_out_of(step)
    if apart is None:
        train, held = _divided(step, tokenizer)
    else:
        train, held = _tokens(step, step.data, step.split, tokenizer), _tokens(step, *apart, tokenizer)
    return _checked(train, length, step.data), _checked(held, length, apart[0] if apart else step.data)


def _divided(step: FinetuneStep, tokenizer: Any) -> tuple[Ids, Ids]:
    """Split a small text by characters, a large one by tokens."""
    files, part, _ = find(step.data, step.split)
    if _is_large(files):
        tokens = _tokens(step, step.data, step.split, tokenizer)
        cut = int(len(tokens) * (1 - step.eval_fraction))
        return tokens[:cut], tokens[cut:]
    text = read_text(files, part, step.text_field)
    cut = int(len(text) * (1 - step.eval_fraction))
    return _encode(tokenizer, text[:cut]), _encode(tokenizer, text[cut:])


def _is_large(files: list[Path]) -> bool:
    return files[0].suffix == ".txt" and sum(path.stat().st_size for path in files) >= LARGE


def _checked(tokens: Ids, length: int, data: str) -> Blocks:
    if len(tokens) < length:
        what = f"{data}: {len(tokens)} tokens are fewer than one block of {length}"
        raise InputError(374, what, hint="give more text or a smaller --max-length")
    return Blocks(tokens, length)


def _encode(tokenizer: Any, text: str) -> Ids:
    with phase("tokenising", len(text), "characters"):
        return np.array(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], np.int64)


def _tokens(step: FinetuneStep | EvalStep, data: str, split: str, tokenizer: Any) -> Ids:
    files, part, _ = find(data, split)
    if not _is_large(files):
        return _encode(tokenizer, read_text(files, part, step.text_field))
    path = _kept(files, part, tokenizer)
    if ranks.rank() == 0 and not _is_whole(path):
        size = sum(path.stat().st_size for path in files)
        size = max(0, min(size, part.stop or size) - (part.start or 0))
        _write(path, _pieces(files, part), tokenizer, size)
    ranks.barrier()
    return np.memmap(path, np.uint32, mode="r")


def _is_whole(path: Path) -> bool:
    """Return whether the tokens are those that were written."""
    try:
        with path.open("rb") as file:
            return path.with_suffix(".sha256").read_text() == hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return False


def _kept(files: list[Path], part: slice, tokenizer: Any) -> Path:
    """The file for these tokens: beside the data, or where that is read-only in the folder for such files."""
    made_of = hashlib.sha256(f"{_VERSION} {part.start} {part.stop} ".encode())
    made_of.update(tokenizer.backend_tokenizer.to_str().encode())
    for path in files:
        with path.open("rb") as file:
            made_of.update(hashlib.file_digest(file, "sha256").digest())
    beside = files[0].parent
    own = Path.home() / ".cache" / "lpsparse"  # nobody else's, where the data's folder is read-only
    folder = beside / CACHE if os.access(beside, os.W_OK) else own / CACHE
    return folder / f"{made_of.hexdigest()}.u32"


def _write(path: Path, pieces: Iterator[str], tokenizer: Any, size: int) -> None:
    """`size`: about how many characters there are, for the progress."""
    path.parent.mkdir(exist_ok=True, parents=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    written = hashlib.sha256()
    try:
        with partial.open("wb") as file, phase("tokenising", size, "characters"):
            while lines := list(islice(pieces, _LINES)):
                for ids in tokenizer(lines, add_special_tokens=False, verbose=False)["input_ids"]:
                    raw = np.array(ids, np.uint32).tobytes()
                    written.update(raw)
                    file.write(raw)
                advance(sum(map(len, lines)), "characters")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        write_text(path.with_suffix(".sha256"), written.hexdigest())
    finally:
        partial.unlink(missing_ok=True)


def _pieces(files: list[Path], part: slice) -> Iterator[str]:
    """The text of files from character `part.start` to `part.stop`, in lines; a very long one is cut."""
    start, stop = part.start or 0, float("inf") if part.stop is None else part.stop
    seen = 0
    for path in files:
        for line in _lines(path):
            if seen + len(line) > start and seen < stop:
                yield line[max(0, start - seen) : int(min(len(line), stop - seen))]
            seen += len(line)
            if seen >= stop:
                return


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            while line := file.readline(_PIECE):
                yield line
    except UnicodeDecodeError as error:
        raise InputError(375, f"{path}: not UTF-8: {error.reason}", hint="convert it to UTF-8") from None
