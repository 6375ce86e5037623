"""Sparse checkpoints of compressed-tensors open, and `pack` writes the bytes that it wrote.

The files in golden/compressed-tensors/ are its own: the README.md there says how they were made.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from safetensors.torch import load_file as load_torch
from support.cli import Ran
from support.files import ROOT, Given, f32, refuses, write_safetensors

import lpsparse
from lpsparse import load, pack, prune, unpack, verify
from lpsparse.checkpoint.layouts import bitmask, retired
from lpsparse.checkpoint.open import open_checkpoint
from lpsparse.errors import InputError, LpsparseError

GOLDEN = ROOT / "tests" / "golden" / "compressed-tensors"
PAIRS = {
    "parts.safetensors": "dense.safetensors",
    "old.safetensors": "old-dense.safetensors",
    "sparse-bitmask": "sparse-bitmask-dense.safetensors",
    "sparse-24-bitmask": "sparse-24-bitmask-dense.safetensors",
}
FOLDERS = ("sparse-bitmask", "sparse-24-bitmask")


def bits(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {t.name: (t.dtype, t.shape, t.read().tobytes()) for t in open_checkpoint(path).tensors}


def raw(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """The tensors of a safetensors file as they are stored."""
    data = path.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin])
    header.pop("__metadata__", None)
    return {
        name: (
            each["dtype"],
            each["shape"],
            data[begin + each["data_offsets"][0] : begin + each["data_offsets"][1]],
        )
        for name, each in header.items()
    }


# What compressed-tensors wrote


@pytest.mark.parametrize(("packed", "dense"), PAIRS.items())
def test_every_checkpoint_of_compressed_tensors_opens_and_unpacks_bit_by_bit(
    packed: str, dense: str, tmp_path: Path
) -> None:
    assert bits(GOLDEN / packed) == bits(GOLDEN / dense)
    unpack(GOLDEN / packed, tmp_path / "out")
    assert bits(tmp_path / "out") == bits(GOLDEN / dense)
    assert verify(tmp_path / "out", GOLDEN / packed)["ok"]


@pytest.mark.parametrize(
    ("packed", "count"), [("parts.safetensors", 8), ("sparse-bitmask/model.safetensors", 7)]
)
def test_pack_writes_the_names_dtypes_shapes_and_bytes_that_compressed_tensors_wrote(
    packed: str, count: int, tmp_path: Path
) -> None:
    dense = PAIRS[packed.partition("/")[0]]
    names = [
        row.name
        for row in pack(GOLDEN / dense, tmp_path / "out", layout="bitmask").tensors
        if row.layout == "bitmask"
    ]
    theirs = {f"{name}.weight" for name in retired.find_packed(raw(GOLDEN / packed))}
    both = [part for name in names if name in theirs for part in bitmask.stored_names(name)]
    ours, known = raw(tmp_path / "out" / "lpsparse.safetensors"), raw(GOLDEN / packed)
    assert len(both) == 4 * count
    assert {part: ours[part] for part in both} == {part: known[part] for part in both}


def test_the_parts_are_theirs_also_of_weights_that_pack_leaves_dense() -> None:
    known = raw(GOLDEN / "parts.safetensors")
    for tensor in open_checkpoint(GOLDEN / "dense.safetensors").tensors:
        if len(tensor.shape) == 2:
            block = tensor.read()
            said = bitmask.stored_shapes(
                tensor.name, tensor.dtype, tensor.shape, int(np.count_nonzero(block))
            )
            assert {name: (dtype, shape) for name, dtype, shape in said} == {
                name: (known[name][0], tuple(known[name][1])) for name, _, _ in said
            }
            parts = bitmask.encode(block, 0) if block.size else {}
            prefix = bitmask.prefix_of(tensor.name)
            assert all(part.tobytes() == known[f"{prefix}.{name}"][2] for name, part in parts.items())


@pytest.mark.parametrize(("folder", "layout"), [(FOLDERS[0], "bitmask"), (FOLDERS[1], "packed")])
def test_every_command_that_reads_reads_them(folder: str, layout: str, tmp_path: Path) -> None:
    model, dense = GOLDEN / folder, GOLDEN / PAIRS[folder]
    shown, found, plain = lpsparse.inspect(model), lpsparse.report(model), lpsparse.report(dense)
    assert shown["layout"] == found.layout == folder
    assert "7 tensors" in shown["notes"][0] and folder in shown["notes"][0]
    assert (found.prunable, found.all) == (plain.prunable, plain.all)
    assert found.bytes.bitmask_bytes == plain.bytes.bitmask_bytes
    for name, tensor in load(dense).items():
        assert load(model)[name].equal(tensor)
    foretold = prune(model, tmp_path / "pruned", sparsity=0.9, dry_run=True)
    report = prune(model, tmp_path / "pruned", sparsity=0.9)
    assert report.prunable == foretold.prunable and report.layout == "dense"
    prune(dense, tmp_path / "same", sparsity=0.9)
    assert bits(tmp_path / "pruned") == bits(tmp_path / "same")
    pack(model, tmp_path / "packed", layout=layout)
    pack(dense, tmp_path / "packed dense", layout=layout)
    assert (tmp_path / "packed" / "lpsparse.safetensors").read_bytes() == (
        tmp_path / "packed dense" / "lpsparse.safetensors"
    ).read_bytes()
    assert verify(tmp_path / "pruned", model)["ok"] and verify(tmp_path / "packed", model)["ok"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_config_loses_what_it_said_of_the_layout_and_no_other_byte(folder: str, tmp_path: Path) -> None:
    said: list[str] = []
    from lpsparse.commands.pack import pack_step
    from lpsparse.steps.pack import UnpackStep
    from lpsparse.steps.resolve import resolve

    step = resolve(UnpackStep, {"model": str(GOLDEN / folder), "out": tmp_path / "out"})
    pack_step(step, said.append)
    before = (GOLDEN / folder / "config.json").read_text()
    begin, end = before.index('\n  "quantization_config"'), before.index('\n  "rms_norm_eps"')
    assert (tmp_path / "out" / "config.json").read_text() == before[:begin] + before[end:]
    assert "config.json: quantization_config" in said[-1]
    assert said[-1] in json.loads((tmp_path / "out" / "lpsparse.json").read_text())["notes"]


def test_transformers_opens_what_unpack_wrote(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    unpack(GOLDEN / "sparse-24-bitmask", tmp_path / "out")
    state = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in load(GOLDEN / PAIRS["sparse-24-bitmask"]).items():
        assert state[name].equal(tensor)


def test_training_asks_for_unpack_first() -> None:
    from lpsparse.training.model import read_config

    with refuses("LPS393", "sparse-bitmask") as refused:
        read_config(open_checkpoint(GOLDEN / "sparse-bitmask"))
    assert refused.value.hint == "`lpsparse unpack` it first"


# Forms


def integers(*values: int, shape: list[int] | None = None) -> Given:
    data = b"".join(value.to_bytes(8, "little", signed=value < 0) for value in values)
    return "I64", [len(values)] if shape is None else shape, data


PARTS: dict[str, Given] = {  # [[0, 1, 0, 0, 2, 0, 0, 0, 3], [4, 0, 0, 0, 0, 0, 0, 5, 0]]
    "compressed": ("F32", [5], np.arange(1, 6, dtype="<f4").tobytes()),
    "bitmask": ("U8", [2, 2], bytes([0b00010010, 1, 0b10000001, 0])),
    "shape": integers(2, 9),
    "row_offsets": integers(0, 3),
}
PAIR: dict[str, Given] = {  # [[0, 1, 2, 0], [3, 0, 0, 4]]
    "compressed": ("F32", [2, 2], np.arange(1, 5, dtype="<f4").tobytes()),
    "bitmask": ("U8", [2, 1], bytes([0b0110, 0b1001])),
    "shape": integers(2, 4, shape=[2, 1]),
}
LONG: dict[str, Given] = {  # of 37 values every third is one more
    "compressed": ("F32", [13], np.arange(1, 14, dtype="<f4").tobytes()),
    "bitmask": ("U8", [5], np.packbits(np.arange(37) % 3 == 0, bitorder="little").tobytes()),
    "shape": integers(37),
    "row_offsets": ("I64", [], bytes(8)),
}
DEEP: dict[str, Given] = {  # (3, 2, 5), every fourth
    "compressed": ("F32", [8], np.arange(1, 9, dtype="<f4").tobytes()),
    "bitmask": (
        "U8",
        [3, 2, 1],
        np.packbits((np.arange(30) % 4 == 0).reshape(3, 2, 5), axis=-1, bitorder="little").tobytes(),
    ),
    "shape": integers(3, 2, 5),
    "row_offsets": integers(*[0] * 6, shape=[3, 2]),
}
ODD: dict[str, Given] = {  # (2, 6): a group of four lies in both rows
    "compressed": ("F32", [2, 3], np.arange(1, 7, dtype="<f4").tobytes()),
    "bitmask": ("U8", [2, 1], bytes([0b110011, 0b100100])),
    "shape": integers(2, 6, shape=[2, 1]),
}


def packed_file(folder: Path, parts: dict[str, Given], prefix: str = "w", **changes: Given | None) -> Path:
    given = {f"{prefix}.{part}": value for part, value in (parts | changes).items() if value is not None}
    return write_safetensors(folder / "model.safetensors", given)


def test_the_forms_below_are_true_before_they_are_told_otherwise(tmp_path: Path) -> None:
    expected: list[tuple[dict[str, Given], Any]] = [
        (PARTS, [[0, 1, 0, 0, 2, 0, 0, 0, 3], [4, 0, 0, 0, 0, 0, 0, 5, 0]]),
        (PAIR, [[0, 1, 2, 0], [3, 0, 0, 4]]),
        (LONG, [i // 3 + 1 if i % 3 == 0 else 0 for i in range(37)]),
        (ODD, [[1, 2, 0, 0, 3, 4], [0, 0, 5, 0, 0, 6]]),
    ]
    for parts, values in expected:
        assert {name: t.tolist() for name, t in load(packed_file(tmp_path, parts)).items()} == {
            "w.weight": values
        }
    assert load(packed_file(tmp_path, DEEP))["w.weight"].flatten().tolist() == [
        i // 4 + 1 if i % 4 == 0 else 0 for i in range(30)
    ]


@pytest.mark.parametrize("parts", [PARTS, PAIR, LONG, DEEP, ODD], ids=["2-D", "2:4", "1-D", "3-D", "odd"])
def test_any_lines_in_blocks_of_any_size_are_those_of_the_whole(
    parts: dict[str, Given], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tensor,) = open_checkpoint(packed_file(tmp_path, parts)).tensors
    whole = tensor.read().reshape(tensor.grid)
    monkeypatch.setattr("lpsparse.checkpoint.tensors.BLOCK_BYTES", 16)
    monkeypatch.setattr("lpsparse.checkpoint.layouts.retired.BLOCK_BYTES", 16)
    lines = whole.shape[0]
    for first in range(lines):
        for last in range(first + 1, lines + 1):
            found = list(tensor.blocks(first, last))
            assert found[0][0] == first
            assert np.array_equal(np.concatenate([block for _, block in found]), whole[first:last])


def test_the_parts_in_a_torch_file_are_a_weight_too(tmp_path: Path) -> None:
    import torch

    state = {name: tensor.clone() for name, tensor in load_torch(packed_file(tmp_path, PAIR)).items()}
    torch.save(state, tmp_path / "m.pt")
    assert load(tmp_path / "m.pt")["w.weight"].tolist() == [[0, 1, 2, 0], [3, 0, 0, 4]]


def test_parts_that_two_shards_share_come_together(tmp_path: Path) -> None:
    shards = [dict(list(PARTS.items())[:2]), dict(list(PARTS.items())[2:])]
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-00002.safetensors"
        given = {f"w.{part}": value for part, value in shard.items()} | {f"{i}.bias": f32(3)}
        write_safetensors(tmp_path / file, given)
        weight_map |= dict.fromkeys(given, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    unpack(tmp_path, tmp_path.parent / f"{tmp_path.name}-out")
    found = load(tmp_path.parent / f"{tmp_path.name}-out")
    assert found.keys() == {"w.weight", "1.bias", "2.bias"} and found["w.weight"][1, 7] == 5


@pytest.mark.parametrize(
    ("names", "opened"),
    [
        (["w.compressed", "w.shape"], ["w.compressed", "w.shape"]),
        (["w.bitmask", "w.shape", "w.row_offsets"], ["w.bitmask", "w.row_offsets", "w.shape"]),
        (["compressed", "bitmask", "shape"], ["bitmask", "compressed", "shape"]),
    ],
)
def test_names_alone_are_ordinary_tensors(names: list[str], opened: list[str], tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "m.safetensors", {name: f32(3) for name in names})
    assert sorted(tensor.name for tensor in open_checkpoint(path).tensors) == opened


@pytest.mark.parametrize("told", ["quantization_config", "compression_config", None])
def test_where_the_config_tells_of_the_layout_values_without_a_mask_are_refused(
    told: str | None, tmp_path: Path
) -> None:
    path = packed_file(tmp_path, PARTS, bitmask=None)
    config: dict[str, Any] = {"sparsity_config": {"format": "sparse-bitmask"}}
    (path.parent / "config.json").write_text(json.dumps({told: config} if told else config))
    for model in (path, tmp_path):
        with refuses("LPS340", "'w.weight'", "bitmask"):
            open_checkpoint(model)


# Lies

LIES: dict[str, tuple[dict[str, Given], dict[str, Given | None]]] = {
    "a bit too many": (PARTS, {"bitmask": ("U8", [2, 2], bytes([0b00010011, 1, 0b10000001, 0]))}),
    "a bit in another row": (PARTS, {"bitmask": ("U8", [2, 2], bytes([0b00010010, 0, 0b10000001, 1]))}),
    "2:4 a bit too few": (PAIR, {"bitmask": ("U8", [2, 1], bytes([0b0110, 0b1000]))}),
    "2:4 three in a row": (PAIR, {"bitmask": ("U8", [2, 1], bytes([0b0111, 0b1000]))}),
    "odd a bit too many": (ODD, {"bitmask": ("U8", [2, 1], bytes([0b110011, 0b100110]))}),
    "odd a bit too few": (ODD, {"bitmask": ("U8", [2, 1], bytes([0b110011, 0b100000]))}),
    "1-D a bit too many": (LONG, {"bitmask": ("U8", [5], b"\xff" * 5)}),
    "1-D a bit too few": (LONG, {"bitmask": ("U8", [5], bytes(5))}),
    "3-D a bit too many": (DEEP, {"bitmask": ("U8", [3, 2, 1], b"\xff" * 6)}),
    "3-D values too many": (DEEP, {"compressed": ("F32", [9], bytes(36))}),
    "values too few": (PARTS, {"compressed": ("F32", [2], bytes(8))}),
    "values too many for the shape": (PARTS, {"compressed": ("F32", [19], bytes(76))}),
    "values in two dimensions": (PARTS, {"compressed": ("F32", [5, 1], bytes(20))}),
    "values of half a byte": (LONG, {"compressed": ("F4", [14], bytes(7))}),
    "values missing": (PARTS, {"compressed": None}),
    "shape missing": (PARTS, {"shape": None}),
    "offsets missing": (PARTS, {"row_offsets": None}),
    "offsets fall": (PARTS, {"row_offsets": integers(3, 0)}),
    "offsets past the end": (PARTS, {"row_offsets": integers(0, 6)}),
    "offsets too many": (PARTS, {"row_offsets": integers(0, 3, 5)}),
    "offsets of another dtype": (PARTS, {"row_offsets": ("F64", [2], bytes(16))}),
    "shape of more rows": (PARTS, {"shape": integers(3, 9)}),
    "shape of more columns": (PARTS, {"shape": integers(2, 17)}),
    "shape enormous": (PARTS, {"shape": integers(2, 2**62)}),
    "shape that overflows": (PARTS, {"shape": integers(2**32, 2**32)}),
    "shape negative": (PARTS, {"shape": integers(2, -9)}),
    "shape of 17 dimensions": (PARTS, {"shape": integers(2, 9, *[1] * 15)}),
    "shape of another dtype": (PARTS, {"shape": ("F64", [2], bytes(16))}),
    "shape in three dimensions": (PARTS, {"shape": integers(2, 9, shape=[1, 2, 1])}),
    "shape of one dimension": (PARTS, {"shape": integers(18)}),
    "shape of none": (PARTS, {"shape": ("F32", [0], b"")}),
    "2:4 shape of more rows": (PAIR, {"shape": integers(3, 4)}),
    "2:4 shape of more columns": (PAIR, {"shape": integers(2, 8)}),
    "2:4 of odd columns": (
        PAIR,
        {
            "shape": integers(4, 3),
            "compressed": ("F32", [4, 1], bytes(16)),
            "bitmask": ("U8", [4, 1], b"abcd"),
        },
    ),
    "2:4 of three dimensions": (PAIR, {"shape": integers(1, 2, 4), "bitmask": ("U8", [1, 2, 1], bytes(2))}),
    "mask of another dtype": (PARTS, {"bitmask": ("I8", [2, 2], bytes(4))}),
    "mask of another shape": (PARTS, {"bitmask": ("U8", [4], bytes(4))}),
}
IN_THE_VALUES = ("a bit", "three in a row", "3-D values too many")


@pytest.mark.parametrize("lie", LIES)
def test_parts_that_lie_are_refused_and_those_about_sizes_before_any_value_is_read(
    lie: str, tmp_path: Path
) -> None:
    parts, changes = LIES[lie]
    path = packed_file(tmp_path, parts, **changes)
    (tmp_path / "config.json").write_text('{"sparsity_config": {"format": "sparse-bitmask"}}')
    if any(words in lie for words in IN_THE_VALUES):
        assert [tensor.name for tensor in open_checkpoint(path).tensors] == ["w.weight"]
    else:
        with pytest.raises(InputError, match=r"'w\.weight'"):
            open_checkpoint(path)
    with pytest.raises(LpsparseError, match=r"'w\.weight'") as refused:
        unpack(path, tmp_path / "out")
    assert int(refused.value.exit_code) == 3 and "download" in refused.value.hint
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("shape", "lines"), [((2**40, 0), {}), ((2**40, 0, 2), {"row_offsets": ("I64", [2**40, 0], b"")})]
)
def test_an_empty_weight_of_many_rows_takes_no_memory(
    shape: tuple[int, ...], lines: dict[str, Given], tmp_path: Path
) -> None:
    parts: dict[str, Given] = {
        "compressed": ("F32", [0] if lines else [2**40, 0], b""),
        "bitmask": ("U8", [2**40, 0, 1] if lines else [2**40, 0], b""),
        "shape": integers(*shape),
    }
    (row,) = lpsparse.report(packed_file(tmp_path, parts | lines)).tensors
    assert (row.shape, row.weights) == (shape, 0)


def test_a_weight_that_is_there_packed_and_not_is_refused(tmp_path: Path) -> None:
    given = {f"w.{part}": value for part, value in PARTS.items()} | {"w.weight": f32(2, 9)}
    with refuses("LPS340"):
        open_checkpoint(write_safetensors(tmp_path / "m.safetensors", given))


# The config


SPARSE = {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-bitmask"}}
GROUPS = {"config_groups": {"group_0": {"weights": {"num_bits": 8}}}, "format": "float-quantized"}


@pytest.mark.parametrize(
    "settings",
    [
        SPARSE,
        SPARSE | {"version": "0.9.1", "transform_config": {}},
        SPARSE
        | {
            "format": "dense",
            "config_groups": {},
            "kv_cache_scheme": None,
            "ignore": [],
            "quantization_status": "compressed",
        },
    ],
    ids=["bare", "with a version", "dense, without groups"],
)
def test_what_is_only_sparse_is_not_called_quantised(settings: dict[str, Any], tmp_path: Path) -> None:
    packed_file(tmp_path, PARTS, compressed=("F8_E4M3", [5], bytes(range(1, 6))))
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": settings, "model_type": "x"}))
    out = tmp_path.parent / f"{tmp_path.name}-out"
    assert prune(tmp_path, out, sparsity=1, allow_empty=True).prunable.zeros == 18
    assert json.loads((out / "config.json").read_text()) == {"model_type": "x"}


@pytest.mark.parametrize(
    ("settings", "more"),
    [
        (SPARSE | GROUPS, {}),
        (SPARSE | {"format": "marlin-24"}, {}),
        (SPARSE | {"kv_cache_scheme": {"num_bits": 8}}, {}),
        (SPARSE, {"w.weight_scale": f32(1)}),
        (None, {"w.weight_scale": f32(1)}),
    ],
    ids=["groups", "marlin", "cache", "scales", "scales and no config"],
)
def test_sparse_and_quantised_is_shown_and_refused_by_all_that_needs_its_values(
    settings: dict[str, Any] | None, more: dict[str, Given], cli: Any, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    parts = {f"w.{part}": value for part, value in PARTS.items()}
    parts["w.compressed"] = ("F8_E4M3", [5], bytes(range(1, 6)))
    write_safetensors(model / "model.safetensors", parts | more)
    if settings is not None:
        (model / "config.json").write_text(json.dumps({"quantization_config": settings}))
    for words in (["prune", "--sparsity", "0.9"], ["pack"], ["unpack"], ["unpack", "--dry-run"]):
        for each in (model, model / "model.safetensors"):
            ran: Ran = cli(words[0], each, tmp_path / "out", *words[1:])
            assert ran.rc == 3 and "is sparse and quantised (compressed-tensors)" in ran.stderr
    assert cli("report", model).rc == cli("inspect", model).rc == 0
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('{"sparsity_config": {}}', "{}"),
        ('{\r\n\t"a": 1,\r\n\t"sparsity_config": {"a": "}"}\r\n}\r\n', '{\r\n\t"a": 1\r\n}\r\n'),
        ('{"compression_config": [], "a" : 1.50 , "b": "\u00e9"}', '{ "a" : 1.50, "b": "\u00e9"}'),
        (
            '\ufeff{"a": {"sparsity_config": 7},\n"sparsity_config": 1, "b": NaN}',
            '\ufeff{"a": {"sparsity_config": 7}, "b": NaN}',
        ),
        ('{"sparsity_config": 1, "a": 2, "sparsity_config": 3}', '{ "a": 2}'),
        ('{"a": 1}', '{"a": 1}'),
        ('["sparsity_config"]', '["sparsity_config"]'),
        ('{"sparsity_config": ', '{"sparsity_config": '),
    ],
    ids=["alone", "last", "first", "nested stays", "twice", "none", "no object", "broken"],
)
def test_only_the_members_that_tell_of_the_layout_leave_the_config(
    before: str, after: str, tmp_path: Path
) -> None:
    packed_file(tmp_path, PARTS)
    (tmp_path / "config.json").write_bytes(before.encode())
    out = tmp_path.parent / f"{tmp_path.name}-out"
    unpack(tmp_path, out)
    assert (out / "config.json").read_bytes().decode() == after


def test_the_config_of_any_other_model_keeps_what_it_says(tmp_path: Path) -> None:
    save_file({"a.weight": np.ones((7, 13), np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": SPARSE}))
    out = tmp_path.parent / f"{tmp_path.name}-out"
    prune(tmp_path, out, sparsity=0.5)
    assert (out / "config.json").read_bytes() == (tmp_path / "config.json").read_bytes()
