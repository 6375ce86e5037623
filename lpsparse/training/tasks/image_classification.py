"""image-classification: a Hugging Face folder, or a bare state dict in the module that --model-fn builds.
Metric: accuracy.
"""

from typing import Any

import torch
from torch import nn

from lpsparse import distributed
from lpsparse.checkpoint.opening import Checkpoint
from lpsparse.errors import InputError, UsageError
from lpsparse.recipe import EvalStep, FinetuneStep
from lpsparse.training.data import find, held_out_of
from lpsparse.training.images import Images, read_images
from lpsparse.training.model import Loaded, load_module, load_transformer, read_config
from lpsparse.training.tasks.base import Batch, Task, draws, hold_out, write_head

_PAD = 4  # pixels of the usual CIFAR crop


def prepare(step: FinetuneStep | EvalStep, checkpoint: Checkpoint) -> Task:
    train, held = _examples(step)
    in_folder = checkpoint.root is not None and (checkpoint.root / "config.json").is_file()
    if step.model_fn is None and not in_folder:
        raise UsageError(
            243, "image-classification of a bare state dict needs --model-fn",
            hint="give MODULE:CALLABLE or FILE.py:CALLABLE",
        )  # fmt: skip
    if step.model_fn is None:
        return _of_folder(step, checkpoint, train, held)
    loaded = load_module(checkpoint, step.model_fn)
    classes = distributed.of_first(lambda: _classes(loaded.module, (train or held)[0]))
    return _task(step, loaded, train, held, classes, None)


def _of_folder(
    step: FinetuneStep | EvalStep, checkpoint: Checkpoint, train: list[Any], held: list[Any]
) -> Task:
    """A Hugging Face vision model; its labels are those of its config, or with a fresh head 0, 1, 2, ..."""
    from transformers import AutoModelForImageClassification

    config = read_config(checkpoint)
    known: Any = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    asked = max(int(y) for _, y in (*train, *held)) + 1
    has_head = any(".".join(tensor.name.split(".")[:1]) == "classifier" for tensor in checkpoint.tensors)
    changes: dict[str, Any] = {} if has_head or asked <= len(known) else _numbered(asked)
    loaded = load_transformer(checkpoint, AutoModelForImageClassification, changes)
    if isinstance(step, EvalStep) and loaded.new:
        what = f"{checkpoint.name}: has no head to measure ({', '.join(loaded.new)})"
        raise InputError(399, what, hint="fine-tune it first")
    model: Any = loaded.module
    size: Any = getattr(model.config, "image_size", None)
    return _task(step, loaded, train, held, int(model.config.num_labels), size)


def _numbered(count: int) -> dict[str, Any]:
    names = {i: str(i) for i in range(count)}
    return {"num_labels": count, "id2label": names, "label2id": {name: i for i, name in names.items()}}


def _task(
    step: FinetuneStep | EvalStep, loaded: Loaded, train: list[Any], held: list[Any], classes: int, size: Any
) -> Task:
    """Images are brought to `size` (a number, or height and width) where the model knows one."""
    for x, y in (*train, *held):
        if not 0 <= y < classes:
            what = (
                f"{step.data}: label {y} of an image of {tuple(x.shape)} is outside the model's "
                f"{classes} classes"
            )
            raise InputError(349, what, hint="fix the labels")
    channels = train[0][0].shape[0] if train else held[0][0].shape[0]
    if len(step.mean) not in (1, channels):
        raise UsageError(
            244, f"--mean has {len(step.mean)} values, images have {channels} channels", hint="one each"
        )
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (step.mean, step.std))

    def collate(examples: list[tuple[torch.Tensor, int]]) -> Batch:
        x = torch.stack([image for image, _ in examples]).float() / 255  # (batch, channels, height, width)
        x = (x - mean) / std
        if size is not None:
            x = _resized(x, (size, size) if isinstance(size, int) else (int(size[0]), int(size[1])))
        return {"x": x, "y": torch.tensor([label for _, label in examples])}

    augment = _crop_flip if isinstance(step, FinetuneStep) and step.augment == "crop-flip" else None
    return Task(
        loaded, train, held, collate, _predict, metric="accuracy", unit="images", augment=augment,
        sidecars=None if step.model_fn else lambda folder: write_head(folder, loaded.module),
    )  # fmt: skip


def _resized(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    if tuple(x.shape[2:]) == size:
        return x
    return nn.functional.interpolate(x, size, mode="bilinear", antialias=True, align_corners=False)


def _examples(step: FinetuneStep | EvalStep) -> tuple[list[Any], list[Any]]:
    def read(data: str, split: str) -> list[tuple[torch.Tensor, int]]:
        files, part, _ = find(data, split)
        images: Images = read_images(files, part, step.label_field)
        pixels = torch.from_numpy(images.x).permute(0, 3, 1, 2)
        return list(zip(pixels, images.y.tolist(), strict=True))

    rows = read(step.data, step.split)
    if isinstance(step, EvalStep):
        return [], rows
    held = held_out_of(step)
    return hold_out(rows, step.eval_fraction, step.seed) if held is None else (rows, read(*held))


def _classes(module: nn.Module, example: tuple[torch.Tensor, int]) -> int:
    module.eval()
    try:
        with torch.no_grad():
            return int(module(example[0][None].float()).shape[-1])
    except RuntimeError as error:
        what = f"the module does not take images of {tuple(example[0].shape)}: {str(error).splitlines()[0]}"
        raise InputError(398, what, hint="check --model-fn and the data") from None


def _predict(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    found = model(batch["x"])
    return (found if isinstance(found, torch.Tensor) else found.logits).float(), batch["y"]


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
