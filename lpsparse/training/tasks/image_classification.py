"""image-classification: a Hugging Face folder, or a bare state dict in the module that --model-fn builds.
Metric: accuracy.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from lpsparse.checkpoint.open import Checkpoint
from lpsparse.errors import InputError, UsageError
from lpsparse.parallel import ranks
from lpsparse.steps.finetune import EvalStep, FinetuneStep, is_training
from lpsparse.training.data import class_names, find, split_folders
from lpsparse.training.images import Image, read_images
from lpsparse.training.labels import Classes, config_names, number
from lpsparse.training.model import Loaded, first_line, has_head, load_module, load_transformer, read_config
from lpsparse.training.pixels import View, check_sizes, same_channels, view_of
from lpsparse.training.tasks.base import Batch, Examples, Read, Task, draws, examples_of, write_head

_PAD = 4  # pixels of the usual CIFAR crop
_Example = tuple[Any, int]  # pixels of one image, as `same_channels` gives them; number of its class


def prepare(step: FinetuneStep | EvalStep, checkpoint: Checkpoint) -> Task:
    in_folder = checkpoint.root is not None and (checkpoint.root / "config.json").is_file()
    if step.model_fn is None and not in_folder:
        raise UsageError(
            243,
            "image-classification of a bare state dict needs --model-fn",
            hint="give MODULE:CALLABLE or FILE.py:CALLABLE",
        )
    examples, folders = _examples(step)
    return (_of_folder if step.model_fn is None else _of_module)(step, checkpoint, examples, folders)


def _examples(step: FinetuneStep | EvalStep) -> tuple[Examples[Image], bool]:
    """And whether all labels are names of folders."""
    kinds: list[bool] = []

    def read(data: str, split: str) -> Read[Image]:
        files, part, _ = find(data, split)
        splits = split_folders(data, files[0]) if files[0].is_dir() else []
        found = read_images(files, part, step.label_field, splits)
        kinds.append(found.folders)
        return Read(found.images, found.places, told=class_names(files, step.label_field))

    return examples_of(step, read), all(kinds)


def _of_folder(
    step: FinetuneStep | EvalStep, checkpoint: Checkpoint, examples: Examples[Image], folders: bool
) -> Task:
    """A Hugging Face vision model."""
    from transformers import AutoModelForImageClassification

    names = config_names(read_config(checkpoint), checkpoint)
    head = has_head(checkpoint, AutoModelForImageClassification)
    classes = number(examples.places, names, checkpoint, head=head, folders=folders, told=examples.told)
    examples.check(classes)
    loaded = load_transformer(checkpoint, AutoModelForImageClassification, classes.changes())
    if not step.trains and loaded.new:
        what = f"{checkpoint.name}: has no head to measure ({', '.join(loaded.new)})"
        raise InputError(399, what, hint="fine-tune it first")
    view = view_of(step, checkpoint, getattr(loaded.module.config, "image_size", None))
    channels, _ = ranks.run_on_rank_0(lambda: _fit(step, loaded.module, view, examples.all))
    task = _task(step, loaded, view, channels, classes, examples)
    return replace(task, sidecars=lambda folder: write_head(folder, loaded.module))


def _of_module(
    step: FinetuneStep | EvalStep, checkpoint: Checkpoint, examples: Examples[Image], folders: bool
) -> Task:
    """The task of a module that --model-fn builds; its outputs are counted, since they have no names."""
    assert step.model_fn is not None
    loaded, view = load_module(checkpoint, step.model_fn), view_of(step, checkpoint, None)
    channels, outputs = ranks.run_on_rank_0(lambda: _fit(step, loaded.module, view, examples.all))
    names = [f"LABEL_{i}" for i in range(outputs)]
    classes = number(examples.places, names, checkpoint, head=True, folders=folders)
    examples.check(classes)
    return _task(step, loaded, view, channels, classes, examples)


def _fit(
    step: FinetuneStep | EvalStep, module: nn.Module, view: View, images: Sequence[Image]
) -> tuple[int, int]:
    """Channels that the module takes, and its outputs, by an image. Gray may stand for colours."""
    if not view.any_size:
        check_sizes(images)
    most = max(images, key=lambda each: each.pixels.shape[2])
    own = most.pixels.shape[2]
    ways = [way for way in ((own, 3) if own == 1 else (own,)) if len(step.mean or (0.5,)) in (1, way)]
    if not ways:
        what = f"--mean has {len(step.mean or ())} values, images have {own} channels"
        raise UsageError(244, what, hint="one each")
    module.eval()
    failed: list[str] = []
    for channels in ways:
        try:
            with torch.no_grad():
                return channels, int(_logits(module, view.batch(same_channels([most], channels))).shape[-1])
        except (RuntimeError, ValueError) as error:
            failed.append(first_line(error))
    what = f"{most.where}: the module does not take images of {tuple(most.pixels.shape)}: {failed[0]}"
    raise InputError(398, what, hint="check the model, its preprocessor_config.json and the data")


def _task(
    step: FinetuneStep | EvalStep,
    loaded: Loaded,
    view: View,
    channels: int,
    classes: Classes,
    examples: Examples[Image],
) -> Task:
    def collate(batch: list[_Example]) -> Batch:
        return {"x": view.batch([pixels for pixels, _ in batch]), "y": torch.tensor([y for _, y in batch])}

    def numbered(images: list[Image]) -> list[_Example]:
        pixels = same_channels(images, channels)
        return [(own, classes.ids[image.label]) for own, image in zip(pixels, images, strict=True)]

    said = [f"pixels: {view.words} ({view.source})"]
    if view.bits == 8 and any(image.pixels.dtype != np.uint8 for image in examples.all):
        said.append("16-bit images are read with 8 bits, as the model's image processor takes no more")
    augment = _crop_flip if is_training(step) and step.augment == "crop-flip" else None
    return Task(
        loaded,
        numbered(examples.train),
        numbered(examples.held),
        collate,
        _predict,
        metric="accuracy",
        unit="images",
        augment=augment,
        notes=(*examples.notes, *classes.notes, *said),
        view=view.words,
    )


def _predict(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    return _logits(model, batch["x"]).float(), batch["y"]


def _logits(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    found = model(x)
    return found if isinstance(found, torch.Tensor) else found.logits


def _crop_flip(batch: Batch, seeds: list[int]) -> Batch:
    """Shift by up to 4 pixels and mirror, each image on its own;
    what comes in from outside is the mean (0)."""
    x = batch["x"]
    count, _, height, width = x.shape
    padded = nn.functional.pad(x, (_PAD,) * 4)
    chance = draws(seeds, 3, 1)[:, :, 0].to(x.device)  # (3, batch)
    top, left = (chance[:2] * (2 * _PAD + 1)).long()
    rows = top[:, None] + torch.arange(height, device=x.device)  # (batch, height)
    columns = left[:, None] + torch.arange(width, device=x.device)
    columns = torch.where(chance[2, :, None] < 0.5, columns.flip(1), columns)
    index = torch.arange(count, device=x.device)[:, None, None]
    cropped = padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]]  # (batch, h, w, c)
    return {**batch, "x": cropped.permute(0, 3, 1, 2)}
