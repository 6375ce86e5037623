"""Images from files: arrays, tables and folders, as they are meant to be seen. Nothing is unpickled."""

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
from lpsparse.training.labels import first_places, label_of

Pixels = NDArray[np.uint8 | np.uint16]  # (height, width, channels); 0 is black, the dtype's most is white


@dataclass(frozen=True, slots=True)
class Image:
    where: str  # file, or file and row
    label: str
    pixels: Pixels


@dataclass(frozen=True, slots=True)
class Images:
    images: list[Image]  # of the part that was asked for
    places: dict[str, str]  # every label -> where it stands first: in all parts, of folders in all splits
    folders: bool  # whether the labels are names of folders


@dataclass(frozen=True, slots=True)
class _Entry:
    """An image that is not decoded yet."""

    where: str
    label: str
    file: Path | bytes


def read_images(
    files: list[Path], part: slice, label_field: str | None, splits: Iterable[Path] = ()
) -> Images:
    """Images and labels of an .npz (x, y), a parquet table (img or image, label) or a folder with a folder a
    class. The classes of a folder are those of all `splits` together."""
    path = files[0]
    if path.suffix == ".npz" and path.is_file():
        found = _npz(path)
        images, places = found[part], first_places(found)
    elif path.is_dir() or path.suffix == ".parquet":
        entries = _in_folder(path) if path.is_dir() else _in_rows(files, label_field)
        images = [Image(each.where, each.label, _decoded(each.where, each.file)) for each in entries[part]]
        places = _classes([path, *splits]) if path.is_dir() else first_places(entries)
    else:
        raise InputError(383, f"{path}: no images", hint="give .npz (x, y), parquet or a folder of images")
    if not images:
        raise InputError(376, f"{path}: no images in it", hint="give a file with images")
    return Images(images, places, path.is_dir())


def _npz(path: Path) -> list[Image]:
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
    x = x if x.ndim == 4 else x[..., None]
    return [
        Image(f"{path.name}: image {i}", str(label), pixels)
        for i, (pixels, label) in enumerate(zip(x, y.tolist(), strict=True))
    ]


def _classes(splits: Iterable[Path]) -> dict[str, str]:
    """The class folders of all splits, empty ones as well."""
    found: dict[str, str] = {}
    for split in splits:
        for folder in _visible(path for path in split.iterdir() if path.is_dir()):
            found.setdefault(folder.name, f"{split.name}/{folder.name}")
    return found


def _in_folder(folder: Path) -> list[_Entry]:
    """Class by class, in sorted order; what is hidden is not looked at."""
    return [
        _Entry(f"{folder.name}/{group.name}/{file.name}", group.name, file)
        for group in _visible(path for path in folder.iterdir() if path.is_dir())
        for file in _visible(path for path in group.iterdir() if path.is_file())
    ]


def _visible(paths: Iterable[Path]) -> list[Path]:
    return sorted(path for path in paths if not path.name.startswith("."))


def _in_rows(files: list[Path], label_field: str | None) -> list[_Entry]:
    entries: list[_Entry] = []
    for path in files:
        for line, fields in parquet_rows(path):
            where = f"{path.name}:{line}"
            cell = field_of(where, fields, None, ("img", "image"), "--data of another form")
            label = label_of(where, field_of(where, fields, label_field, LABELS, "--label-field"))
            if not isinstance(cell, dict) or not isinstance(cell.get("bytes"), bytes):
                raise InputError(377, f"{where}: the image is missing", hint="fix or drop the row")
            entries.append(_Entry(where, label, cell["bytes"]))
    return entries


def _decoded(where: str, file: Path | bytes) -> Pixels:
    """The picture upright, gray or in colours; what is transparent lies on white."""
    try:
        import PIL.Image
        import PIL.ImageOps
    except ImportError:
        raise InputError(381, "image files need pillow", hint="pip install 'lpsparse[data]'") from None
    try:
        with PIL.Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            return _as_array(where, PIL.ImageOps.exif_transpose(image))
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        raise InputError(386, f"{where}: not an image: {error}", hint="fix or drop the file") from None


def _as_array(where: str, image: Any) -> Pixels:
    import PIL.Image

    if image.mode[0] in "IF":  # more than 8 bits
        return _deep(where, image)
    gray = image.mode in ("1", "L", "LA", "La")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
    found = np.asarray(image.convert("L" if gray else "RGB"))
    return found[..., None] if gray else found


def _deep(where: str, image: Any) -> Pixels:
    """16 bits as they are. Pillow says I of 16 bits, too, and of files whose range nobody tells."""
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 0xFFFF:
        what = f"{where}: its values are of mode {image.mode}, from {values.min():g} to {values.max():g}"
        raise InputError(
            386, what, hint="save it with 8 or 16 bits: which values are black and white is not known"
        )
    return values.astype(np.uint16)[..., None]
