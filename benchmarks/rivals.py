"""The packed layout and its rivals in memory, for benchmarks/packing.py: bytes and seconds of ways to store
dense bytes and to have them back, and where the time of reading goes."""

import importlib.util
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import zstandard
from numpy.typing import NDArray

from lpsparse.checkpoint.dtypes import DTYPES, Bits
from lpsparse.checkpoint.layouts import bitmask
from lpsparse.checkpoint.layouts.packing import chunks
from lpsparse.checkpoint.tensors import Tensor
from lpsparse.parallel.threads import parallel, using_threads

SLOW = 64 << 20  # bytes: zstd -19 is tried on no more, and once
Bytes = NDArray[np.uint8]
Kind = tuple[str, tuple[int, ...], int, int]  # of a block: dtype, shape, and where in the dense bytes it lies


@dataclass(frozen=True, slots=True)
class Measured:
    weights: int
    nbytes: int
    pack_seconds: float  # on two threads
    unpack_seconds: float  # of one core


@dataclass(frozen=True, slots=True)
class Codec:
    encode: Callable[[Bytes], Any]  # the dense bytes are its own: zipnn spoils them
    decode: Callable[[Any], Any]
    size: Callable[[Any], int] = len
    slow: bool = False  # measured once, on the first SLOW bytes


def measured(tensors: tuple[Tensor, ...], rounds: int, *, slow: bool) -> dict[str, Measured]:
    """Of each way the medians of rounds in which each has its turn; what is slow is measured once, on a part
    of the bytes, and its numbers are scaled to all of them."""
    blocks = [(each.dtype, block) for each in tensors for _, block in each.blocks()]
    dense = np.concatenate([block.reshape(-1).view(np.uint8) for _, block in blocks])
    ends = np.cumsum([block.nbytes for _, block in blocks]).tolist()
    kinds = [(d, b.shape, end - b.nbytes, end) for (d, b), end in zip(blocks, ends, strict=True)]
    del blocks
    ways, nbytes = codecs_of(kinds), dict[str, int]()
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    for i in range(rounds):
        for way, codec in ways.items():
            if codec.slow and (i or not slow):
                continue
            part = dense[: SLOW if codec.slow else None]
            took, stored = timed(partial(codec.encode, part.copy()))
            seconds[way, "pack"].append(took * dense.size / part.size)
            with using_threads(1):
                took, found = timed(partial(codec.decode, stored), time.process_time)
            seconds[way, "unpack"].append(took * dense.size / part.size)
            assert np.array_equal(np.frombuffer(found, np.uint8), part), way
            nbytes[way] = codec.size(stored) * dense.size // part.size
            del stored, found
    weights = sum(tensor.size for tensor in tensors)
    return {
        way + f", from {SLOW >> 20} MiB" * (ways[way].slow and dense.size > SLOW): Measured(
            weights, size, median(seconds[way, "pack"]), median(seconds[way, "unpack"])
        )
        for way, size in nbytes.items()
    }


def codecs_of(kinds: list[Kind]) -> dict[str, Codec]:
    """Each rival, for blocks that lie so in the dense bytes."""

    def by_blocks(
        encode: Callable[..., Any], decode: Callable[..., Bits], size: Callable[[Any], int]
    ) -> Codec:
        def encoded(dense: Bytes) -> list[Any]:
            def one(kind: Kind) -> Any:
                dtype, shape, first, last = kind
                return encode(dense[first:last].view(DTYPES[dtype].storage).reshape(shape), dtype)

            return parallel(one, kinds)

        def decoded(stored: list[Any]) -> Bytes:
            dense = np.empty(kinds[-1][3], np.uint8)
            for each, (dtype, shape, first, last) in zip(stored, kinds, strict=True):
                dense[first:last] = decode(each, shape, dtype).reshape(-1).view(np.uint8)
            return dense

        return Codec(encoded, decoded, lambda stored: sum(map(size, stored)))

    def unmasked(parts: dict[str, Bits], shape: tuple[int, ...], _: str) -> Bits:
        block = np.zeros(shape, parts["compressed"].dtype)
        mask = np.unpackbits(parts["bitmask"], axis=1, count=shape[1], bitorder="little").view(bool)
        block[mask] = parts["compressed"]
        return block

    def packed(level: str) -> Codec:
        return by_blocks(
            lambda block, dtype: chunks.encode_chunk(block.reshape(-1), dtype, level),
            lambda of, shape, dtype: chunks.decode_chunk(memoryview(of), math.prod(shape), dtype),
            len,
        )

    def zstd(level: int) -> Codec:
        return Codec(
            lambda dense: zstandard.ZstdCompressor(level=level, threads=2).compress(dense.data),
            lambda stored: zstandard.ZstdDecompressor().decompress(stored),
            slow=level > 9,
        )

    ways = {"dense": Codec(np.copy, np.copy), "zstd -3": zstd(3), "zstd -19": zstd(19)}
    ways["bitmask"] = by_blocks(
        lambda block, _: bitmask.encode(block, 0),
        unmasked,
        lambda of: sum(part.nbytes for part in of.values()),
    )
    ways |= {f"packed, {level}": packed(level) for level in chunks.LEVELS}
    if importlib.util.find_spec("zipnn") is not None:
        from zipnn import ZipNN

        kind = "float32" if any(dtype == "F32" for dtype, *_ in kinds) else "bfloat16"
        make = partial(ZipNN, input_format="byte", bytearray_dtype=kind)
        ways["zipnn"] = Codec(
            lambda of: make(threads=2).compress(of.data), lambda of: make(threads=1).decompress(of)
        )
    return ways


def profile(tensors: tuple[Tensor, ...], rounds: int) -> list[float]:
    """Seconds for the mask, the exponents, the rest, putting them together, and what is outside of chunks."""
    spent: dict[str, float] = defaultdict(float)

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            took, found = timed(partial(function, *arguments), time.process_time)
            spent[name] += took
            return (found[0], drawn(found[1])) if name == "decode_mask" else found

        return call

    def drawn(items: Iterator[Any]) -> Iterator[Any]:
        while (found := timed(partial(next, items, None), time.process_time))[1] is not None:
            spent["decode_mask"] += found[0]
            yield found[1]

    with ExitStack() as stack:
        for name in ("decode_mask", "decode_exponents", "_decode_rest", "_spread"):
            stack.enter_context(patch.object(chunks, name, watched(name, getattr(chunks, name))))
        stack.enter_context(patch.object(chunks, "decode_chunk", watched("chunk", chunks.decode_chunk)))
        whole = sum(
            timed(lambda: [each.read() for each in tensors], time.process_time)[0] for _ in range(rounds)
        )
    parts = [spent["decode_mask"], spent["decode_exponents"], spent["_decode_rest"] + spent["_spread"]]
    return [each / rounds for each in (*parts, spent["chunk"] - sum(parts), whole - spent["chunk"])]


def timed(way: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> tuple[float, Any]:
    begun = clock()
    found = way()
    return clock() - begun, found
