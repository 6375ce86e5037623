"""Layouts that store zeros as no bytes: bit-exact both ways, smaller where it pays; bitmask refused when it
lies."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch
from support.cli import Ran, cli_environment
from support.files import PRUNABLE, Given, f32, refuses, tiny_arrays, tree_hash, write_safetensors

import lpsparse
from lpsparse import load, pack, prune, unpack, verify
from lpsparse.checkpoint.layouts import bitmask
from lpsparse.checkpoint.open import open_checkpoint
from lpsparse.errors import InputError, LpsparseError

Cli = Callable[..., Ran]


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


# There and back


@pytest.mark.parametrize("layout", ["bitmask", "packed"])
@pytest.mark.parametrize("source", ["tiny", "shards"])
def test_pack_then_unpack_gives_back_every_file_of_weights_and_sidecars(
    source: str, layout: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    prune(request.getfixturevalue(source), tmp_path / "sparse", sparsity=0.8)
    pack(tmp_path / "sparse", tmp_path / "packed", layout=layout)
    unpack(tmp_path / "packed", tmp_path / "back")
    before, after = tree_hash(tmp_path / "sparse"), tree_hash(tmp_path / "back")
    said = {"lpsparse.json", "report.json", "README.md"}  # these tell where each folder came from
    assert before.keys() == after.keys()
    assert {name for name in before if before[name] != after[name]} <= said


def awkward(draw: np.random.Generator) -> np.ndarray:
    """Random bits of float32, mostly zero, with both zeros and subnormals and no NaN."""
    values = (
        draw.integers(0, 0x7F800000, (31, 37), np.uint32) | draw.integers(0, 2, (31, 37), np.uint32) << 31
    )
    values[draw.random((31, 37)) < 0.8] = 0
    values[:5, :5] = 0x80000000
    values[5, :5] = 1
    return values.view(np.float32)


@pytest.mark.parametrize("layout", ["bitmask", "packed"])
def test_minus_zero_and_subnormals_come_back_bit_for_bit(layout: str, tmp_path: Path) -> None:
    array = awkward(np.random.default_rng(5))
    save_file({"a.weight": array}, tmp_path / "m.safetensors")
    report = pack(tmp_path / "m.safetensors", tmp_path / "packed", layout=layout)
    assert report.tensors[0].layout == layout
    assert report.tensors[0].zeros == np.count_nonzero(array == 0)
    (tensor,) = open_checkpoint(tmp_path / "packed").tensors
    assert tensor.read().tobytes() == array.tobytes()


SHAPES = hnp.array_shapes(min_dims=2, max_dims=2, max_side=19)


@settings(max_examples=80, deadline=None)
@given(
    block=hnp.arrays(np.uint16, SHAPES, elements=st.just(0) | st.integers(0, 65535)), at=st.integers(0, 18)
)
def test_any_block_of_rows_decodes_to_itself_from_any_row(block: np.ndarray, at: int) -> None:
    parts = bitmask.encode(block, 0)
    offsets = np.append(parts["row_offsets"], np.uint64(parts["compressed"].size))
    read: Any = lambda part, first, count: parts[part].ravel()[first : first + count]  # noqa: E731
    packed = bitmask.Packed("here", "F16", block.shape, block.shape[1], 0, offsets, read)
    first = min(at, block.shape[0] - 1)
    assert np.array_equal(packed.decode(first, block.shape[0]), block[first:])


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
)
@pytest.mark.parametrize("layout", ["bitmask", "packed"])
def test_every_float_dtype_packs_and_comes_back(dtype: torch.dtype, layout: str, tmp_path: Path) -> None:
    values = torch.randn(101, 7, 13, generator=torch.Generator().manual_seed(2))
    values[values.abs() < 2] = 0
    save_torch({"conv.weight": values.to(dtype)}, tmp_path / "m.safetensors")
    assert pack(tmp_path / "m.safetensors", tmp_path / "packed", layout=layout).tensors[0].layout == layout
    found = load(tmp_path / "packed")["conv.weight"]
    assert found.dtype == dtype and found.shape == values.shape
    assert torch.equal(found.double(), values.to(dtype).double())


@pytest.mark.parametrize("layout", ["bitmask", "packed"])
def test_more_dimensions_than_a_layout_has_stay_dense(layout: str, tmp_path: Path) -> None:
    given = {f"{n}.weight": np.zeros((1,) * (n - 2) + (64, 64), np.float32) for n in (16, 17, 20, 64)}
    for array in given.values():
        array[..., 3] = 7
    save_file(given, tmp_path / "m.safetensors")
    found = pack(tmp_path / "m.safetensors", tmp_path / "packed", layout=layout)
    assert {row.name: row.layout for row in found.tensors} == {
        name: layout if name == "16.weight" else "dense" for name in given
    }
    assert verify(tmp_path / "packed", tmp_path / "m.safetensors")["ok"]


@pytest.mark.parametrize("layout", ["dense", "bitmask", "packed", "torch"])
def test_rows_that_are_not_there_are_no_other_tensors(layout: str, tmp_path: Path) -> None:
    save_file({name: np.eye(8, dtype=np.float32) for name in "ab"}, tmp_path / "m.safetensors")
    torch.save({name: torch.eye(8) for name in "ab"}, tmp_path / "m.pt")
    if layout in ("bitmask", "packed"):
        pack(tmp_path / "m.safetensors", tmp_path / "out", layout=layout)
    path = {"dense": "m.safetensors", "torch": "m.pt"}.get(layout, "out")
    tensor = lpsparse.open(tmp_path / path)["b"]
    assert np.array_equal(tensor.read_rows(2, 5).view(np.float32), np.eye(8)[2:5])
    assert tensor.read_rows(8, 8).shape == (0, 8)
    for first, last in ((-2, 2), (-3, -1), (5, 2), (7, 9), (9, 9)):
        with pytest.raises(IndexError, match=f"b: rows {first}..{last}, there are 8"):
            tensor.read_rows(first, last)


def test_blocks_of_rows_do_not_change_the_packed_bytes(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prune(tiny, tmp_path / "sparse", sparsity=0.8)
    pack(tmp_path / "sparse", tmp_path / "whole", layout="bitmask")
    monkeypatch.setattr("lpsparse.checkpoint.tensors.BLOCK_BYTES", 100)
    pack(tmp_path / "sparse", tmp_path / "blocks", layout="bitmask")
    assert tree_hash(tmp_path / "whole") == tree_hash(tmp_path / "blocks")
    unpack(tmp_path / "blocks", tmp_path / "back")
    assert weights(tmp_path / "back") == weights(tmp_path / "sparse")


@pytest.mark.parametrize("layout", ["bitmask", "packed"])
def test_prune_in_a_layout_equals_prune_then_pack(layout: str, tiny: Path, tmp_path: Path) -> None:
    prune(tiny, tmp_path / "at once", sparsity=0.8, layout=layout)
    prune(tiny, tmp_path / "sparse", sparsity=0.8)
    pack(tmp_path / "sparse", tmp_path / "packed", layout=layout)
    pack(tmp_path / "packed", tmp_path / "again", layout=layout)
    assert weights(tmp_path / "at once") == weights(tmp_path / "packed") == weights(tmp_path / "again")


@pytest.mark.parametrize("layout", ["bitmask", "packed"])
def test_a_packed_model_can_be_pruned_further(layout: str, tiny: Path, tmp_path: Path) -> None:
    prune(tiny, tmp_path / "packed", sparsity=0.5, layout=layout)
    prune(tmp_path / "packed", tmp_path / "further", sparsity=0.9)
    prune(tiny, tmp_path / "direct", sparsity=0.9)
    assert weights(tmp_path / "further") == weights(tmp_path / "direct")


@pytest.mark.parametrize("layout", ["bitmask", "packed"])
def test_nan_and_infinity_are_carried_bit_for_bit_and_said(layout: str, tmp_path: Path, cli: Cli) -> None:
    bits = np.array([0x7FC00001, 0xFFFFFFFF, 0x7F800000, 0xFF800001, *[0] * 1001], np.uint32)
    save_file({"a.weight": np.tile(bits, (13, 1)).view(np.float32)}, tmp_path / "m.safetensors")
    ran = cli("pack", tmp_path / "m.safetensors", tmp_path / "packed", "--layout", layout)
    assert ran.rc == 0 and "'a.weight': 52 values are NaN or Inf; kept as they are" in ran.stderr
    assert verify(tmp_path / "packed", tmp_path / "m.safetensors")["ok"]
    unpack(tmp_path / "packed", tmp_path / "back")
    assert load_file(tmp_path / "back" / "model.safetensors")["a.weight"].tobytes() == bits.tobytes() * 13


# On disk


def test_the_four_parts_have_the_bytes_that_the_format_says(tmp_path: Path) -> None:
    rows = [[0, 1, 0, 0, 2, 0, 0, 0, 3], [-0.0, 0, 0, 0, 0, 0, 0, 4, 0]]
    save_file({"w.weight": np.array(rows, np.float32)}, tmp_path / "m.safetensors")
    pack(tmp_path / "m.safetensors", tmp_path / "packed", layout="bitmask")
    header = (
        b'{"__metadata__":{"format":"pt","lpsparse.format_version":"1","lpsparse.layout":"bitmask",'
        b'"lpsparse.order":"[\\"w.weight\\"]"},'
        b'"w.row_offsets":{"dtype":"I64","shape":[2],"data_offsets":[0,16]},'
        b'"w.shape":{"dtype":"I64","shape":[2],"data_offsets":[16,32]},'
        b'"w.compressed":{"dtype":"F32","shape":[5],"data_offsets":[32,52]},'
        b'"w.bitmask":{"dtype":"U8","shape":[2,2],"data_offsets":[52,56]}}'
    )
    header += b" " * (-len(header) % 8)
    offsets, shape = np.array([0, 3], "<i8").tobytes(), np.array([2, 9], "<i8").tobytes()
    values = np.array([1, 2, 3, -0.0, 4], "<f4").tobytes()
    mask = bytes([0b00010010, 0b1, 0b10000001, 0b0])  # least significant bit first
    data = (tmp_path / "packed" / "lpsparse.safetensors").read_bytes()
    assert data == len(header).to_bytes(8, "little") + header + offsets + shape + values + mask


NAMES = (
    "a.weight",
    "a",
    "a.tensor",
    "a.tensor.weight",
    "a.weight.tensor",
    "a.weight.weight",
    ".weight",
    "weight",
)


def test_a_weight_has_the_parts_names_of_compressed_tensors_and_any_other_tensor_some_of_its_own() -> None:
    assert bitmask.stored_names("a.weight") == ("a.compressed", "a.bitmask", "a.shape", "a.row_offsets")
    assert [bitmask.name_of(bitmask.prefix_of(name)) for name in NAMES] == list(NAMES)
    assert len({bitmask.prefix_of(name) for name in NAMES}) == len(NAMES)


def test_a_matrix_without_weight_in_its_name_comes_back_under_it(tmp_path: Path) -> None:
    given = {name: np.zeros((31, 37), np.float32) for name in NAMES}
    save_file(given, tmp_path / "m.safetensors")
    assert {
        row.layout for row in pack(tmp_path / "m.safetensors", tmp_path / "packed", layout="bitmask").tensors
    } == {"bitmask"}
    assert load(tmp_path / "packed").keys() == given.keys()


def test_names_on_disk_are_none_that_an_ordinary_loader_looks_for(
    tiny: Path, shards: Path, tmp_path: Path
) -> None:
    for model in (tiny, shards):
        prune(model, tmp_path / f"{model.name}-packed", sparsity=0.8, layout="bitmask")
    one, three = tree_hash(tmp_path / "tiny-packed"), tree_hash(tmp_path / "shards-packed")
    assert "lpsparse.safetensors" in one
    assert "lpsparse.safetensors.index.json" in three
    assert {name for name in three if name.endswith(".safetensors")} == {
        f"lpsparse-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)
    }
    assert not [name for name in (*one, *three) if name.startswith(("model", "pytorch_model"))]


def test_a_packed_shard_index_names_the_parts_and_their_files(shards: Path, tmp_path: Path) -> None:
    prune(shards, tmp_path / "packed", sparsity=0.9, layout="bitmask")
    weight_map = json.loads((tmp_path / "packed" / "lpsparse.safetensors.index.json").read_text())[
        "weight_map"
    ]
    for name, file in weight_map.items():
        with safe_open(tmp_path / "packed" / file, "np") as opened:
            assert name in opened.keys()  # noqa: SIM118
    assert set(bitmask.stored_names(PRUNABLE[0])) <= weight_map.keys()


def test_transformers_opens_the_dense_folder_and_refuses_the_packed_one(tmp_path: Path) -> None:
    prune("bundled:stories260k", tmp_path / "dense", sparsity=0.7)
    pack(tmp_path / "dense", tmp_path / "packed")
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM as Auto\n"
        "model = Auto.from_pretrained(sys.argv[1])\n"
        "print(sum(int((p == 0).sum()) for n, p in model.named_parameters() if 'layers' in n))\n"
        "try: Auto.from_pretrained(sys.argv[2])\n"
        "except OSError: print('OSError')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "dense"), str(tmp_path / "packed")],
        env=cli_environment(TRANSFORMERS_VERBOSITY="error"),
        capture_output=True,
        text=True,
        check=True,
    )
    zeros = sum(row.zeros for row in lpsparse.report(tmp_path / "dense").tensors if "layers" in row.name)
    assert done.stdout.split() == [str(zeros), "OSError"]


def test_a_sparse_model_packs_to_the_size_that_report_foretold(tmp_path: Path) -> None:
    sparse = prune("bundled:stories260k", tmp_path / "sparse", sparsity=0.9)
    packed = pack(tmp_path / "sparse", tmp_path / "packed", layout="bitmask")
    assert packed.bytes.file_bytes == sparse.bytes.bitmask_bytes == packed.bytes.bitmask_bytes
    assert packed.bytes.file_bytes < 0.5 * sparse.bytes.file_bytes
    assert (packed.prunable, packed.all) == (sparse.prunable, sparse.all)
    assert packed.bytes.dense_bytes == sparse.bytes.dense_bytes
    assert verify(tmp_path / "packed")["ok"]


def test_a_tensor_stays_dense_where_packing_does_not_pay(tiny: Path, tmp_path: Path) -> None:
    prune(tiny, tmp_path / "out", sparsity=1, include="layers.0.*.weight", layout="bitmask", allow_empty=True)
    layouts = {tensor.name: tensor.layout for tensor in open_checkpoint(tmp_path / "out").tensors}
    assert {name for name, layout in layouts.items() if layout == "bitmask"} == set(PRUNABLE[:2])
    assert layouts.keys() == tiny_arrays().keys()


@pytest.mark.parametrize(
    ("dtype", "shape", "stored", "yes"),
    [
        ("F32", (7, 13), 0, True),
        ("F32", (7, 13), 69, True),
        ("F32", (7, 13), 70, False),
        ("F32", (91,), 0, False),
        ("F32", (), 0, False),
        ("F32", (0, 13), 0, False),
        ("I64", (7, 13), 0, False),
        ("BOOL", (101, 103), 0, False),
        ("F16", (7, 13), 47, True),
        ("F16", (7, 13), 48, False),  # 182 bytes either way
    ],
)
def test_packing_pays_when_its_four_parts_are_fewer_bytes(
    dtype: str, shape: tuple[int, ...], stored: int, yes: bool
) -> None:
    # 7 x 13 in F32: 364 bytes dense; packed 4 a value, 14 of mask, 16 of shape, 56 of row offsets
    assert bitmask.pays(dtype, shape, stored) == yes


@pytest.mark.parametrize("extra", ["a.bitmask", "a.compressed", "a.weight.bitmask", "other.bitmask"])
def test_names_that_belong_to_the_layout_are_refused_not_confused(extra: str, tmp_path: Path) -> None:
    given = {"a.weight": ("F32", [7, 13], bytes(364)), extra: ("U8", [7, 13], bytes(range(91)))}
    write_safetensors(tmp_path / "m.safetensors", given)
    with refuses("LPS342") as refused:
        pack(tmp_path / "m.safetensors", tmp_path / "packed", layout="bitmask")
    assert repr(extra) in refused.value.what
    assert os.listdir(tmp_path) == ["m.safetensors"]


# Lies


def packed_file(path: Path, metadata: dict[str, str] | None = None, **changes: Given | None) -> Path:
    """The packed form of a 2 x 9 weight `w`, with some parts changed or left out."""
    parts: dict[str, Given | None] = {
        "compressed": ("F32", [5], np.arange(1, 6, dtype="<f4").tobytes()),
        "bitmask": ("U8", [2, 2], bytes([0b00010010, 1, 0b10000001, 0])),
        "shape": ("I64", [2], np.array([2, 9], "<i8").tobytes()),
        "row_offsets": ("I64", [2], np.array([0, 3], "<i8").tobytes()),
    }
    given = {f"w.tensor.{part}": value for part, value in (parts | changes).items() if value is not None}
    metadata = {"lpsparse.layout": "bitmask", "lpsparse.format_version": "1"} | (metadata or {})
    return write_safetensors(path / "lpsparse.safetensors", given, metadata)


def integers(*values: int) -> Given:
    return "I64", [len(values)], b"".join(value.to_bytes(8, "little", signed=value < 0) for value in values)


def test_the_packed_file_of_the_lies_below_is_true_before_they_are_told(tmp_path: Path) -> None:
    found = load(packed_file(tmp_path))["w"]
    assert found.tolist() == [[0, 1, 0, 0, 2, 0, 0, 0, 3], [4, 0, 0, 0, 0, 0, 0, 5, 0]]


LIES: dict[str, dict[str, Given | None]] = {
    "a bit too many": {"bitmask": ("U8", [2, 2], bytes([0b00010011, 1, 0b10000001, 0]))},
    "a bit too few": {"bitmask": ("U8", [2, 2], bytes([0b00010010, 1, 0b10000000, 0]))},
    "a bit in another row": {"bitmask": ("U8", [2, 2], bytes([0b00010010, 0, 0b10000001, 1]))},
    "values too many": {"compressed": ("F32", [6], bytes(24))},
    "values too few": {"compressed": ("F32", [2], bytes(8))},
    "offsets fall": {"row_offsets": integers(3, 0)},
    "offsets past the end": {"row_offsets": integers(0, 6)},
    "offsets negative": {"row_offsets": integers(0, -1)},
    "offsets not from zero": {"row_offsets": integers(1, 3)},
    "offsets too many": {"row_offsets": integers(0, 3, 5)},
    "offsets of another dtype": {"row_offsets": ("F64", [2], bytes(16))},
    "shape of more rows": {"shape": integers(3, 9)},
    "shape of more columns": {"shape": integers(2, 17)},
    "shape enormous": {"shape": integers(2, 2**62)},
    "shape negative": {"shape": integers(2, -9)},
    "shape of one dimension": {"shape": integers(18)},
    "shape of no dimension": {"shape": integers()},
    "shape of 17 dimensions": {"shape": integers(2, 9, *[1] * 15)},
    "shape of another dtype": {"shape": ("U8", [2], b"\2\11")},
    "shape empty and enormous": {
        "shape": integers(2, 0, 2**64 - 1),
        "bitmask": ("U8", [2, 0], b""),
        "compressed": ("F32", [0], b""),
        "row_offsets": integers(0, 0),
    },
    "mask of another dtype": {"bitmask": ("I8", [2, 2], bytes(4))},
    "mask of another shape": {"bitmask": ("U8", [4], bytes(4))},
    "values of integers": {"compressed": ("I32", [5], bytes(20))},
    "values in two dimensions": {"compressed": ("F32", [5, 1], bytes(20))},
    "values missing": {"compressed": None},
    "offsets missing": {"row_offsets": None},
    "shape missing": {"shape": None},
}


IN_THE_VALUES = ("a bit too many", "a bit too few", "a bit in another row", "values too many")


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_about_sizes_is_seen_before_any_value_is_read(lie: str, tmp_path: Path) -> None:
    path = packed_file(tmp_path, None, **LIES[lie])
    if lie in IN_THE_VALUES:
        assert [tensor.name for tensor in open_checkpoint(path).tensors] == ["w"]
    else:
        with pytest.raises(InputError, match=r"'w'"):
            open_checkpoint(path)


@pytest.mark.parametrize("changes", LIES.values(), ids=LIES.keys())
def test_a_packed_file_that_lies_is_refused(changes: dict[str, Given | None], tmp_path: Path) -> None:
    path = packed_file(tmp_path, None, **changes)
    with pytest.raises(InputError, match=r"'w'"):
        [tensor.read() for tensor in open_checkpoint(path).tensors]
    with pytest.raises(LpsparseError) as refused:
        unpack(path, tmp_path / "out")
    assert int(refused.value.exit_code) == 3
    assert os.listdir(tmp_path) == ["lpsparse.safetensors"]


@pytest.mark.parametrize("metadata", [{"lpsparse.layout": "better"}, {"lpsparse.format_version": "2"}])
def test_a_layout_of_a_newer_lpsparse_is_refused_not_read_as_something_else(
    metadata: dict[str, str], tmp_path: Path
) -> None:
    with refuses("LPS336"):
        open_checkpoint(packed_file(tmp_path, metadata))


def test_parts_without_the_layouts_mark_are_ordinary_tensors(tmp_path: Path) -> None:
    path = write_safetensors(
        tmp_path / "m.safetensors", {"w.bitmask": ("U8", [7], bytes(7)), "w.shape": f32(2)}
    )
    assert [tensor.name for tensor in open_checkpoint(path).tensors] == ["w.bitmask", "w.shape"]


# From Python


def test_load_gives_dense_torch_tensors_of_any_layout(tiny: Path, tmp_path: Path) -> None:
    prune(tiny, tmp_path / "dense", sparsity=0.8)
    pack(tmp_path / "dense", tmp_path / "packed")
    pack(tmp_path / "dense", tmp_path / "bitmask", layout="bitmask")
    expected = load_file(tmp_path / "dense" / "model.safetensors")
    for folder in ("dense", "packed", "bitmask"):
        found = load(tmp_path / folder)
        assert found.keys() == expected.keys()
        assert all(found[name].numpy().tobytes() == array.tobytes() for name, array in expected.items())
        assert all(found[name].shape == array.shape for name, array in expected.items())


def test_loaded_tensors_can_be_written_to(tiny: Path) -> None:
    found = load(tiny)[PRUNABLE[0]]
    found.zero_()
    assert int(found.count_nonzero()) == 0
    assert np.count_nonzero(load_file(tiny / "model.safetensors")[PRUNABLE[0]]) == 91


def test_open_is_lazy_and_tells_layout_dtype_and_shape(tiny: Path, tmp_path: Path) -> None:
    prune(tiny, tmp_path / "packed", sparsity=0.9, layout="bitmask")
    opened = lpsparse.open(tmp_path / "packed")
    tensor = next(tensor for tensor in opened.tensors if tensor.name == PRUNABLE[0])
    assert (opened.layout, tensor.layout, tensor.dtype, tensor.shape) == (
        "bitmask",
        "bitmask",
        "F32",
        (7, 13),
    )
    assert (tensor.size, tensor.nbytes) == (91, 364)
    assert math.prod(tensor.read().shape) == 91
