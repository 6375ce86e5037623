"""From decoded images to what a model sees: as its preprocessor_config.json says, else mean and std alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lpsparse.checkpoint.open import Checkpoint
from lpsparse.errors import InputError
from lpsparse.steps.finetune import EvalStep, FinetuneStep
from lpsparse.training.images import Image, Pixels
from lpsparse.training.model import first_line, quiet_transformers

_RECORDS = (  # settings that are none of pixels
    "image_processor_type",
    "feature_extractor_type",
    "processor_class",
    "auto_map",
    "transformers_version",
)
_DEFAULT = (0.5,)  # mean and std where nobody says
_ODD_SIZES = ((37, 53), (53, 37))
_RESAMPLING = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # Pillow's, by number


@dataclass(frozen=True, slots=True)
class View:
    """How images become what the model sees."""

    batch: Callable[[Sequence[Pixels]], Tensor]  # (height, width, channels) each -> (batch, channels, h, w)
    words: str  # what is done to an image
    source: str  # who says so
    any_size: bool  # whether images of all sizes come out alike
    bits: int  # of a sample that it can tell apart


def view_of(step: FinetuneStep | EvalStep, checkpoint: Checkpoint, size: Any) -> View:
    """The view of the model's own settings, with --mean and --std over them. Without such settings images are
    brought to `size` (a number, or height and width) where the model knows one."""
    said = _settings(checkpoint.root)
    return _plain(step, size) if said is None else _own(step, said)


def _settings(root: Path | None) -> Path | None:
    """The file that says how images are made ready, if there is one."""
    if root is None:
        return None
    own, shared = root / "preprocessor_config.json", root / "processor_config.json"
    if own.is_file():
        return own
    # One for several kinds of input has its own table for images.
    return (
        shared if shared.is_file() and '"image_processor"' in shared.read_text("utf-8", "replace") else None
    )


def _plain(step: FinetuneStep | EvalStep, size: Any) -> View:
    mean, std = (torch.tensor(value or _DEFAULT).view(1, -1, 1, 1) for value in (step.mean, step.std))
    target = None if size is None else (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))

    def alike(pixels: Pixels) -> Tensor:  # (batch, height, width, channels)
        x = torch.from_numpy(pixels.astype(np.float32)).permute(0, 3, 1, 2).contiguous()
        x = (x / np.iinfo(pixels.dtype).max - mean) / std
        if target is None or tuple(x.shape[2:]) == target:
            return x
        return nn.functional.interpolate(x, target, mode="bilinear", antialias=True, align_corners=False)

    def batch(images: Sequence[Pixels]) -> Tensor:
        if len({(each.shape, each.dtype) for each in images}) == 1:
            return alike(np.stack(images))
        return torch.cat([alike(each[None]) for each in images])

    words = f"mean {_numbers(step.mean or _DEFAULT)}, std {_numbers(step.std or _DEFAULT)}"
    words += "" if target is None else f", {target[0]} x {target[1]} pixels (bilinear)"
    source = _flags(step) or "no preprocessor_config.json"
    return View(batch, words, source, target is not None, bits=16)


def _own(step: FinetuneStep | EvalStep, said: Path) -> View:
    """As transformers' image processors do it, with Pillow and without torchvision."""
    processor = _processor(said, _overridden(step))

    def batch(images: Sequence[Pixels]) -> Tensor:
        found = processor(
            [_eight_bits(each) for each in images], return_tensors="pt", input_data_format="channels_last"
        )
        if set(found) != {"pixel_values"}:
            what = f"{said}: gives {', '.join(sorted(found))}, and only pixel_values are used here"
            raise InputError(392, what, hint="give a model that takes an image alone")
        return found["pixel_values"].float()

    source = ", ".join([said.name, *filter(None, [_flags(step)])])
    unused = [key for key in _unknown(processor) if not key.startswith(("_", "do_"))]
    source += f"; not used there: {', '.join(unused)}" if unused else ""
    return View(batch, _in_words(processor.to_dict()), source, _any_size(batch), bits=8)


def _processor(said: Path, changes: dict[str, Any]) -> Any:
    quiet_transformers()
    try:
        from PIL import Image as _  # noqa: F401
        from transformers import AutoImageProcessor
    except ImportError:
        raise InputError(381, f"{said.name} needs pillow", hint="pip install 'lpsparse[data]'") from None
    try:
        processor: Any = AutoImageProcessor.from_pretrained(
            said.parent, backend="pil", local_files_only=True, trust_remote_code=False, **changes
        )
    except Exception as error:  # a broken file makes transformers stumble over anything
        raise InputError(
            392, f"{said}: {first_line(error)}", hint="fix it, or remove it and give --mean and --std"
        ) from None
    lost = [key for key in _unknown(processor) if key.startswith("do_")]
    if lost:
        what = f"{said}: {', '.join(lost)}: {type(processor).__name__} does no such thing"
        raise InputError(392, what, hint="fix image_processor_type, or take it out")
    return processor


def _unknown(processor: Any) -> list[str]:
    """Settings of the file that mean nothing to the processor that it names."""
    settings, kind = processor.to_dict(), type(processor)
    known = {key for key in settings if hasattr(kind, key)}.union(_RECORDS)
    return [key for key, value in settings.items() if value and key not in known]


def _overridden(step: FinetuneStep | EvalStep) -> dict[str, Any]:
    """Settings of the file, replaced by flags; one value stands for all channels."""
    given = {"image_mean": step.mean, "image_std": step.std}
    found = {key: value[0] if len(value) == 1 else list(value) for key, value in given.items() if value}
    return {"do_normalize": True, **found} if found else {}


def _flags(step: FinetuneStep | EvalStep) -> str:
    return " and ".join(["--mean"] * bool(step.mean) + ["--std"] * bool(step.std))


def _eight_bits(pixels: Pixels) -> Any:
    """What image processors resize."""
    return pixels if pixels.dtype == np.uint8 else np.round(pixels / 257).astype(np.uint8)


def _any_size(batch: Callable[[Sequence[Pixels]], Tensor]) -> bool:
    for channels in (3, 1):
        try:
            shapes = {batch([np.zeros((*size, channels), np.uint8)]).shape for size in _ODD_SIZES}
        except Exception:  # it takes other channels, or nothing at all: the first image tells
            continue
        return len(shapes) == 1
    return False


def _in_words(settings: dict[str, Any]) -> str:
    """What is done to an image, in order."""
    parts: list[str] = []
    if settings.get("do_resize"):
        number = int(settings.get("resample", -1))
        how = _RESAMPLING[number] if 0 <= number < len(_RESAMPLING) else str(number)
        parts.append(f"resize to {_size(settings.get('size'))} ({how})")
    if settings.get("do_center_crop"):
        parts.append(f"crop to {_size(settings.get('crop_size'))}")
    if settings.get("do_rescale"):
        parts.append(f"times {settings.get('rescale_factor', 1):.4g}")
    if settings.get("do_normalize"):
        mean, std = (np.atleast_1d(settings.get(key) or 0).tolist() for key in ("image_mean", "image_std"))
        parts.append(f"mean {_numbers(mean)}, std {_numbers(std)}")
    usual = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")
    parts += [key for key, on in settings.items() if key.startswith("do_") and on and key not in usual]
    parts += [
        f"{key} {settings[key]}" for key in ("crop_pct", "include_top", "rescale_offset") if settings.get(key)
    ]
    return ", ".join(parts) or "as they are"


def _size(size: Any) -> str:
    if isinstance(size, dict) and {"height", "width"} <= set(size):
        return f"{size['height']} x {size['width']} pixels"
    return ", ".join(f"{key} {value}" for key, value in size.items()) if isinstance(size, dict) else str(size)


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.6g}" for value in values)


def same_channels(images: Sequence[Image], channels: int) -> list[Pixels]:
    """The pixels of each with `channels`; gray is as much of each colour. Raises InputError for colours where
    one channel is wanted."""
    return [_with_channels(each, channels) for each in images]


def _with_channels(image: Image, channels: int) -> Pixels:
    own = image.pixels.shape[2]
    if own == channels:
        return image.pixels
    if own != 1:
        what = f"{image.where}: has {own} channels, and the model takes {channels}"
        raise InputError(398, what, hint="convert the images")
    return np.broadcast_to(image.pixels, (*image.pixels.shape[:2], channels))


def check_sizes(images: Sequence[Image]) -> None:
    """Raises InputError for an image of another size than the first."""
    first = images[0]
    for each in images:
        if each.pixels.shape[:2] != first.pixels.shape[:2]:
            (h, w), (height, width) = each.pixels.shape[:2], first.pixels.shape[:2]
            what = f"{each.where}: has {h} x {w} pixels, {first.where} has {height} x {width}"
            raise InputError(387, what, hint="resize them to one size")
