"""Every member of LAYOUTS, and one that is added from outside: a record is all that a layout needs."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from support.files import tree_hash, write_safetensors

import lpsparse
from lpsparse import load, pack, prune, unpack, verify
from lpsparse.checkpoint.counting import Count, Cuts
from lpsparse.checkpoint.dtypes import DTYPES
from lpsparse.checkpoint.header import Header, read_header
from lpsparse.checkpoint.layouts.base import Layout, Planned, Wrote, flow
from lpsparse.checkpoint.layouts.dense import dense_tensor
from lpsparse.checkpoint.safetensors_writer import file_size, write_tensors
from lpsparse.checkpoint.tensors import Tensor
from lpsparse.errors import InputError, UsageError
from lpsparse.families import LAYOUTS, RETIRED_LAYOUTS
from lpsparse.steps.pack import PackStep
from lpsparse.steps.resolve import resolve

ENCODED = [name for name in LAYOUTS if not LAYOUTS[name].is_plain]


def every_dtype(path: Path) -> Path:
    """A tensor of each dtype of safetensors, mostly zero bytes."""
    draw, given = np.random.default_rng(3), {}
    for name, dtype in DTYPES.items():
        octets = draw.integers(0, 100, 64 * 48 * dtype.bits // 8, np.uint8)
        octets[draw.random(octets.size) < 0.8] = 0
        given[f"{name.lower()}.weight"] = (name, [64, 48], octets.tobytes())
    return write_safetensors(path, given)


def write(source: Path, out: Path, layout: str) -> lpsparse.api.Report:
    return unpack(source, out) if LAYOUTS[layout].is_plain else pack(source, out, layout=layout)


def test_each_record_has_the_name_that_it_is_found_by() -> None:
    assert {name: LAYOUTS[name].name for name in LAYOUTS} == {name: name for name in LAYOUTS}
    assert {name: RETIRED_LAYOUTS[name].name for name in RETIRED_LAYOUTS} == {n: n for n in RETIRED_LAYOUTS}
    assert not LAYOUTS.keys() & RETIRED_LAYOUTS.keys()
    assert all(LAYOUTS[name].opens_with for name in LAYOUTS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_dtype_comes_back_and_a_dry_run_tells_its_bytes(layout: str, tmp_path: Path) -> None:
    source = every_dtype(tmp_path / "m.safetensors")
    found = write(source, tmp_path / "out", layout)
    assert found.layout == layout and verify(tmp_path / "out", source)["ok"]
    assert {row.layout for row in found.tensors} <= {"dense", layout}
    before, after = lpsparse.open(source), lpsparse.open(tmp_path / "out")
    assert [each.name for each in after.tensors] == [each.name for each in before.tensors]
    for tensor in before.tensors:
        assert after[tensor.name].read().tobytes() == tensor.read().tobytes()
    told = (unpack if LAYOUTS[layout].is_plain else pack)(
        source, tmp_path / "dry", dry_run=True, **({} if LAYOUTS[layout].is_plain else {"layout": layout})
    )
    assert told.bytes.file_bytes == found.bytes.file_bytes
    assert [row.stored_bytes for row in told.tensors] == [row.stored_bytes for row in found.tensors]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_headers_say_how_to_read_them_and_keep_what_the_source_said(layout: str, tmp_path: Path) -> None:
    arrays = {"a.weight": np.zeros((64, 48), np.float32), "b.bias": np.ones(7, np.float32)}
    save_file(arrays, tmp_path / "m.safetensors", metadata={"format": "pt", "note": "kept"})
    write(tmp_path / "m.safetensors", tmp_path / "out", layout)
    (path,) = (tmp_path / "out").glob("*.safetensors")
    metadata = read_header(path).metadata
    assert metadata["note"] == "kept" and metadata["format"] == "pt"
    marked = {"lpsparse.layout": layout, "lpsparse.format_version": "1"}
    if LAYOUTS[layout].is_plain:
        assert not [key for key in metadata if key.startswith("lpsparse.")]
    else:
        assert marked.items() <= metadata.items()
    # A file of ours is found by a name that other loaders do not look for.
    assert (path.name == "lpsparse.safetensors") == (not LAYOUTS[layout].is_plain)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_of_entries_are_taken_where_an_encoded_tensor_has_them(layout: str, tmp_path: Path) -> None:
    record = LAYOUTS[layout]
    stored = set(record.stored_names("a.weight"))
    assert record.names_taken({"a.weight", "b.weight"}) == []
    clash = {"a.weight", *stored}
    assert set(record.names_taken(clash)) == stored - {"a.weight"}
    if record.is_plain:
        return
    given = {name: np.zeros((64, 48), np.float32) for name in ("a.weight", min(stored))}
    save_file(given, tmp_path / "m.safetensors")
    with pytest.raises(InputError) as refused:
        pack(tmp_path / "m.safetensors", tmp_path / "out", layout=layout)
    assert refused.value.code == "LPS342" and not (tmp_path / "out").exists()


def test_the_steps_take_the_members_of_the_family() -> None:
    for name in LAYOUTS:
        if not LAYOUTS[name].is_plain:
            assert resolve(PackStep, {"model": "m", "out": "o", "layout": name}).layout == name
    for wrong in ("dense", "sparse-bitmask", "zip"):
        with pytest.raises(UsageError):
            resolve(PackStep, {"model": "m", "out": "o", "layout": wrong})


# A layout from outside: every tensor under NAME.turned, all of its bits inverted.


def turned(name: str) -> str:
    return name + ".turned"


def turn(tensor: Tensor, name: str, layout: str) -> Tensor:
    blocks = tensor.blocks
    return replace(
        tensor,
        name=name,
        layout=layout,
        blocks=lambda *lines: ((line, ~block) for line, block in blocks(*lines)),
    )


def open_toy(path: Path, header: Header) -> list[Tensor]:
    stored = [dense_tensor(path, entry) for entry in header.entries]
    return [turn(each, each.name.removesuffix(".turned"), "toy") for each in stored]


def write_toy(target: Path, tensors: list[Tensor], cut: Cuts, metadata: dict[str, str], _: str) -> Wrote:
    sums = {tensor.name: (0, 0) for tensor in tensors}
    entries = [(turned(each.name), each.dtype, each.shape) for each in tensors]
    parts = (
        (turned(each.name), line * block.shape[1], ~block) for each, line, block in flow(tensors, cut, sums)
    )
    changed = write_tensors(target, entries, metadata, parts)
    return Wrote(tuple(name for name, *_ in entries), sums, changed)


def plan_toy(
    tensors: list[Tensor], counts: dict[str, Count], cut: Cuts, metadata: dict[str, str], level: str
) -> Planned:
    entries = [(turned(each.name), each.dtype, each.shape) for each in tensors]
    return Planned({each.name: each.nbytes for each in tensors}, file_size(entries, metadata))


TOY = Layout(
    "toy",
    "this test",
    open=open_toy,
    write=write_toy,
    plan=plan_toy,
    stored_names=lambda name: (turned(name),),
)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(LAYOUTS.members, "toy", TOY)
    return "toy"


@pytest.mark.parametrize("source", ["tiny", "shards"])
def test_a_layout_from_outside_is_packed_verified_opened_and_unpacked(
    toy: str, source: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(source)
    told = pack(model, tmp_path / "dry", layout=toy, dry_run=True)
    found = pack(model, tmp_path / "out", layout=toy)
    assert found.layout == toy and {row.layout for row in found.tensors} == {toy}
    assert told.bytes.file_bytes == found.bytes.file_bytes
    assert verify(tmp_path / "out", model)["ok"]
    assert lpsparse.report(tmp_path / "out").opens_with == "this test"
    before, after = load(model), load(tmp_path / "out")
    assert before.keys() == after.keys() and all((before[name] == after[name]).all() for name in before)
    unpack(tmp_path / "out", tmp_path / "back")
    assert {n: h for n, h in tree_hash(tmp_path / "back").items() if n.endswith(".safetensors")} == {
        n: h for n, h in tree_hash(model).items() if n.endswith(".safetensors")
    }


def test_prune_writes_a_layout_from_outside(toy: str, tiny: Path, tmp_path: Path) -> None:
    prune(tiny, tmp_path / "toy", sparsity=0.5, layout=toy)
    prune(tiny, tmp_path / "dense", sparsity=0.5)
    assert verify(tmp_path / "toy", tmp_path / "dense")["ok"]


def test_a_layout_that_is_not_known_any_more_is_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(LAYOUTS.members, "toy", TOY)
        pack(tiny, tmp_path / "out", layout="toy")
    with pytest.raises(InputError) as refused:
        lpsparse.open(tmp_path / "out")
    assert refused.value.code == "LPS336"
