"""What the planes of the packed layout are stored as: bytes whose number the reader knows, raw or as one zstd
frame. docs/format.md specifies it."""

import threading
from functools import cache

import numpy as np
import zstandard
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

WORTH = 32  # a frame is taken when it saves this part of the bytes: to undo Huffman costs about 1 ns a byte
_KEPT = 16 << 20  # bytes: more than a chunk takes to decode, less than what glibc never learns from (32 MiB)
_local = threading.local()  # zstd's contexts are not to be shared by threads


class BrokenError(ValueError):
    """Stored bytes that no writer of the layout makes."""


def box(data: Bytes, *, any_saving: bool = False) -> bytes:
    """A zstd frame of `data`, or `data` itself where a frame does not pay."""
    frame = _compressor().compress(data.data) if data.size else b""
    return frame if len(frame) < data.size - (0 if any_saving else data.size // WORTH) else data.tobytes()


def unbox(stored: memoryview, size: int) -> Bytes:
    """The `size` bytes that were stored. Raises BrokenError, before anything is allocated, when they are not
    so many."""
    if len(stored) == size:
        return np.frombuffer(stored, np.uint8)
    try:
        if len(stored) > size or zstandard.frame_content_size(stored) != size:
            raise BrokenError(
                f"{len(stored)} bytes are not the {size} that belong there, nor a frame of them"
            )
        found = _decompressor().decompress(stored, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise BrokenError(str(error)) from None
    return np.frombuffer(found, np.uint8)


def join(parts: list[bytes]) -> bytes:
    """Each part after its length, 4 bytes little-endian."""
    return b"".join(len(part).to_bytes(4, "little") + part for part in parts)


def split(data: memoryview, count: int) -> list[memoryview]:
    """What `join` joined. Raises BrokenError when it is not `count` parts and nothing else."""
    parts: list[memoryview] = []
    for _ in range(count):
        end = 4 + int.from_bytes(data[:4], "little")
        if len(data) < max(end, 4):
            raise BrokenError(f"{len(data)} bytes, a part of {end} is cut short")
        parts.append(data[4:end])
        data = data[end:]
    if len(data):
        raise BrokenError(f"{len(data)} bytes too many")
    return parts


@cache
def keep_freed_memory() -> None:
    """glibc gives what is freed back to the system where it is more than twice the largest block that it had
    mapped, and a page that comes again costs more than to decode what is on it. To free one block of 16 MiB,
    of which nothing was touched, raises that to 32 MiB; other makes of malloc do not mind."""
    np.empty(_KEPT, np.uint8)


def _compressor() -> zstandard.ZstdCompressor:
    """Huffman with next to no search for matches: in random planes every match loses.

    A table of 64 entries and matches of 7 bytes still find runs and short periods. target_length stays 0:
    above it zstd's fast strategy leaves Huffman out.
    """
    if not hasattr(_local, "compressor"):
        parameters = zstandard.ZstdCompressionParameters(
            strategy=zstandard.STRATEGY_FAST,
            hash_log=6,
            min_match=7,
            window_log=18,
            chain_log=6,
            search_log=1,
            target_length=0,
            write_content_size=1,
            write_checksum=0,
            write_dict_id=0,
        )
        _local.compressor = zstandard.ZstdCompressor(compression_params=parameters)
    return _local.compressor


def _decompressor() -> zstandard.ZstdDecompressor:
    if not hasattr(_local, "decompressor"):
        _local.decompressor = zstandard.ZstdDecompressor()
    return _local.decompressor
