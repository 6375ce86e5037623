"""Images from files: arrays, tables and folders. Nothing is unpickled."""

import io
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lpsparse.errors import InputError
from lpsparse.training.data import LABELS, field_of, parquet_rows


@dataclass(frozen=True, slots=True)
class Images:
    x: NDArray[np.uint8]  # (N, height, width, channels)
    y: NDArray[np.int64]  # (N,)


def read_images(files: list[Path], part: slice, label_field: str | None) -> Images:
    """Images and labels of an .npz (x, y), a parquet table (img or image,
    label) or a folder with a folder a class."""
    path = files[0]
    if path.is_dir():
        images = _image_folder(path)
    elif path.suffix == ".parquet":
        images = _image_rows(files, label_field)
    elif path.suffix == ".npz":
        images = _npz(path)
    else:
        raise InputError(383, f"{path}: no images", hint="give .npz (x, y), parquet or a folder of images")
    images = Images(images.x[part], images.y[part])
    if len(images.x) == 0:
        raise InputError(376, f"{path}: no images in it", hint="give a file with images")
    return images


def _npz(path: Path) -> Images:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as table:
            x, y = table["x"], table["y"]
    except (ValueError, OSError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise InputError(
            384, f"{path.name}: no arrays x and y to read: {error}", hint="save x and y"
        ) from None
    if x.dtype != np.uint8 or x.ndim not in (3, 4) or y.shape != x.shape[:1] or y.dtype.kind not in "iu":
        what = f"{path.name}: x is {x.dtype} {x.shape}, y is {y.dtype} {y.shape}"
        raise InputError(385, what, hint="x: uint8 (N, height, width[, channels]); y: integers (N,)")
    return Images(x if x.ndim == 4 else x[..., None], y.astype(np.int64))


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise InputError(381, "image files need pillow", hint="pip install 'lpsparse[data]'") from None
    return Image


def _open_image(where: str, file: Any) -> NDArray[np.uint8]:
    pillow = _pillow()
    try:
        with pillow.open(file) as image:
            return np.asarray(image.convert("L" if image.mode == "L" else "RGB"))
    except (OSError, ValueError, SyntaxError, pillow.DecompressionBombError) as error:
        raise InputError(386, f"{where}: not an image: {error}", hint="fix or drop the file") from None


def _stack(where: str, images: list[NDArray[np.uint8]], labels: list[int]) -> Images:
    shapes = {image.shape for image in images}
    if len(shapes) > 1:
        raise InputError(387, f"{where}: images of different sizes: {sorted(shapes)[:3]}", hint="resize them")
    x = np.stack(images) if images else np.zeros((0, 1, 1, 1), np.uint8)
    return Images(x if x.ndim == 4 else x[..., None], np.array(labels, np.int64))


def _image_folder(folder: Path) -> Images:
    """Classes are the folder names in sorted order; what is hidden is not looked at."""
    classes = _visible(path for path in folder.iterdir() if path.is_dir())
    images: list[NDArray[np.uint8]] = []
    labels: list[int] = []
    for label, group in enumerate(classes):
        for file in _visible(path for path in group.iterdir() if path.is_file()):
            images.append(_open_image(f"{group.name}/{file.name}", file))
            labels.append(label)
    return _stack(str(folder), images, labels)


def _visible(paths: Iterable[Path]) -> list[Path]:
    return sorted(path for path in paths if not path.name.startswith("."))


def _image_rows(files: list[Path], label_field: str | None) -> Images:
    images: list[NDArray[np.uint8]] = []
    labels: list[int] = []
    for path in files:
        for line, fields in parquet_rows(path):
            where = f"{path.name}:{line}"
            cell = field_of(where, fields, None, ("img", "image"), "--data of another form")
            label = field_of(where, fields, label_field, LABELS, "--label-field")
            if (
                not isinstance(cell, dict)
                or not isinstance(cell.get("bytes"), bytes)
                or not isinstance(label, int)
            ):
                raise InputError(377, f"{where}: image or label is missing", hint="fix or drop the row")
            images.append(_open_image(where, io.BytesIO(cell["bytes"])))
            labels.append(label)
    return _stack(files[0].name, images, labels)
