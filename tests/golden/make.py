"""Writes the files of this folder: `python tests/golden/make.py`. Those of a released version stay."""

import json
import sys
from pathlib import Path

import numpy as np
import zstandard
from safetensors.numpy import save_file

import lpsparse
from lpsparse.checkpoint.layouts import packed

HERE = Path(__file__).parent


def dense() -> dict[str, np.ndarray]:
    """Each dtype that numpy has, and by their chunks each coding of a mask and of exponents."""
    draw = np.random.default_rng(6)

    def sparse(shape: tuple[int, ...], keep: float, spread: float = 1) -> np.ndarray:
        values = draw.standard_normal(shape) * 2.0 ** draw.integers(-spread * 4, 1, shape)
        return np.where(draw.random(shape) < keep, values, 0)

    special = np.array([0x80000000, 0x7FC00001, 0xFF800000, 1, *[0] * 96], np.uint32)
    return {
        "bits.weight": sparse((31, 37), 0.5).astype(np.float32),
        "gaps.weight": sparse((31, 37), 0.1).astype(np.float32),
        "wide.gaps.weight": sparse((7, 701), 0.003).astype(np.float32),
        "none.weight": np.zeros((13, 17), np.float32),
        "all.weight": (draw.integers(64, 127, (31, 37)) / 64).astype(np.float32),
        "special": np.tile(special, 7).view(np.float32),
        "half.experts": sparse((3, 17, 19), 0.3).astype(np.float16),
        "double.weight": sparse((17, 19), 0.3, 9).astype(np.float64),
        "positions": np.arange(701, dtype=np.int64).reshape(1, 701),
        "small.bias": np.ones(7, np.float32),
        "scale": np.array(3, np.float32),
        "nothing": np.zeros((0, 7), np.float32),
    }


def blob(
    *,
    shape: tuple[int, ...] = (31, 37),
    values: int = 31 * 37,
    chunks: tuple[bytes, ...] | None = None,
    dtype: str = "F32",
    ends: list[int] | None = None,
    magic: bytes = b"LPSP\1",
) -> bytes:
    """A packed tensor of parts that may be lies; with none of them, of zeros."""
    chunks = (join(b"\0", b"\0", join(b"", b"", b"")),) if chunks is None else chunks
    start = 32 + 8 * len(shape) + 8 * len(chunks)
    true = [start + sum(map(len, chunks[: i + 1])) for i in range(len(chunks))]
    numbers = np.array([values, *shape, *(true if ends is None else ends)], "<u8").tobytes()
    head = magic + bytes([len(shape), 0, 0]) + dtype.encode().ljust(16, b"\0") + numbers
    found = head + b"".join(chunks)
    return found + bytes(-len(found) % 8)


def join(*parts: bytes) -> bytes:
    return b"".join(len(part).to_bytes(4, "little") + part for part in parts)


def one(mask: bytes, exponents: bytes, *planes: bytes) -> tuple[bytes]:
    return (join(mask, exponents, join(*planes)),)


def gaps(stored: bytes) -> bytes:
    return b"\3" + len(stored).to_bytes(4, "little") + stored


def bomb(size: int) -> bytes:
    """A zstd frame that says `size` bytes, and unpacks to so many zeros."""
    return zstandard.ZstdCompressor().compress(bytes(size))


def lying_frame(size: int) -> bytes:
    """A frame whose content size is less than what it unpacks to."""
    frame = bytearray(bomb(1 << 20))
    width = {0: 1, 1: 2, 2: 4, 3: 8}[frame[4] >> 6]
    at = 5 if frame[4] & 0x20 else 6
    frame[at : at + width] = (size - (256 if width == 2 else 0)).to_bytes(width, "little")
    return bytes(frame)


def hostile() -> dict[str, bytes]:
    n, bits = 31 * 37, bytes(-(-31 * 37 // 8))
    exponents, no = b"\0\x7f\0", (b"", b"", b"")
    three = (bytes([7]) * 3,) * 3
    set_3 = bytes([7]) + bits[1:]
    mask_3 = b"\2" + set_3
    return {
        "popcount too many": blob(chunks=one(b"\2" + bytes([15]) + bits[1:], exponents, *three)),
        "popcount too few": blob(chunks=one(b"\2" + bytes([3]) + bits[1:], exponents, *three)),
        "bits beyond the last value": blob(chunks=one(b"\2" + bits[1:] + b"\xff", exponents, *no)),
        "mask of another kind": blob(chunks=one(b"\4", exponents, *no)),
        "mask empty": blob(chunks=one(b"", exponents, *no)),
        "gaps beyond the last value": blob(chunks=one(gaps(b"\xff" * 4 + b"\xfe"), exponents, *(b"\1",) * 3)),
        "gaps that end in a gap": blob(chunks=one(gaps(b"\0\xff"), exponents, *(b"\1",) * 3)),
        "more gaps than values": blob(chunks=one(gaps(bytes(n + 1)), exponents, *no)),
        "gaps between all values": blob(chunks=one(gaps(b"\5" * n), exponents, *(bytes(n),) * 3)),
        "no gaps": blob(chunks=one(gaps(b""), exponents, *no)),
        "a frame that bombs": blob(chunks=one(b"\2" + bomb(1 << 24), exponents, *no)),
        "a frame that lies": blob(chunks=one(b"\2" + lying_frame(len(bits)), exponents, *no)),
        "a frame cut short": blob(chunks=one(b"\2" + bomb(len(bits))[:-3], exponents, *no)),
        "a plane too long": blob(chunks=one(mask_3, exponents, *(bytes(4),) * 3)),
        "a plane too few": blob(chunks=one(mask_3, exponents, *three[:2])),
        "a plane too many": blob(chunks=one(mask_3, exponents, *three, b"")),
        "exponents of another kind": blob(chunks=one(mask_3, b"\3", *three)),
        "exponent too large": blob(chunks=one(mask_3, b"\0\0\1", *three)),
        "no exponents for values": blob(chunks=one(mask_3, b"\0", *three)),
        "a table too long": blob(chunks=one(mask_3, b"\1" + join(b"\0\0" * 2, b"\0", b""), *three)),
        "a symbol of nothing": blob(chunks=one(mask_3, b"\2" + join(b"\0\0", b"\x15", b""), *three)),
        "an escape without its exponent": blob(chunks=one(mask_3, b"\1" + join(b"\0\0", b"\7", b""), *three)),
        "an escape of no value": blob(chunks=one(mask_3, b"\1" + join(b"\0\0", b"\x0f", bytes(4)), *three)),
        "a part longer than the chunk": blob(chunks=((10**9).to_bytes(4, "little") + b"\0" * 40,)),
        "a chunk of nothing": blob(chunks=(b"",)),
        "a chunk beyond the end": blob(ends=[10**15]),
        "ends that fall": blob(values=37 * 16, chunks=(bytes(40), bytes(40)), ends=[200, 150]),
        "an end that wraps round": blob(values=37 * 16, chunks=(bytes(40), bytes(40)), ends=[2**64 - 8, 144]),
        "a chunk too long for its values": blob(shape=(3,), values=3, chunks=(bytes(9000),)),
        "shape that overflows": blob(shape=(2**32, 2**32)),
        "shape empty and enormous": blob(shape=(0, 2**63)),
        "shape of more chunks than there are": blob(shape=(2**20, 37)),
        "17 dimensions": blob(shape=(31, 37, *[1] * 15)),
        "dimensions cut short": blob()[:40],
        "chunks of no values": blob(values=0),
        "chunks of too many values": blob(shape=(2**24, 37), values=2**24 * 37),
        "a dtype that is none": blob(dtype="F33"),
        "another magic": blob(magic=b"LPSQ\1"),
        "another version": blob(magic=b"LPSP\2"),
        "no head": b"LPSP\1\2\0\0",
        "bytes too many": blob() + bytes(8),
        "padding that is something": blob()[:-1] + b"\1",
    }


def file_of(stored: bytes, shape: list[int], dtype: str = "F32") -> bytes:
    """A weight file with one packed tensor, `w`."""
    manifest = {"format_version": 1, "layout": "packed", "tensors": {"w": {"dtype": dtype, "shape": shape}}}
    metadata = {
        "lpsparse.layout": "packed",
        "lpsparse.format_version": "1",
        packed.MANIFEST: json.dumps(manifest),
    }
    entry = {"dtype": "U8", "shape": [len(stored)], "data_offsets": [0, len(stored)]}
    text = json.dumps({"__metadata__": metadata, "w.packed": entry}).encode()
    return len(text).to_bytes(8, "little") + text + stored


def shape_of(stored: bytes) -> list[int]:
    """What the head says, so that the manifest agrees."""
    count = min(stored[5], (len(stored) - 32) // 8) if len(stored) >= 32 else 0
    return [int(n) for n in np.frombuffer(stored[32 : 32 + 8 * count], "<u8")]


def main() -> None:
    save_file(dense(), HERE / "dense.safetensors")
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "golden-out")
    lpsparse.pack(HERE / "dense.safetensors", out)
    (HERE / "packed-1.safetensors").write_bytes((out / "lpsparse.safetensors").read_bytes())
    for name, stored in hostile().items():
        dtype = "F33" if "dtype" in name else "F32"
        (HERE / "hostile" / f"{name.replace(' ', '-')}.safetensors").write_bytes(
            file_of(stored, shape_of(stored), dtype)
        )


if __name__ == "__main__":
    main()
