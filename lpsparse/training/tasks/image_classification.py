"""image-classification: a bare state dict in the module that --model-fn builds. Metric: accuracy."""

from typing import Any

import torch
from torch import nn

from lpsparse.checkpoint.opening import Checkpoint
from lpsparse.errors import InputError, UsageError
from lpsparse.recipe import EvalStep, FinetuneStep
from lpsparse.training.data import find
from lpsparse.training.images import Images, read_images
from lpsparse.training.model import load_module
from lpsparse.training.tasks.base import Batch, Task, hold_out

_PAD = 4  # pixels of the usual CIFAR crop


def prepare(step: FinetuneStep | EvalStep, checkpoint: Checkpoint) -> Task:
    if step.model_fn is None:
        raise UsageError(
            243, "image-classification needs --model-fn", mend="give MODULE:CALLABLE or FILE.py:CALLABLE"
        )
    train, held = _examples(step)
    loaded = load_module(checkpoint, step.model_fn)
    classes = _classes(loaded.module, (train or held)[0])
    for x, y in (*train, *held):
        if not 0 <= y < classes:
            what = (
                f"{step.data}: label {y} of an image of {tuple(x.shape)} is outside the model's "
                f"{classes} classes"
            )
            raise InputError(400, what, mend="mend the labels")
    channels = train[0][0].shape[0] if train else held[0][0].shape[0]
    if len(step.mean) not in (1, channels):
        raise UsageError(
            244, f"--mean has {len(step.mean)} values, images have {channels} channels", mend="one each"
        )
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (step.mean, step.std))

    def collate(examples: list[tuple[torch.Tensor, int]]) -> Batch:
        x = torch.stack([image for image, _ in examples]).float() / 255  # (batch, channels, height, width)
        return {"x": (x - mean) / std, "y": torch.tensor([label for _, label in examples])}

    augment = _crop_flip if isinstance(step, FinetuneStep) and step.augment == "crop-flip" else None
    return Task(loaded, train, held, collate, _predict, metric="accuracy", unit="images", augment=augment)


def _examples(step: FinetuneStep | EvalStep) -> tuple[list[Any], list[Any]]:
    def read(data: str, split: str) -> list[tuple[torch.Tensor, int]]:
        files, part, _ = find(data, split)
        images: Images = read_images(files, part, step.label_field)
        pixels = torch.from_numpy(images.x).permute(0, 3, 1, 2)
        return list(zip(pixels, images.y.tolist(), strict=True))

    rows = read(step.data, step.split)
    if isinstance(step, EvalStep):
        return [], rows
    if step.eval_split is None and step.eval_data is None:
        return hold_out(rows, step.eval_fraction, step.seed)
    return rows, read(step.eval_data or step.data, step.eval_split or "validation")


def _classes(module: nn.Module, example: tuple[torch.Tensor, int]) -> int:
    module.eval()
    try:
        with torch.no_grad():
            return int(module(example[0][None].float()).shape[-1])
    except RuntimeError as error:
        what = f"the module does not take images of {tuple(example[0].shape)}: {str(error).splitlines()[0]}"
        raise InputError(398, what, mend="check --model-fn and the data") from None


def _predict(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    return model(batch["x"]).float(), batch["y"]


def _crop_flip(batch: Batch, generator: torch.Generator) -> Batch:
    """Shift by up to 4 pixels and mirror, each image on its own;
    what comes in from outside is the mean (0)."""
    x = batch["x"]
    count, _, height, width = x.shape
    padded = nn.functional.pad(x, (_PAD,) * 4)
    top, left = torch.randint(0, 2 * _PAD + 1, (2, count), generator=generator)
    rows = top[:, None] + torch.arange(height)  # (batch, height)
    columns = left[:, None] + torch.arange(width)
    flip = torch.rand(count, generator=generator) < 0.5
    columns = torch.where(flip[:, None], columns.flip(1), columns)
    index = torch.arange(count)[:, None, None]
    cropped = padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]]  # (batch, h, w, c)
    return {**batch, "x": cropped.permute(0, 3, 1, 2)}
