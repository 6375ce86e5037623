"""A safetensors file that is written: where its tensors lie, and bytes that are on the disk in the end."""

import ctypes
import json
import math
import os
from collections.abc import Iterable
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Self

import numpy as np

from lpsparse.checkpoint.dtypes import DTYPES, Bits
from lpsparse.checkpoint.header import Entry

_AHEAD = 16 << 20  # bytes that are written before the disk is set to work
_WRITE = 2  # SYNC_FILE_RANGE_WRITE of sync_file_range(2)

Named = tuple[str, str, tuple[int, ...]]  # name, dtype, shape
Part = tuple[str, int, Bits]  # name, first storage unit, values


class WeightFile:
    """A safetensors file that is written: bytes after the header at any place, each once, the header last, in
    the `room` that was left for it. Of a file that is there already, only what is others is written."""

    def __init__(self, path: Path, room: int) -> None:
        self._file = path.open("r+b" if path.exists() else "x+b", buffering=0)
        self._size = self._file.seek(0, os.SEEK_END)
        self._room = room
        self._given = 0
        self.changed = False  # whether anything had to be written

    def put(self, place: int, values: Bits) -> None:
        """`place` in bytes after the header."""
        self.changed |= _put(self._file, self._size, 8 + self._room + place, values)
        if self._given // _AHEAD < (self._given + values.nbytes) // _AHEAD:
            _begin_writing(self._file)
        self._given += values.nbytes

    def finish(self, text: bytes, nbytes: int) -> None:
        """Write the header before its `nbytes`, and have the disk hold it all."""
        length = self._room.to_bytes(8, "little")
        text = text.ljust(self._room)
        assert len(text) == self._room, f"a header of {len(text)} bytes in a room of {self._room}"
        self.changed |= _put(self._file, self._size, 0, np.frombuffer(length + text, np.uint8))
        if self._file.seek(0, os.SEEK_END) != 8 + self._room + nbytes:
            self._file.truncate(8 + self._room + nbytes)
        self.changed |= self._size != 8 + self._room + nbytes
        os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def write_tensors(path: Path, tensors: list[Named], metadata: dict[str, str], parts: Iterable[Part]) -> bool:
    """Write one safetensors file from a stream of parts, each placed by name and first storage unit; where
    there is a file already, only what is not in it. Whether anything had to be written.

    Memory is two parts. Every byte must be given exactly once: less is our own bug and asserts.
    """
    places = place(tensors)
    text = header_text(places, metadata)
    offsets = {each.name: (each.offset, DTYPES[each.dtype].storage.itemsize) for each in places}
    nbytes, given = sum(each.nbytes for each in places), 0
    with WeightFile(path, len(text)) as file:
        for name, first, values in parts:
            start, itemsize = offsets[name]
            file.put(start + first * itemsize, values)
            given += values.nbytes
        assert given == nbytes, f"{path.name}: {given} of {nbytes} bytes were given"
        file.finish(text, nbytes)
    return file.changed


def _put(file: FileIO, size: int, place: int, values: Bits) -> bool:
    """Write at `place`, unless a file that had `size` bytes has these there already."""
    data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    if place + data.size <= size:
        found = np.empty_like(data)
        file.seek(place)
        if file.readinto(found.data) == data.size and np.array_equal(found, data):
            return False
    file.seek(place)
    while data.size:  # a system writes at most 2 GiB at once
        data = data[file.write(data.data) or 0 :]
    return True


def _begin_writing(file: FileIO) -> None:
    """Have the system bring to the disk what it holds of a file, and go on: fsync, which tells of errors, has
    less to wait for."""
    with suppress(OSError, AttributeError, TypeError):  # not Linux
        ctypes.CDLL(None).sync_file_range(file.fileno(), ctypes.c_int64(), ctypes.c_int64(), _WRITE)


def file_size(tensors: list[Named], metadata: dict[str, str]) -> int:
    """Bytes of the file that `write_tensors` would write."""
    places = place(tensors)
    return 8 + len(header_text(places, metadata)) + sum(each.nbytes for each in places)


def place(tensors: list[Named], start: int = 0) -> list[Entry]:
    """Where tensors lie one after another, from byte `start` after the header on: in the order given, or if
    that is not aligned in the one of safetensors' own writer."""
    found = _in_order(tensors, start)
    if any(each.offset % DTYPES[each.dtype].storage.itemsize for each in found if each.nbytes):
        found = _in_order(sorted(tensors, key=by_alignment), start)
    return found


def by_alignment(item: Named) -> tuple[int, str]:
    """The order of safetensors' own writer."""
    return -DTYPES[item[1]].bits, item[0]


def _in_order(tensors: list[Named], start: int) -> list[Entry]:
    found: list[Entry] = []
    for name, dtype, shape in tensors:
        nbytes = math.prod(shape) * DTYPES[dtype].bits // 8
        found.append(Entry(name, dtype, shape, start, nbytes))
        start += nbytes
    return found


def header_text(places: list[Entry], metadata: dict[str, str]) -> bytes:
    """The JSON of a header; offsets count from its end."""
    as_text = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode
    lines = ['"__metadata__":' + as_text(dict(sorted(metadata.items())))] if metadata else []
    for each in places:  # one after another: as tables, many would take five times the memory of their text
        ends = [each.offset, each.offset + each.nbytes]
        entry = {"dtype": each.dtype, "shape": each.shape, "data_offsets": ends}
        lines.append(f"{as_text(each.name)}:{as_text(entry)}")
    text = ("{" + ",".join(lines) + "}").encode()
    return text + b" " * (-len(text) % 8)
