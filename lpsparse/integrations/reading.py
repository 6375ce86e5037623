"""How the stored bytes of a packed folder become a transformers model's parameters, and the guard on it.

The way that transformers has for dequantizing (`serialized_names`) is not taken: it knows tensors by the end
of their names, loses the order of experts of which only some are packed, and leaves the cast to the wanted
dtype to us. Instead, a stored name becomes the tensor's own before any rule sees it, and stored bytes become
the tensor where they are read. All that follows is as for the dense model: renames, merges, ties, casts.
"""

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming
from transformers.modeling_utils import str_to_torch_dtype

from lpsparse.checkpoint import opening
from lpsparse.checkpoint.dtypes import Bits
from lpsparse.checkpoint.entry import LoaderEntry, hash_file, hash_part, stored_in
from lpsparse.checkpoint.layouts import packed
from lpsparse.errors import InputError

_COPY = "copy the folder again, or pack the model again"
Read = Future[Tensor] | Callable[[], Tensor]  # of what transformers reads: begun, or to be done when asked


class Reading:
    """One load of the weight files of a packed folder: what of them was given to the model, and its hash."""

    def __init__(self, entry: LoaderEntry, files: list[str], model: Any) -> None:
        self.entry = entry
        self.shapes = {name: value.shape for name, value in model.state_dict().items()}
        self.parts = [(Path(file), stored_in(Path(file))) for file in files]
        every = [pair for _, parts in self.parts for pair in parts.items()]
        self.stored = {part: tensor for part, tensor in every if tensor.layout != "dense"}
        self.hashes: dict[str, int] = {}  # of each part that was decoded where transformers had read it
        self.given: set[str] = set()  # tensors of which the model got the values
        self.dense: dict[int, Any] = {}  # what a conversion stands in for, which may be itself
        found = sum(len({tensor.name for tensor in parts.values()}) for _, parts in self.parts)
        if found != entry.tensors:
            what = f"{found} tensors are in the weight files, config.json says {entry.tensors}"
            raise InputError(364, what, hint=_COPY)

    def __deepcopy__(self, _: Any) -> "Reading":
        return self  # transformers copies a converter for each parameter

    def around(self, conversions: list[Any]) -> list[Any]:
        """The conversions of a dense model, reading a packed one."""
        rest = WeightConverter("^(.+)$", r"\1", [_AsItIs()])  # what no other is for
        found = [
            _Convert.like(each, self) if isinstance(each, WeightConverter) else each
            for each in (*conversions, rest)
        ]
        self.dense = {id(new): old for new, old in zip(found, conversions, strict=False)}
        return [_Rename(self), *found]

    def cast(self, converter: Any, dtype: torch.dtype | None) -> None:
        """`dtype` is what transformers would have the floats of a parameter in."""
        if isinstance(converter, _Convert):
            converter.dtype = dtype

    def decode(self, stored: str, data: Tensor, dtype: torch.dtype | None) -> Tensor:
        """A tensor from its stored part, which lies on the device where it is wanted."""
        tensor = self.stored[stored]
        if data.is_meta:  # nothing but shapes is asked for
            empty = torch.empty(tensor.shape, dtype=str_to_torch_dtype[tensor.dtype], device="meta")
            self.given.add(tensor.name)
            return empty.to(dtype) if dtype is not None and empty.is_floating_point() else empty
        if tensor.layout == "packed":
            bits = data.cpu().numpy()
            self.hashes[stored] = hash_part(stored, bits.data)
            found = _to_torch(tensor, _decoded(tensor, bits))
        else:
            found = _to_torch(tensor, tensor.read())
        self.given.add(tensor.name)
        return found.to(data.device, dtype if found.is_floating_point() else None)

    def finish(self, model: Any) -> None:
        """Raises InputError unless all is there that was stored, unchanged, and the model got what it has
        a place for."""
        total = sum(self.hashes.values())
        for path, parts in self.parts:  # what is stored densely, or this model has no use for
            total += hash_file(path, parts.keys() - self.hashes.keys())
        if f"{total % 2**64:016x}" != self.entry.digest:
            where = self.parts[0][0].parent if self.parts else "config.json"
            what = f"{where}: the digest of what is stored is {total % 2**64:016x}, not {self.entry.digest}"
            raise InputError(365, what, hint=_COPY)
        packed = {tensor.name for tensor in self.stored.values()}
        lost = sorted((packed & self.shapes.keys()) - self.given) if self.given else sorted(packed)
        if lost:
            what = f"the model has not got {len(lost)} of {len(packed)} packed tensors, such as {lost[0]!r}"
            raise InputError(366, what, hint="use the model class that config.json names")
        for name, value in model.state_dict().items():  # 5.21 compares those of ordinary models only
            if value.shape != self.shapes.get(name, value.shape):
                what = f"{name!r} has shape {tuple(value.shape)}, the model's has {tuple(self.shapes[name])}"
                raise InputError(369, what, hint="use the model class and the config of the folder")
        # What transformers will save is the dense model: by the conversions that it would have used for that.
        used = [id(each) for each in model._weight_conversions]
        model._weight_conversions = [self.dense[each] for each in used if each in self.dense]


class _Rename(WeightRenaming):
    """Stored name -> name of the tensor, exactly."""

    def __init__(self, reading: Reading) -> None:
        super().__init__(r"^(.+)\.(?:packed|bitmask)$", r"\1")  # said for a reader: the table decides
        self.reading = reading

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        tensor = self.reading.stored.get(source_key)
        return (source_key, None) if tensor is None else (tensor.name, self.source_patterns[0])


class _AsItIs(ConversionOps):
    def convert(self, input_dict: dict[str, Any], *_: Any, full_layer_name: str, **__: Any) -> dict[str, Any]:
        (found,) = input_dict.values()
        return {full_layer_name: found}


class _Convert(WeightConverter):
    """A conversion of dense tensors, of which some are stored packed."""

    reading: Reading
    dtype: torch.dtype | None = None

    @classmethod
    def like(cls, other: WeightConverter, reading: Reading) -> "_Convert":
        sources, targets = other._original_source_patterns, other._original_target_patterns  # pyright: ignore[reportPrivateUsage]
        found = cls(sources.copy(), targets.copy(), other.operations, other.force_cpu)
        found.scope_prefix, found.base_model_prefix = other.scope_prefix, other.base_model_prefix
        found.reading = reading
        return found

    def add_tensor(self, target_key: str, source_key: str, source_pattern: str, future: Read) -> None:
        tensor = self.reading.stored.get(source_key)
        if tensor is not None and tensor.layout == "bitmask" and not source_key.endswith(".compressed"):
            return  # one part of four stands for the tensor
        if tensor is not None:
            dtype = self.dtype
            future = _then(future, lambda data: self.reading.decode(source_key, data, dtype))
        super().add_tensor(target_key, source_key, source_pattern, future)  # pyright: ignore[reportArgumentType]


def _then(read: Read, decode: Callable[[Tensor], Tensor]) -> Read:
    """`read`, decoded: by the thread of transformers that has read it, beside the others."""
    if not isinstance(read, Future):
        return lambda: decode(read())
    decoded: Future[Tensor] = Future()

    def done(read: Future[Tensor]) -> None:
        try:
            decoded.set_result(decode(read.result()))
        except BaseException as error:  # a thread has nobody to tell; who waits for the tensor gets it
            decoded.set_exception(error)

    read.add_done_callback(done)
    return decoded


def _decoded(tensor: opening.Tensor, stored: Bits) -> Bits:
    if stored.size != tensor.stored_bytes:  # a part of them for each process
        what = f"{tensor.name!r}: tensor parallelism cannot divide a packed tensor"
        raise InputError(367, what, hint="`lpsparse unpack` the folder")
    try:
        dtype, bits = packed.decode_all(stored)
    except InputError as error:
        raise InputError(int(error.code[3:]), f"{tensor.name!r}: {error.what}", hint=error.hint) from None
    assert dtype == tensor.dtype, f"{tensor.name}: {dtype}, its file says {tensor.dtype}"
    return bits


def _to_torch(tensor: opening.Tensor, bits: Bits) -> Tensor:
    if tensor.dtype not in str_to_torch_dtype:
        what = f"{tensor.file}: {tensor.name!r}: transformers does not load {tensor.dtype}"
        raise InputError(368, what, hint="read it by lpsparse.load")
    return torch.from_numpy(bits).view(str_to_torch_dtype[tensor.dtype])
