"""Safetensors headers, checked before anything is believed: hostile and broken files stop here.

Format: 8 bytes little-endian header length, JSON header, tensor data. Every rule of the format's README is
checked, and two that the reference reader leaves out: duplicate names and the number of tensors.
"""

import json
import math
import os
import re
import stat
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lpsparse.checkpoint.dtypes import DTYPES
from lpsparse.errors import InputError

MAX_HEADER_BYTES = 100_000_000  # the reference reader's cap
_MAX_TABLE_BYTES = 10_000_000
MAX_TENSORS = 500_000  # 700,000 empty tensors took the reference reader 6 s to open
MAX_TENSORS_VARIABLE = "LPSPARSE_MAX_TENSORS"
MAX_DIMENSIONS = 64  # numpy's

Read = Callable[[int, int], bytes]  # (first byte, count)
_DOWNLOAD_AGAIN = "download or copy the file again"
_SAFETENSORS = "use the safetensors form of this model"
_TORCH = "give it the suffix .pt and try again"
# How files of other formats begin, told from a safetensors file that was cut short, which may begin with the
# same bytes: of its eight bytes of length the last four are zero.
_NOT_WEIGHTS: tuple[tuple[bytes, str, str], ...] = (
    (
        rb"version https://git-lfs(?:[^\0]*\nsize (\d{1,19})\n)?",
        "a Git LFS pointer, not the weights",
        "run `git lfs pull` in that repository",
    ),
    (rb"GGUF", "a GGUF file, not safetensors", _SAFETENSORS),
    (rb"PK\x03\x04", "a zip archive (a torch file?), not safetensors", _TORCH),
    (rb"\x80[\x01-\x05][^\0]", "a pickle (a torch file?), not safetensors", _TORCH),
    (rb"\x89HDF", "an HDF5 file, not safetensors", _SAFETENSORS),
    # An ONNX model: the version of its format, then one of its other fields, such as what wrote it.
    (
        rb"\x08[\x01-\x7f][\x12\x1a\x22\x2a\x32\x3a\x42][^\0]{5}",
        "a protobuf (an ONNX model?), not safetensors",
        _SAFETENSORS,
    ),
    (rb"<[^\0]{1,7}\Z|<[^\0]{7}", "an HTML or XML page, not weights", _DOWNLOAD_AGAIN),
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of one safetensors file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    nbytes: int


@dataclass(frozen=True, slots=True)
class Header:
    entries: tuple[Entry, ...]  # in the order of their bytes
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """The checked header of a safetensors file. Reads no weights.

    Raises InputError naming the file, the tensor and the numbers.
    """
    size = check_regular(path)
    with path.open("rb") as file:

        def read(first: int, count: int) -> bytes:
            file.seek(first)
            return file.read(count)

        return check_header(path, size, read)


def check_header(path: Path, size: int, read: Read) -> Header:
    """`read_header` for a file of `size` bytes anywhere; errors name it `path`."""
    length = int.from_bytes(read(0, min(8, size)), "little")
    if size < 8 or length > MAX_HEADER_BYTES or 8 + length > size:
        sniff(
            path, read(0, min(512, size))
        )  # only now: a header of 60 or 128 bytes begins like XML or pickle
    if size < 8:
        what = f"{path}: {size} bytes: the copy or download did not finish"
        raise InputError(301, what, hint=_DOWNLOAD_AGAIN)
    if length > MAX_HEADER_BYTES:
        what = f"{path}: declares a header of {length} bytes, the cap is {MAX_HEADER_BYTES}: not safetensors"
        raise InputError(302, what, hint=_DOWNLOAD_AGAIN)
    if 8 + length > size:
        what = f"{path}: truncated: header needs {8 + length} bytes, the file has {size}"
        raise InputError(303, what, hint=_DOWNLOAD_AGAIN)
    text = read(8, length)
    # Parsed, so many would be gigabytes. A tensor's entry has four colons and two lists.
    colons, lists = text.count(b":"), text.count(b"[")
    _check_count(path, max(text.count(b'"data_offsets"'), colons // 5, lists // 3))
    table = _parse(path, text)
    metadata = _metadata(path, table.pop("__metadata__", {}))
    _check_count(path, len(table))
    entries: list[Entry] = []
    while table:  # what is parsed goes as the entries come
        entries.append(_entry(path, *table.popitem(), 8 + length))
    entries.sort(key=_by_offset)
    _check_cover(path, entries, 8 + length, size)
    return Header(tuple(entries), metadata)


def _check_count(path: Path, tensors: int) -> None:
    given = os.environ.get(MAX_TENSORS_VARIABLE, "")
    cap = int(given) if given.isdecimal() else MAX_TENSORS
    if tensors > cap:
        hint = f"split the file, or raise the cap if you trust it: {MAX_TENSORS_VARIABLE}={tensors}"
        raise InputError(304, f"{path}: {tensors} tensors, the cap is {cap}", hint=hint)


def check_regular(path: Path) -> int:
    """Size in bytes of a regular, readable file; a FIFO,
    folder, dangling link or unreadable file is refused."""
    try:
        info = path.stat()
        if stat.S_ISREG(info.st_mode):
            path.open("rb").close()
    except OSError as error:
        link = f" (a link to {os.readlink(path)})" if os.path.islink(path) else ""
        raise InputError(
            305, f"{path}{link}: {error.strerror}", hint="check the path and its permissions"
        ) from error
    if not stat.S_ISREG(info.st_mode):
        raise InputError(306, f"{path}: not a regular file", hint="give a weight file or a model folder")
    return info.st_size


def sniff(path: Path, head: bytes) -> None:
    """Name what a file really is when its first bytes belong to another format."""
    for beginning, what, hint in _NOT_WEIGHTS:
        found = re.match(beginning, head)
        if found is not None:
            size = f" (their size: {int(found[1])} bytes)" if found.lastindex else ""
            raise InputError(307, f"{path}: {what}{size}", hint=hint)


def _by_offset(entry: Entry) -> tuple[int, int, str]:
    return entry.offset, entry.nbytes, entry.name


def json_table(path: Path) -> dict[str, Any]:
    """The object in a small JSON file beside weights; empty if it is missing or cannot be read."""
    try:
        if not path.is_file() or path.stat().st_size > _MAX_TABLE_BYTES:
            return {}
        found: Any = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def unique_json(text: bytes | str) -> Any:
    """Parsed JSON in UTF-8 in which no object repeats a key.
    Raises ValueError (RecursionError becomes one too)."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(items)
        if len(table) != len(items):
            seen: dict[str, int] = {}
            n, again = next((n, key) for n, (key, _) in enumerate(items, 1) if seen.setdefault(key, n) != n)
            raise ValueError(f"duplicate key {again!r}, at {seen[again]} and {n} of {len(items)}")
        "".join(
            word for item in items for word in item if isinstance(word, str)
        ).encode()  # "\\ud800" is no text
        return table

    try:
        text = text.decode() if isinstance(text, bytes) else text
        return json.loads(text, object_pairs_hook=pairs, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("nested too deep") from None


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is no JSON")


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    try:
        table = unique_json(text)
    except ValueError as error:  # also UnicodeDecodeError and JSONDecodeError
        raise InputError(308, f"{path}: header is not valid: {error}", hint=_DOWNLOAD_AGAIN) from None
    if not isinstance(table, dict):
        raise InputError(
            309, f"{path}: header is a JSON {type(table).__name__}, not an object", hint=_DOWNLOAD_AGAIN
        )
    return table  # pyright: ignore[reportUnknownVariableType]


def _metadata(path: Path, value: Any) -> dict[str, str]:
    if isinstance(value, dict) and all(isinstance(text, str) for text in value.values()):
        return value
    raise InputError(310, f"{path}: __metadata__ is not a table of strings", hint="write the file again")


def _entry(path: Path, name: str, value: Any, data_start: int) -> Entry:
    def refuse(why: str) -> InputError:
        return InputError(
            311, f"{path}: {name!r}: {why}", hint="write the file again with a current safetensors"
        )

    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise refuse("header entry is not {dtype, shape, data_offsets}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise refuse(f"unknown dtype {dtype!r}")
    if not _is_counts(shape):
        raise refuse(f"shape {shape!r} is not a list of sizes")
    if not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise refuse(f"data_offsets {offsets!r} are not [begin, end]")
    if len(shape) > MAX_DIMENSIONS or math.prod(max(n, 1) for n in shape) >= 2**60:
        raise refuse(f"shape {shape} has more than {MAX_DIMENSIONS} dimensions or 2**60 values")
    bits = math.prod(shape) * DTYPES[dtype].bits
    nbytes = offsets[1] - offsets[0]
    if bits != nbytes * 8:
        raise refuse(f"{dtype} of shape {shape} needs {bits / 8:g} bytes, data_offsets give {nbytes}")
    # The same names come again with the file in OUT, its manifest and its report.
    return Entry(sys.intern(name), sys.intern(dtype), tuple(shape), data_start + offsets[0], nbytes)


def _is_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _check_cover(path: Path, entries: list[Entry], start: int, size: int) -> None:
    """Tensors lie one after another, without hole or overlap, up to the last byte of the file."""
    position, before = start, "the header"
    for entry in entries:
        if entry.offset != position:
            kind = "overlaps" if entry.offset < position else "leaves a hole after"
            raise InputError(
                312, f"{path}: {entry.name!r} {kind} {before}, at byte {entry.offset}", hint=_DOWNLOAD_AGAIN
            )
        position, before = position + entry.nbytes, repr(entry.name)
    if position > size:
        cut = next(entry.name for entry in entries if entry.offset + entry.nbytes > size)
        what = f"{path}: truncated: {position - size} bytes missing, first cut tensor {cut!r}"
        raise InputError(303, what, hint=_DOWNLOAD_AGAIN)
    if position < size:
        what = f"{path}: {size - position} bytes follow the last tensor"
        raise InputError(313, what, hint=_DOWNLOAD_AGAIN)
