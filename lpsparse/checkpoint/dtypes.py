"""Storage dtypes of safetensors, and the order of magnitudes on raw bits.

For IEEE-like floats the integer order of the bits with the sign masked is the order of the magnitudes, so
pruning needs numpy and no float arithmetic. f16, bf16 and both f8 are widened to the bits of the equal
float32 first (exact), so that one threshold can be compared across tensors of different dtypes.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

Bits = NDArray[np.unsignedinteger]


_STORAGE = {nbytes: np.dtype(f"<u{nbytes}") for nbytes in (1, 2, 4, 8)}


@dataclass(frozen=True, slots=True)
class Dtype:
    name: str  # as written in a safetensors header
    bits: int
    is_float: bool = False  # a float whose magnitudes we can order, hence prune

    @property
    def storage(self) -> np.dtype[np.unsignedinteger]:
        """Little-endian unsigned integers of the same width: how raw tensors travel through lpsparse."""
        return _STORAGE[max(self.bits // 8, 1)]


_FLOATS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8}
_OTHERS = {
    "I64": 64,
    "U64": 64,
    "I32": 32,
    "U32": 32,
    "I16": 16,
    "U16": 16,
    "I8": 8,
    "U8": 8,
    "BOOL": 8,
    "C64": 64,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
}
DTYPES: dict[str, Dtype] = {name: Dtype(name, bits, is_float=True) for name, bits in _FLOATS.items()} | {
    name: Dtype(name, bits) for name, bits in _OTHERS.items()
}

FIELDS = {  # bits of exponent and mantissa
    "F64": (11, 52),
    "F32": (8, 23),
    "F16": (5, 10),
    "BF16": (8, 7),
    "F8_E4M3": (4, 3),
    "F8_E5M2": (5, 2),
}
F32_INF = 0x7F800000
F64_INF = 0x7FF0000000000000


@cache
def _e4m3_magnitudes() -> NDArray[np.uint32]:
    """float32 bits of |x| for each of the 256 codes of f8 e4m3fn (bias 7, no infinity, 0x7f is NaN)."""
    code = np.arange(256) & 0x7F
    exponent, mantissa = code >> 3, code & 7
    value = np.where(exponent > 0, (8 + mantissa) * 2.0 ** (exponent - 10.0), mantissa * 2.0**-9)
    value = np.where(code == 0x7F, np.nan, value).astype(np.float32)
    return np.abs(value).view(np.uint32)


def magnitudes(raw: Bits, dtype: str, *, wide: bool = False) -> Bits:
    """Bits of |x| as float32 (uint32), or float64 (uint64) for F64 and when `wide`; same shape as `raw`.

    Monotone in |x|; zero of either sign is 0; Inf is F32_INF (F64_INF) and NaN is above it.
    """
    if dtype == "F64":
        return raw & np.uint64(0x7FFFFFFFFFFFFFFF)
    if dtype == "F32":
        narrow = raw & np.uint32(0x7FFFFFFF)
    elif dtype == "BF16":
        narrow = (raw & np.uint16(0x7FFF)).astype(np.uint32) << np.uint32(16)
    elif dtype == "F16":
        narrow = (raw & np.uint16(0x7FFF)).view(np.float16).astype(np.float32).view(np.uint32)
    elif dtype == "F8_E5M2":  # the upper byte of a float16
        half = (raw & np.uint8(0x7F)).astype(np.uint16) << np.uint16(8)
        narrow = half.view(np.float16).astype(np.float32).view(np.uint32)
    elif dtype == "F8_E4M3":
        narrow = _e4m3_magnitudes()[raw]
    else:
        raise AssertionError(f"{dtype} has no order of magnitudes")
    if not wide:
        return narrow
    with np.errstate(invalid="ignore"):  # a signalling NaN stays NaN
        return narrow.view(np.float32).astype(np.float64).view(np.uint64)


def ordered(raw: Bits, dtype: str) -> Bits:
    """|x| as integers of the storage's own width, in the order of magnitudes; zero of either sign is 0."""
    return raw & raw.dtype.type((1 << (raw.dtype.itemsize * 8 - 1)) - 1)


def code_of(key: int, dtype: str, *, wide: bool) -> int:
    """The smallest of the integers of `ordered` whose magnitude key (`magnitudes`) is at least `key`."""
    if dtype == "F64":
        return key
    if dtype == "F32":
        return key_of(value_of(key, wide=True), wide=False) if wide else key
    keys = _keys(dtype, wide)
    return int(np.searchsorted(keys, keys.dtype.type(key)))  # a Python int would be compared as a float


@cache
def _keys(dtype: str, wide: bool) -> Bits:
    """The key of each integer of `ordered`, of a dtype of 16 bits or fewer."""
    storage = DTYPES[dtype].storage
    return magnitudes(np.arange(1 << (DTYPES[dtype].bits - 1)).astype(storage), dtype, wide=wide)


@cache
def infinity(dtype: str) -> int:
    """The integer of `ordered` at and above which a value is Inf or NaN."""
    return code_of(F64_INF if dtype == "F64" else F32_INF, dtype, wide=False)


def key_of(value: float, *, wide: bool) -> int:
    """Smallest key of a magnitude >= `value`: |x| < value exactly when its key is below this. value >= 0."""
    value = abs(value)  # -0.0 too
    if wide:
        return int(np.float64(value).view(np.uint64))
    with np.errstate(over="ignore"):  # beyond float32 everything finite is smaller
        narrow = np.float32(value)
        if float(narrow) < value:
            narrow = np.nextafter(narrow, np.float32(np.inf))
    return int(narrow.view(np.uint32))


def value_of(key: int, *, wide: bool) -> float:
    """The magnitude that a key stands for."""
    return float(np.uint64(key).view(np.float64) if wide else np.uint32(key).view(np.float32))
