"""The packed layout: what the page says is what is written, every bit comes back, and lies are refused before
anything is allocated for them."""

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import load_file
from support.files import ROOT, peak_of, refuses, write_safetensors

import lpsparse
from lpsparse import pack, unpack, verify
from lpsparse.checkpoint.dtypes import DTYPES
from lpsparse.checkpoint.layouts import packed
from lpsparse.checkpoint.layouts.packing.chunks import LEVELS, decode_chunk, encode_chunk
from lpsparse.checkpoint.layouts.packing.frames import BrokenError
from lpsparse.checkpoint.open import open_checkpoint
from lpsparse.errors import InputError

GOLDEN = ROOT / "tests" / "golden"
HOSTILE = sorted((GOLDEN / "hostile").glob("*.safetensors"))
FLOATS = {
    "F64": (11, 52),
    "F32": (8, 23),
    "F16": (5, 10),
    "BF16": (8, 7),
    "F8_E4M3": (4, 3),
    "F8_E5M2": (5, 2),
}


# A reader by docs/format.md alone: Python, and zstd. It shares no line with ours.


def parts(data: bytes) -> list[bytes]:
    found = []
    while data:
        (size,) = struct.unpack_from("<I", data)
        found.append(data[4 : 4 + size])
        data = data[4 + size :]
    return found


def box(data: bytes, size: int) -> bytes:
    return data if len(data) == size else zstandard.ZstdDecompressor().decompress(data)


def bits_of(data: bytes, width: int) -> Iterator[int]:
    """Numbers of `width` bits, the first in the lowest bits."""
    return (byte >> at & (1 << width) - 1 for byte in data for at in range(0, 8, width))


def kept_of(mask: bytes, n: int) -> list[int]:
    kind, body = mask[0], mask[1:]
    if kind < 2:
        return list(range(n)) if kind else []
    if kind == 2:
        return [i for i, bit in enumerate(bits_of(box(body, -(-n // 8)), 1)) if bit]
    place, kept = -1, []
    for gap in box(body[4:], struct.unpack_from("<I", body)[0]):
        place += gap if gap == 255 else gap + 1
        kept += [] if gap == 255 else [place]
    return kept


def exponents_of(plane: bytes, k: int, wide: bool) -> list[int]:
    width, body = plane[0], plane[1:]
    if not width:
        return [struct.unpack("<H", body)[0]] * k if k else []
    table, symbols, escapes = parts(body)
    found = list(bits_of(box(symbols, -(-k * width // 8)), width))[:k]
    escape = (1 << width) - 1
    size = found.count(escape) * (2 if wide else 1) if escapes else 0
    rest = iter(
        struct.unpack("<" + ("H" if wide else "B") * found.count(escape), box(escapes, size)) if size else ()
    )
    known = struct.unpack(f"<{len(table) // 2}H", table)
    return [next(rest) if symbol == escape else known[symbol] for symbol in found]


def chunk_by_the_page(chunk: bytes, n: int, dtype: str) -> list[int]:
    if dtype not in FLOATS:
        planes = [box(part, n) for part in parts(chunk)]
        return [sum(plane[i] << 8 * j for j, plane in enumerate(planes)) for i in range(n)]
    e, m = FLOATS[dtype]
    mask, plane, rest = parts(chunk)
    kept = kept_of(mask, n)
    exponents, values = exponents_of(plane, len(kept), e > 8), [0] * n
    planes, whole = parts(rest), (1 + m) // 8
    octets = [box(part, len(kept)) for part in planes[:whole]]
    bits = [list(bits_of(box(part, -(-len(kept) // 8)), 1)) for part in planes[whole:]]
    for i, place in enumerate(kept):
        low = sum(plane[i] << 8 * j for j, plane in enumerate(octets))
        low |= sum(plane[i] << 8 * whole + j for j, plane in enumerate(bits))
        values[place] = low >> m << e + m | exponents[i] << m | low & (1 << m) - 1
    return values


def file_by_the_page(path: Path) -> dict[str, list[int]]:
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    manifest = json.loads(header["__metadata__"]["lpsparse.manifest"])
    found = {}
    for name, described in manifest["tensors"].items():
        begin, end = header[name + ".packed" * bool(described)]["data_offsets"]
        stored = data[8 + size + begin : 8 + size + end]
        if described:
            found[name] = tensor_by_the_page(stored, described["dtype"], described["shape"])
        else:
            width = DTYPES[header[name]["dtype"]].storage.itemsize
            found[name] = [
                int.from_bytes(stored[i : i + width], "little") for i in range(0, len(stored), width)
            ]
    return found


def tensor_by_the_page(stored: bytes, dtype: str, shape: list[int]) -> list[int]:
    assert stored[:5] == b"LPSP\1" and stored[8:24].rstrip(b"\0").decode() == dtype and len(stored) % 8 == 0
    (values,) = struct.unpack_from("<Q", stored, 24)
    assert list(struct.unpack_from(f"<{stored[5]}Q", stored, 32)) == shape
    total = math.prod(shape)
    count = -(-total // values)
    ends = struct.unpack_from(f"<{count}Q", stored, 32 + 8 * len(shape))
    start, found = 32 + 8 * (len(shape) + count), []
    for i, end in enumerate(ends):
        found += chunk_by_the_page(stored[start:end], min(values, total - i * values), dtype)
        start = end
    return found


def bits(array: np.ndarray) -> list[int]:
    return array.reshape(-1).view(f"<u{array.itemsize}").tolist()


def test_a_reader_written_by_the_page_alone_reads_the_golden_file() -> None:
    dense = load_file(GOLDEN / "dense.safetensors")
    found = file_by_the_page(GOLDEN / "packed-1.safetensors")
    assert found.keys() == dense.keys()
    assert all(found[name] == bits(array) for name, array in dense.items())


def test_the_golden_file_opens_and_is_what_is_written_today(tmp_path: Path) -> None:
    dense = load_file(GOLDEN / "dense.safetensors")
    found = lpsparse.load(GOLDEN / "packed-1.safetensors")
    assert all(found[name].numpy().tobytes() == array.tobytes() for name, array in dense.items())
    assert all(found[name].shape == array.shape for name, array in dense.items())
    pack(GOLDEN / "dense.safetensors", tmp_path / "packed")
    today = file_by_the_page(tmp_path / "packed" / "lpsparse.safetensors")
    assert today == file_by_the_page(GOLDEN / "packed-1.safetensors")
    if zstandard.ZSTD_VERSION == (1, 5, 7):  # another one may compress to other bytes
        golden = (GOLDEN / "packed-1.safetensors").read_bytes()
        assert (tmp_path / "packed" / "lpsparse.safetensors").read_bytes() == golden


# There and back


@st.composite
def chunks(draw: st.DrawFn) -> tuple[str, np.ndarray]:
    dtype = draw(st.sampled_from([*FLOATS, "I64", "U8", "BOOL", "F8_E8M0"]))
    kind = DTYPES[dtype].storage
    top = (1 << 8 * kind.itemsize) - 1
    e, m = FLOATS.get(dtype, (0, 8 * kind.itemsize - 1))
    near = st.integers(0, 3).map(lambda n: ((1 << e) // 2 - n) << m)  # of a few binades, as weights are
    special = st.sampled_from([0, 0, 0, 0, 1, 1 << e + m, ((1 << e) - 1) << m, ((1 << e) - 1) << m | 1, top])
    values = st.one_of(special, st.integers(0, top), near.map(lambda n: n & top))
    sizes = st.one_of(st.integers(1, 40), st.integers(500, 900))
    fill = draw(st.sampled_from([0, 0, 1, top]))
    return dtype, draw(hnp.arrays(kind, sizes, elements=values, fill=st.just(fill)))


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(chunks(), st.sampled_from(LEVELS))
def test_any_bits_come_back_from_a_chunk_and_by_the_page(chunk: tuple[str, np.ndarray], level: str) -> None:
    dtype, values = chunk
    stored = encode_chunk(values, dtype, level)
    assert stored == encode_chunk(values, dtype, level)
    assert np.array_equal(decode_chunk(memoryview(stored), values.size, dtype), values)
    assert chunk_by_the_page(stored, values.size, dtype) == values.tolist()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_range_of_lines_of_any_shape_is_read_alone(
    data: st.DataObject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "lpsparse.checkpoint.tensors.BLOCK_BYTES", data.draw(st.sampled_from([64, 200, 2 << 20]))
    )
    monkeypatch.setattr(
        "lpsparse.checkpoint.layouts.packed.BLOCK_BYTES", data.draw(st.sampled_from([64, 200, 2 << 20]))
    )
    shape = data.draw(st.sampled_from([(300,), (1, 801), (31, 37), (3, 16, 24), (1, 7, 64), (129, 1)]))
    draw = np.random.default_rng(data.draw(st.integers(0, 9)))
    array = np.where(draw.random(shape) < 0.3, draw.standard_normal(shape), 0).astype(np.float32)
    path = write_safetensors(tmp_path / "m.safetensors", {"w": ("F32", list(shape), array.tobytes())})
    pack(path, tmp_path / "out", overwrite=True)
    (tensor,) = open_checkpoint(tmp_path / "out").tensors
    lines, width = tensor.grid
    first = data.draw(st.integers(0, lines - 1))
    last = data.draw(st.integers(first + 1, lines))
    found = np.concatenate([block.reshape(-1) for _, block in tensor.blocks(first, last)])
    assert found.tolist() == bits(array)[first * width : last * width]


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_unpacks_to_the_same_file(level: str, tmp_path: Path) -> None:
    lpsparse.prune("bundled:stories260k", tmp_path / "sparse", sparsity=0.8)
    report = pack(tmp_path / "sparse", tmp_path / "packed", level=level)
    unpack(tmp_path / "packed", tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (
        tmp_path / "sparse" / "model.safetensors"
    ).read_bytes()
    assert verify(tmp_path / "packed", tmp_path / "sparse")["ok"]
    assert report.bytes.file_bytes < 0.4 * report.bytes.dense_bytes


def test_threads_and_dry_runs_make_no_difference(tmp_path: Path) -> None:
    lpsparse.prune("bundled:stories260k", tmp_path / "sparse", sparsity=0.8)
    found = [pack(tmp_path / "sparse", tmp_path / str(n), threads=n) for n in (1, 3)]
    told = pack(tmp_path / "sparse", tmp_path / "dry", dry_run=True)
    files = [(tmp_path / str(n) / "lpsparse.safetensors").read_bytes() for n in (1, 3)]
    assert files[0] == files[1] and told.bytes.file_bytes == len(files[0]) == found[0].bytes.file_bytes
    assert [row.stored_bytes for row in told.tensors] == [row.stored_bytes for row in found[0].tensors]


def test_without_zeros_no_tensor_grows_and_the_file_by_64_kib_at_most(tmp_path: Path) -> None:
    draw = np.random.default_rng(3)
    noise = {f"{n}.weight": ("F32", [64, 96], draw.bytes(64 * 96 * 4)) for n in range(40)}
    path = write_safetensors(tmp_path / "m.safetensors", noise)
    report = pack(path, tmp_path / "packed")
    assert all(row.stored_bytes <= row.dense_bytes for row in report.tensors)
    assert report.bytes.file_bytes <= path.stat().st_size + (64 << 10)


# Lies


@pytest.mark.parametrize("path", HOSTILE, ids=lambda path: path.stem)
def test_a_hostile_file_is_refused_before_anything_is_allocated(path: Path, tmp_path: Path) -> None:
    def read() -> None:
        for tensor in open_checkpoint(path).tensors:
            tensor.read()

    with pytest.raises(InputError) as refused:
        read()
    assert refused.value.code in ("LPS343", "LPS336") and path.name in refused.value.what
    assert peak_of(read) < 1 << 20
    with pytest.raises(InputError):
        unpack(path, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_there_are_as_many_hostile_files_as_are_known() -> None:
    assert len(HOSTILE) >= 40


def golden_with(tmp_path: Path, **changes: Any) -> Path:
    """The golden file with another manifest, or entries of other names."""
    data = (GOLDEN / "packed-1.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    manifest = json.loads(header["__metadata__"][packed.MANIFEST])
    for name, described in changes.pop("tensors", {}).items():
        manifest["tensors"] |= {name: described}
        if described is None:
            del manifest["tensors"][name]
    manifest |= changes.pop("manifest", {})
    header["__metadata__"][packed.MANIFEST] = changes.pop("text", json.dumps(manifest))
    for name, new in changes.items():
        header[new] = header.pop(name)
    text = json.dumps(header).encode()
    path = tmp_path / "lpsparse.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    return path


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"tensors": {"other": {}}}, "'other' is missing"),
        ({"tensors": {"other": {"dtype": "F32", "shape": [7]}}}, "'other.packed' is missing"),
        ({"tensors": {"scale": None}}, "'scale' is not in its manifest"),
        ({"tensors": {"none.weight": None}}, "'none.weight.packed' is not in its manifest"),
        ({"tensors": {"none.weight": {"dtype": "F32", "shape": [17, 13]}}}, "its manifest has F32 (17, 13)"),
        ({"tensors": {"none.weight": {"dtype": "I32", "shape": [13, 17]}}}, "its manifest has I32"),
        ({"tensors": {"none.weight": {"dtype": "F32", "shape": [-1]}}}, "is not understood"),
        ({"tensors": {"none.weight": {"dtype": "F32"}}}, "is not understood"),
        ({"tensors": {"none.weight": {}}}, "'none.weight' is missing"),
        ({"manifest": {"format_version": 2}}, "newer lpsparse"),
        ({"manifest": {"layout": "bitmask"}}, "is not understood"),
        ({"manifest": {"more": 1}}, "is not understood"),
        ({"text": "{"}, "is not understood"),
        ({"text": '{"format_version":1,"format_version":1}'}, "is not understood"),
    ],
)
def test_a_manifest_that_is_not_the_file_s_is_refused(
    changes: dict[str, Any], what: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as refused:
        open_checkpoint(golden_with(tmp_path, **changes))
    assert what in refused.value.what


def test_names_that_meet_in_two_shards_are_refused_not_lost(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x.safetensors", {"x": ("F32", [64, 96], bytes(64 * 96 * 4))})
    write_safetensors(tmp_path / "x.packed.safetensors", {"x.packed": ("U8", [16], bytes(16))})
    index = {"weight_map": {"x": "x.safetensors", "x.packed": "x.packed.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with refuses("LPS342", "'x.packed'"):
        pack(tmp_path, tmp_path.parent / "out-of-two")
    assert not (tmp_path.parent / "out-of-two").exists()


@pytest.mark.parametrize(("dtype", "shape"), [("F32", (2, 5_000_001)), ("BF16", (1, 8_388_609))])
def test_a_row_that_nothing_divides_is_packed_in_pieces(
    dtype: str, shape: tuple[int, int], tmp_path: Path
) -> None:
    raw = np.zeros(math.prod(shape) * DTYPES[dtype].bits // 8, np.uint8)
    raw[::101] = 63
    path = write_safetensors(tmp_path / "m.safetensors", {"x": (dtype, list(shape), raw.tobytes())})
    pack(path, tmp_path / "out")
    assert verify(tmp_path / "out", path)["ok"]
    tensor = lpsparse.open(tmp_path / "out")["x"]
    last = tensor.read_rows(shape[0] - 1, shape[0])
    assert tensor.layout == "packed" and last.shape == (1, shape[1])
    assert last.tobytes() == raw.tobytes()[-last.nbytes :]


def test_memory_does_not_grow_with_a_tensor_that_transformers_is_told_of(tmp_path: Path) -> None:
    values = np.random.default_rng(1).standard_normal((4096, 2048), np.float32)  # 32 MiB
    write_safetensors(tmp_path / "model.safetensors", {"a": ("F32", [4096, 2048], values.tobytes())})
    (tmp_path / "config.json").write_text("{}")
    assert peak_of(lambda: pack(tmp_path, tmp_path.parent / "packed-big", threads=1)) < 24 << 20


def test_a_tensor_named_like_a_packed_one_is_refused_not_confused(tmp_path: Path) -> None:
    given = {"a.weight": ("F32", [7, 13], bytes(364)), "a.weight.packed": ("U8", [7], bytes(7))}
    path = write_safetensors(tmp_path / "m.safetensors", given)
    with refuses("LPS342", "'a.weight.packed'"):
        pack(path, tmp_path / "packed")


SOURCES = [(dtype, keep) for dtype in (*FLOATS, "I32") for keep in (0.05, 0.5, 1.0)]


def a_chunk(dtype: str, keep: float) -> tuple[bytes, int]:
    draw = np.random.default_rng(7)
    kind = DTYPES[dtype].storage
    values = draw.integers(0, (1 << 8 * kind.itemsize) - 1, 600, kind)
    return encode_chunk(np.where(draw.random(600) < keep, values, 0).astype(kind), dtype, "default"), 600


CHUNKS = {source: a_chunk(*source) for source in SOURCES}


@settings(max_examples=2000, deadline=None)
@given(st.sampled_from(SOURCES), st.data())
def test_any_change_to_a_chunk_decodes_or_is_refused(source: tuple[str, float], data: st.DataObject) -> None:
    stored, count = CHUNKS[source]
    changed = bytearray(stored)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(changed) - 1))
        match data.draw(st.sampled_from(["byte", "cut", "insert"])):
            case "byte":
                changed[at] = data.draw(st.integers(0, 255))
            case "cut" if at:
                del changed[at : at + data.draw(st.integers(1, 9))]
            case _:
                changed[at:at] = data.draw(st.binary(min_size=1, max_size=9))
    try:
        found = decode_chunk(memoryview(bytes(changed)), count, source[0])
    except BrokenError:
        return
    assert found.size == count and found.dtype == DTYPES[source[0]].storage


# As a model


def test_a_packed_model_is_evaluated_and_trained_on_as_the_dense_one(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 400)
    lpsparse.prune("bundled:stories260k", tmp_path / "sparse", sparsity=0.5)
    pack(tmp_path / "sparse", tmp_path / "packed")
    options: dict[str, Any] = {"task": "causal-lm", "data": str(tmp_path / "text.txt")}
    dense, found = (lpsparse.evaluate(tmp_path / name, **options) for name in ("sparse", "packed"))
    assert dense["loss"] == found["loss"]
    trained = lpsparse.finetune(
        tmp_path / "packed", tmp_path / "trained", **options, steps=1, batch_size=2, target_sparsity=0.6
    )
    config = json.loads((tmp_path / "trained" / "config.json").read_text())
    assert trained.layout == "dense" and "quantization_config" not in config


def test_load_refuses_bytes_that_were_changed_since(tmp_path: Path) -> None:
    pack("bundled:stories260k", tmp_path / "packed")
    path = tmp_path / "packed" / "lpsparse.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with refuses("LPS352"):
        lpsparse.load(tmp_path / "packed")
    assert lpsparse.load(tmp_path / "packed", check=False)
