"""Small checkpoints, good and hostile, written by hand."""

import contextlib
import hashlib
import json
import os
import tracemalloc
import zipfile
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from safetensors.numpy import save_file

from lpsparse.commands.prune import prune_step
from lpsparse.errors import InputError, LpsparseError
from lpsparse.steps.prune import PruneStep
from lpsparse.steps.resolve import resolve

ROOT = Path(__file__).parents[2]


PRUNABLE = ("layers.0.attn.weight", "layers.0.mlp.weight", "layers.1.attn.weight", "layers.1.mlp.weight")


PRUNABLE_WEIGHTS = 4 * 7 * 13


Given = tuple[str, list[int], bytes]  # dtype, shape, data


def with_header(header: object, data: bytes = b"") -> bytes:
    """A safetensors file with any header: text, bytes or a table."""
    text = header if isinstance(header, (str, bytes)) else json.dumps(header)
    text = text.encode() if isinstance(text, str) else text
    return len(text).to_bytes(8, "little") + text + data


def safetensors_bytes(tensors: dict[str, Given], metadata: dict[str, str] | None = None) -> bytes:
    """A safetensors file by hand, tensors in the order given; nothing is checked."""
    table: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    data = b""
    for name, (dtype, shape, raw) in tensors.items():
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    return with_header(table, data)


def write_safetensors(path: Path, tensors: dict[str, Given], metadata: dict[str, str] | None = None) -> Path:
    path.write_bytes(safetensors_bytes(tensors, metadata))
    return path


def f32(*shape: int, seed: int = 0) -> Given:
    """Random normal F32 values, as `write_safetensors` takes them."""
    values = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return "F32", list(shape), values.tobytes()


def tiny_arrays(seed: int = 0) -> dict[str, np.ndarray]:
    """Matrices, an embedding, a norm, a head, a bias, an integer buffer, a 0-d and an empty tensor."""
    draw = np.random.default_rng(seed)
    shapes = {
        "embed_tokens.weight": (11, 7),
        "layers.0.attn.weight": (7, 13),
        "layers.0.attn.bias": (7,),
        "layers.0.mlp.weight": (13, 7),
        "layers.1.attn.weight": (7, 13),
        "layers.1.mlp.weight": (13, 7),
        "norm.weight": (7,),
        "lm_head.weight": (11, 7),
        "scale": (),
        "nothing.weight": (0, 7),
    }
    arrays = {name: np.asarray(draw.standard_normal(shape), np.float32) for name, shape in shapes.items()}
    return arrays | {"position_ids": np.arange(11, dtype=np.int64).reshape(1, 11)}


def write_sidecars(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type":  "llama"}\n')
    (folder / "README.md").write_text("---\nlicense: mit\n---\nthe base\n")
    (folder / "extra").mkdir()
    (folder / "extra" / "vocab.txt").write_bytes(b"a\r\nb\xff\n")


def write_tiny(folder: Path, seed: int = 0) -> Path:
    write_sidecars(folder)
    save_file(tiny_arrays(seed), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_shards(folder: Path, seed: int = 0) -> Path:
    """The tensors of `write_tiny` dealt to three files, with an index."""
    write_sidecars(folder)
    arrays = tiny_arrays(seed)
    weight_map = {
        name: f"model-{i % 3 + 1:05d}-of-00003.safetensors" for i, name in enumerate(sorted(arrays))
    }
    for shard in set(weight_map.values()):
        part = {name: arrays[name] for name in arrays if weight_map[name] == shard}
        save_file(part, folder / shard, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def tree_hash(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder, and "dir" for folders, by relative path."""
    found = sorted(folder.rglob("*"))
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "dir"
        for path in found
    }


GOOD = safetensors_bytes({"a": f32(7, 13), "b.weight": f32(13)}, {"format": "pt"})


A = {"dtype": "U8", "shape": [7], "data_offsets": [0, 7]}


def entry(**changes: object) -> bytes:
    """A file of one tensor `a` of 7 bytes, some of its header entry changed."""
    return with_header({"a": A | changes}, bytes(7))


def two(first: tuple[int, int], second: tuple[int, int], size: int) -> bytes:
    """A file of two U8 tensors `a` and `b` at the given ranges."""
    ranges = {"a": first, "b": second}
    table = {n: {"dtype": "U8", "shape": [e - b], "data_offsets": [b, e]} for n, (b, e) in ranges.items()}
    return with_header(table, bytes(size))


A_TEXT = json.dumps(A)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 90868376\n"


HOSTILE = {
    "zero bytes": (b"", ["LPS301", "0 bytes"]),
    "seven bytes": (bytes(7), ["LPS301", "7 bytes"]),
    "eight bytes": (bytes(8), ["LPS308"]),
    "header of 2**63": (
        (2**63).to_bytes(8, "little") + b"{}",
        ["LPS302", "9223372036854775808", "100000000"],
    ),
    "header past the end": ((999).to_bytes(8, "little") + b"{}", ["LPS303", "1007", "10"]),
    "git lfs pointer": (LFS, ["LPS307", "Git LFS pointer", "90868376 bytes", "git lfs pull"]),
    "git lfs pointer of no size": (
        LFS[:-20] + b"size -1\n",
        ["LPS307", "Git LFS pointer, not the weights |"],
    ),
    "git lfs pointer of any size": (
        LFS[:-9] + b"9" * 400 + b"\n",
        ["LPS307", "Git LFS pointer, not the weights |"],
    ),
    "onnx": (b"\x08\x07\x12\x07pytorch\x1a\x052.1.0" + bytes(64), ["LPS307", "protobuf", "ONNX"]),
    "onnx without its maker": (
        b"\x08\x0a\x3a\xc3\x91\x04\x0a\x1c" + bytes(64),
        ["LPS307", "protobuf", "ONNX"],
    ),
    "html page": (b"<!DOCTYPE html><html>not found</html>", ["LPS307", "HTML"]),
    "gguf": (b"GGUF\x03\0\0\0" + bytes(64), ["LPS307", "GGUF"]),
    "zip": (b"PK\x03\x04\x14\0\0\0" + bytes(64), ["LPS307", "zip", ".pt"]),
    "pickle": (b"\x80\x02}q\0(X\x01\0\0\0" + bytes(64), ["LPS307", "pickle", ".pt"]),
    "framed pickle": (b"\x80\x04\x95\x03\0\0\0\0\0" + bytes(64), ["LPS307", "pickle", ".pt"]),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(64), ["LPS307", "HDF5"]),
    "truncated tail": (GOOD[:-5], ["LPS303", "5 bytes missing", "'b.weight'"]),
    "trailing junk": (GOOD + b"xyz", ["LPS313", "3 bytes follow"]),
    "not utf-8": (with_header(b'{"a\xff": ' + A_TEXT.encode() + b"}", bytes(7)), ["LPS308", "utf-8"]),
    "utf-16": (with_header(json.dumps({"a": A}).encode("utf-16-le"), bytes(7)), ["LPS308"]),
    "lone surrogate": (with_header('{"\\ud800": ' + A_TEXT + "}", bytes(7)), ["LPS308", "surrogate"]),
    "json list": (with_header([1, 2]), ["LPS309", "list"]),
    "json number": (with_header(b"7"), ["LPS309", "int"]),
    "cut json": (with_header(b'{"a": '), ["LPS308"]),
    "nested 5,000 deep": (with_header(b"[" * 5000 + b"]" * 5000), ["LPS308", "nested too deep"]),
    "nested in an entry": (entry(shape=[[[[]]]]), ["LPS311", "'a'", "shape"]),
    "number of 5,000 digits": (with_header('{"a": ' + "9" * 5000 + "}"), ["LPS308"]),
    "duplicate name": (
        with_header(f'{{"a": {A_TEXT}, "a": {A_TEXT}}}', bytes(7)),
        ["LPS308", "key 'a', at 1 and 2"],
    ),
    "duplicate metadata": (with_header('{"__metadata__": {}, "__metadata__": {}}'), ["LPS308", "duplicate"]),
    "metadata not strings": (with_header({"__metadata__": {"format": 7}}), ["LPS310", "__metadata__"]),
    "metadata a list": (with_header({"__metadata__": ["pt"]}), ["LPS310", "__metadata__"]),
    "overlap": (two((0, 7), (5, 12), 12), ["LPS312", "'b' overlaps 'a'"]),
    "the same range twice": (two((0, 7), (0, 7), 7), ["LPS312", "overlaps"]),
    "hole between": (two((0, 7), (9, 16), 16), ["LPS312", "'b'", "hole after 'a'"]),
    "hole at the start": (two((2, 9), (9, 16), 16), ["LPS312", "'a'", "hole"]),
    "reversed offsets": (entry(data_offsets=[7, 0]), ["LPS311", "'a'", "[7, 0]"]),
    "negative offset": (entry(data_offsets=[-7, 0]), ["LPS311", "'a'", "[-7, 0]"]),
    "one offset": (entry(data_offsets=[0]), ["LPS311", "'a'", "data_offsets"]),
    "offsets a table": (entry(data_offsets={"0": 7}), ["LPS311", "'a'", "data_offsets"]),
    "shape and bytes differ": (entry(shape=[7, 13]), ["LPS311", "'a'", "91 bytes", "give 7"]),
    "64 bit overflow": (entry(shape=[2**40, 2**40]), ["LPS311", "'a'"]),
    "float overflow": (entry(shape=[2**62] * 40), ["LPS311", "'a'"]),
    "a million dimensions": (entry(shape=[2**62] * 1_000_000), ["LPS311", "'a'"]),
    "an empty shape past 64 bits": (entry(shape=[0, 2**62, 2**62], data_offsets=[0, 0]), ["LPS311", "'a'"]),
    "dimension past 64 bits": (entry(shape=[2**64]), ["LPS311", "'a'"]),
    "float dimension": (entry(shape=[7.0]), ["LPS311", "'a'", "7.0"]),
    "negative dimension": (entry(shape=[-7]), ["LPS311", "'a'", "-7"]),
    "bool dimension": (entry(shape=[True, 7]), ["LPS311", "'a'", "True"]),
    "text dimension": (entry(shape=["7"]), ["LPS311", "'a'", "'7'"]),
    "no shape": (with_header({"a": {"dtype": "U8", "data_offsets": [0, 7]}}, bytes(7)), ["LPS311", "'a'"]),
    "one key too many": (entry(device="cuda"), ["LPS311", "'a'"]),
    "entry not a table": (with_header({"a": 7}), ["LPS311", "'a'"]),
    "unknown dtype": (entry(dtype="Q7"), ["LPS311", "'a'", "'Q7'"]),
    "dtype a list": (entry(dtype=["U8"]), ["LPS311", "'a'", "dtype"]),
    "dtype a table": (entry(dtype={}), ["LPS311", "'a'", "dtype"]),
    "f4 not ending on a byte": (entry(dtype="F4", shape=[13]), ["LPS311", "'a'", "6.5 bytes"]),
    "nan in the header": (entry(shape=[float("nan")]), ["LPS308", "NaN"]),
}


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["F32", "F4"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@contextlib.contextmanager
def refuses(code: str, *words: str) -> Generator[pytest.ExceptionInfo[LpsparseError]]:
    """Expect an error of this code that gives these names and numbers."""
    with pytest.raises(LpsparseError) as refused:
        yield refused
    assert refused.value.code == code and not [word for word in words if word not in str(refused.value)]


def peak_of(read: Callable[[], object]) -> int:
    """Bytes that were allocated at most while it read, or refused."""
    tracemalloc.start()
    try:
        with contextlib.suppress(InputError):
            read()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


EMPTY_INDEX = "model.safetensors.index.json"


def write_index(folder: Path, table: Any) -> Path:
    write_safetensors(folder / "one.safetensors", {"a": f32(7, 13), "b": f32(7)})
    path = folder / EMPTY_INDEX
    path.write_bytes(table if isinstance(table, bytes) else json.dumps(table).encode())
    return path


def save(path: Path, value: object) -> Path:
    torch.save(value, path)
    return path


class Exploit:
    """Runs a command when unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


def rezipped(
    path: Path, made: Path, method: int, edit: Callable[[str, bytes], bytes] = lambda _, d: d
) -> Path:
    """A torch file with its members edited, zipped again."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(made, "w", method) as new:
        for info in old.infolist():
            new.writestr(info.filename, edit(info.filename, old.read(info)))
    return made


SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


def again(shards: Path, out: Path) -> str:
    """Prune, and what was said."""
    said: list[str] = []
    prune_step(resolve(PruneStep, {"model": str(shards), "out": out, "sparsity": 0.5}), said.append)
    return "\n".join(said)
