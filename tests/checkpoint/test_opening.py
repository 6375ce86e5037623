"""What can be opened, and what must not be: folders, indexes, torch files, hub ids."""

import json
import os
import pickle
import re
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from contextlib import suppress
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from support.cli import Ran, run_cli
from support.files import (
    EMPTY_INDEX,
    JSON,
    Exploit,
    f32,
    refuses,
    rezipped,
    save,
    tiny_arrays,
    write_index,
    write_safetensors,
)

import lpsparse
from lpsparse import inspect, load, prune, report, verify
from lpsparse.checkpoint.names import WEIGHT_SUFFIXES
from lpsparse.checkpoint.open import open_checkpoint
from lpsparse.errors import ExitCode, InputError, LpsparseError, RemoteError
from lpsparse.recipes import run

Cli = Callable[..., Ran]


def refusal(model: str | Path, kind: type[LpsparseError] = InputError) -> str:
    """What is said when MODEL is refused, hint and all."""
    with pytest.raises(kind) as refused:
        open_checkpoint(model)
    return f"{refused.value.what} | {refused.value.hint}"


def same_tensors(model: Path, arrays: dict[str, np.ndarray]) -> bool:
    found = {tensor.name: tensor for tensor in open_checkpoint(model).tensors}
    return found.keys() == arrays.keys() and all(
        found[name].shape == array.shape and found[name].read().tobytes() == array.tobytes()
        for name, array in arrays.items()
    )


# Folders, files and indexes


def test_folder_file_and_index_hold_the_same_tensors(tiny: Path, shards: Path) -> None:
    for model in (tiny, tiny / "model.safetensors", shards, shards / EMPTY_INDEX):
        assert same_tensors(model, tiny_arrays())
    assert len(open_checkpoint(shards).files) == 3
    assert open_checkpoint(tiny / "model.safetensors").root is None


def test_a_large_tensor_is_read_in_blocks_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array = np.arange(101 * 13, dtype=np.float32).reshape(101, 13)
    save_file({"a": array}, tmp_path / "m.safetensors")
    monkeypatch.setattr("lpsparse.checkpoint.tensors.BLOCK_BYTES", 7 * 13 * 4 + 3)
    (tensor,) = open_checkpoint(tmp_path / "m.safetensors").tensors
    blocks = list(tensor.blocks())
    assert [row for row, _ in blocks] == list(range(0, 101, 7))
    assert np.array_equal(np.concatenate([block for _, block in blocks]).view(np.float32), array)


def test_a_folder_with_one_oddly_named_file_is_opened(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "adapter.safetensors", {"a": f32(7, 13)})
    assert [path.name for path in open_checkpoint(tmp_path).files] == ["adapter.safetensors"]


def test_a_missing_path_is_told_with_the_nearest_name(tiny: Path, cli: Cli) -> None:
    rc, stdout, stderr = cli("inspect", tiny.parent / "tin")
    assert (rc, stdout) == (3, "")
    assert stderr.splitlines()[1] == f"  hint: did you mean {tiny}?"


@pytest.mark.parametrize("length", [300, 5000])
def test_a_name_longer_than_the_system_allows_is_missing(length: int, tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / ("a" * length))


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ((), ["no weight file"]),
        (("config.json",), ["no weight file"]),
        (("model.safetensors", EMPTY_INDEX), ["two checkpoints", "model.safetensors", EMPTY_INDEX]),
        (("model.safetensors", "lpsparse.safetensors"), ["two checkpoints"]),
        (("a.safetensors", "b.safetensors"), ["several weight files", "a.safetensors", "b.safetensors"]),
        (("a.pt", "b.pth"), ["several weight files", "a.pt", "b.pth"]),
        (("a.safetensors", "a.pt"), ["several weight files", "a.safetensors", "a.pt"]),
    ],
)
def test_a_folder_must_name_one_checkpoint(names: tuple[str, ...], words: list[str], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"{}")
    said = refusal(tmp_path)
    assert [word for word in words if word not in said] == []


@pytest.fixture
def several(tiny: Path) -> Path:
    """A folder with three checkpoints: safetensors, a sharded one with its index, a torch file."""
    write_safetensors(tiny / "one.safetensors", {"a.weight": f32(7, 13)})
    (tiny / EMPTY_INDEX).write_text(json.dumps({"weight_map": {"a.weight": "one.safetensors"}}))
    torch.save({"b.weight": torch.ones(7, 13)}, tiny / "net.pt")
    return tiny


@pytest.mark.parametrize(
    ("name", "first"),
    [("model.safetensors", "embed_tokens.weight"), (EMPTY_INDEX, "a.weight"), ("net.pt", "b.weight")],
)
def test_the_weights_that_are_named_are_opened_with_the_folder_around_them(
    name: str, first: str, several: Path, tmp_path: Path
) -> None:
    assert "--weights" in refusal(several)
    opened = lpsparse.open(several, weights=name)
    assert first in {tensor.name for tensor in opened.tensors} and opened.root == several
    assert lpsparse.load(several, weights=name).keys() == {tensor.name for tensor in opened.tensors}
    assert lpsparse.inspect(several, weights=name)["files"][0]["name"] == opened.files[0].name
    lpsparse.prune(several, tmp_path / "out", weights=name, sparsity=0.5)
    assert (tmp_path / "out" / "config.json").exists()
    assert len([path for path in (tmp_path / "out").iterdir() if path.suffix in WEIGHT_SUFFIXES]) == 1
    assert first in {tensor.name for tensor in open_checkpoint(tmp_path / "out").tensors}


@pytest.mark.parametrize("command", ["prune", "pack", "unpack", "report", "inspect"])
def test_every_command_takes_the_name_of_the_weights(command: str, several: Path, cli: Cli) -> None:
    out = [several.parent / "out"] if command in ("prune", "pack", "unpack") else []
    flags = ["--sparsity", "0.5"] if command == "prune" else []
    assert cli(command, several, *out, *flags).rc == ExitCode.INPUT
    ran = cli(command, several, *out, *flags, "--weights", "net.pt")
    assert ran.rc == 0, ran.stderr
    assert "next: lpsparse report" not in ran.stderr or ran.stderr.rstrip().endswith("out")


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../tiny/net.pt", "extra/x.pt", "/etc/passwd", "C:net.pt", "a\\b.pt", "net.pt\0"]
)
def test_weights_are_a_name_and_not_a_path(name: str, several: Path) -> None:
    with refuses("LPS216"):
        open_checkpoint(several, name)


def test_weights_that_are_not_there_are_told_with_those_that_are(several: Path) -> None:
    with pytest.raises(InputError, match=r"only model.safetensors, model.safetensors.index.json, net.pt"):
        open_checkpoint(several, "gone.safetensors")
    with refuses("LPS216"):
        open_checkpoint(several / "net.pt", "net.pt")


def test_a_recipe_names_the_weights_of_a_step_and_finds_it_finished(
    several: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(several.parent)
    step = "steps: [prune: {sparsity: 0.5, weights: net.pt}]"
    (several.parent / "r.yaml").write_text(f"model: tiny\nout: made\n{step}")
    assert not run.run("r.yaml")[0].skipped
    assert run.run("r.yaml")[0].skipped
    torch.save({"b.weight": torch.zeros(7, 13)}, several / "net.pt")
    assert run.run("r.yaml", {"prune.overwrite": "true"})[0].skipped is False


@pytest.mark.parametrize(
    "shard",
    [
        "../one.safetensors",
        "sub/one.safetensors",
        "/etc/passwd",
        "C:\\x",
        "C:x",
        "\\\\host\\x",
        "a\\..\\b",
        "",
        ".",
        "..",
        "one.safetensors\0",
        7,
        None,
        ["one.safetensors"],
    ],
)
def test_an_index_cannot_point_outside_its_folder(shard: object, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_safetensors(tmp_path / "one.safetensors", {"a": f32(7, 13)})
    path = write_index(tmp_path / "in", {"weight_map": {"a": shard, "b": "one.safetensors"}})
    assert "points outside the model folder" in refusal(path)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"weight_map": {"a": "gone.safetensors"}}, ["'gone.safetensors'", "1 tensors", "missing"]),
        (
            {"weight_map": dict.fromkeys("abc", "one.safetensors")},
            ["1 tensors in the index but not in", ": c"],
        ),
        ({"weight_map": {"a": "one.safetensors"}}, ["1 tensors not in the index but in", ": b"]),
        ({"metadata": {}}, ["no weight_map"]),
        ({"weight_map": {}}, ["no weight_map"]),
        ({"weight_map": ["one.safetensors"]}, ["no weight_map"]),
        ([], ["no weight_map"]),
        (b"{", ["not valid JSON"]),
        (b"", ["not valid JSON"]),
        (b'{"weight_map": {"a": "x", "a": "y"}}', ["duplicate key 'a'"]),
        (b"[" * 5000, ["nested too deep"]),
        (b"version https://git-lfs.github.com/spec/v1", ["Git LFS pointer"]),
        ({"weight_map": {"a": "x" * 300}}, ["1 tensors is missing"]),
    ],
)
def test_a_broken_index_is_refused(table: object, words: list[str], tmp_path: Path) -> None:
    said = refusal(write_index(tmp_path, table))
    assert [word for word in words if word not in said] == []


GOOD_INDEX = json.dumps({"metadata": {}, "weight_map": {"a": "one.safetensors", "b": "one.safetensors"}})
NAMES = st.text(max_size=5) | st.sampled_from(["one.safetensors", "../x", "x" * 300, "one.safetensors/", "~"])


@settings(max_examples=300, deadline=None)
@given(
    st.binary(max_size=40)
    | st.fixed_dictionaries({"weight_map": JSON | st.dictionaries(NAMES, NAMES | JSON)})
    | st.tuples(st.integers(0, len(GOOD_INDEX) - 1), st.binary(max_size=3))
    | JSON
)
def test_any_index_reads_or_raises_input_error(tmp_path_factory: pytest.TempPathFactory, table: Any) -> None:
    folder = tmp_path_factory.getbasetemp()
    if isinstance(table, tuple):
        table = GOOD_INDEX[: table[0]].encode() + table[1] + GOOD_INDEX[table[0] + 1 :].encode()
    path = write_index(folder, table)
    with suppress(InputError):
        assert [tensor.name for tensor in open_checkpoint(path).tensors] == ["a", "b"]


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "two.safetensors", {"a": f32(7, 13), "c": f32(7)})
    weight_map = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}
    said = refusal(write_index(tmp_path, {"weight_map": weight_map}))
    assert "1 tensors not in the index but in" in said and "two.safetensors" in said
    assert "'a' is also in" not in said  # the index is checked first, shard by shard


def test_a_file_that_shrinks_while_it_is_read_is_refused(tiny: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    os.truncate(tiny / "model.safetensors", (tiny / "model.safetensors").stat().st_size - 4)
    with refuses("LPS333"):
        [tensor.read() for tensor in checkpoint.tensors]


def test_a_folder_that_vanishes_while_it_is_opened_is_told(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = os.listdir

    def vanish(folder: Path) -> list[str]:
        tiny.rename(tiny.with_name("gone"))
        return listed(folder)

    monkeypatch.setattr(os, "listdir", vanish)
    with pytest.raises(InputError, match=r"tiny: No such file") as refused:
        open_checkpoint(tiny)
    assert refused.value.code == "LPS305"


# Torch files


def read_torch(path: Path) -> dict[str, torch.Tensor]:
    return load(path)


def test_a_plain_state_dict_opens_under_every_torch_suffix(tmp_path: Path) -> None:
    tensors = {name: torch.from_numpy(array) for name, array in tiny_arrays().items()}
    for suffix in ("bin", "pt", "pth", "th", "tar"):
        assert same_tensors(save(tmp_path / f"net.{suffix}", tensors), tiny_arrays())


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ({"a\ud800.weight": torch.ones(7, 13)}, "not text"),
        ({"a.weight": torch.zeros([1] * 63 + [8, 8])}, "65 dimensions"),
    ],
)
@pytest.mark.parametrize("command", [report, inspect])
def test_a_torch_file_that_no_other_file_could_hold_is_refused(
    command: Any, value: object, why: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=why):
        command(save(tmp_path / "net.pt", value))


def test_a_training_checkpoint_is_unwrapped_and_says_what_it_dropped(tmp_path: Path) -> None:
    state = {"module.a.weight": torch.ones(7, 13), "module.steps": 7}
    path = save(tmp_path / "net.pt", {"state_dict": state, "epoch": 3, "best_acc": 0.5})
    opened = open_checkpoint(path)
    assert [tensor.name for tensor in opened.tensors] == ["module.a.weight"]
    assert opened.notes == (
        "tensors taken from 'state_dict'; dropped beside it: best_acc, epoch",
        "dropped, not tensors: module.steps",
    )


def test_values_of_every_dtype_come_through_bit_for_bit(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(7)
    values = torch.randn(7, 13, generator=draw)
    floats = (torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
    state = {str(dtype): values.to(dtype) for dtype in floats}
    state |= {
        str(dtype): (9 * values).to(dtype) for dtype in (torch.int8, torch.uint8, torch.int32, torch.bool)
    }
    found = read_torch(save(tmp_path / "net.pt", state))
    assert all(
        torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in state.items()
    )


def test_values_of_every_dtype_that_nothing_cuts_are_written_bit_for_bit(tmp_path: Path) -> None:
    dtypes = {
        "U16": torch.uint16,
        "U32": torch.uint32,
        "U64": torch.uint64,
        "C64": torch.complex64,
        "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
        "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
        "F8_E8M0": torch.float8_e8m0fnu,
    }
    raw = torch.arange(7 * 8 * 13, dtype=torch.int16).to(torch.uint8).view(7, 104)  # every byte there is
    state = {name: raw.clone().view(dtype) for name, dtype in dtypes.items()}
    state["a.weight"] = torch.ones(7, 13)
    lpsparse.prune(save(tmp_path / "net.pt", state), tmp_path / "sparse", sparsity=0.5)
    lpsparse.pack(tmp_path / "sparse", tmp_path / "packed")
    lpsparse.unpack(tmp_path / "packed", tmp_path / "dense")
    for model in ("net.pt", "sparse", "packed", "dense"):
        found = {tensor.name: tensor for tensor in open_checkpoint(tmp_path / model).tensors}
        assert [found[name].dtype for name in dtypes] == list(dtypes)
        assert {found[name].read().tobytes() for name in dtypes} == {raw.numpy().tobytes()}


def test_strided_shared_tied_and_odd_shapes_are_written_out_in_full(tmp_path: Path) -> None:
    base = torch.arange(2 * 7 * 13, dtype=torch.float32)
    matrix = base[:91].view(7, 13)
    state = {
        "transposed": matrix.t(),
        "every other": base[::2],
        "tail": base[91:],
        "tied": matrix,
        "tied too": matrix,
        "scalar": torch.tensor(7.0),
        "empty": torch.empty(0, 7),
        "parameter": torch.nn.Parameter(matrix),
    }
    found = read_torch(save(tmp_path / "net.pt", state))
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], value) for name, value in state.items())


def test_the_old_torch_format_opens_too(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(7, 13)}, tmp_path / "net.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(read_torch(tmp_path / "net.pt")["a"], torch.ones(7, 13))


@pytest.mark.parametrize("form", ["zip", "legacy", "bare pickle"])
def test_a_malicious_pickle_is_refused_and_never_executed(form: str, tmp_path: Path, cli: Cli) -> None:
    canary, path = tmp_path / "canary", tmp_path / "net.pt"
    value = {"a": torch.ones(7), "b": Exploit(canary)}
    if form == "bare pickle":
        path.write_bytes(pickle.dumps(Exploit(canary)))
    else:
        torch.save(value, path, _use_new_zipfile_serialization=form == "zip")
    rc, _, stderr = cli("inspect", path)
    assert rc == ExitCode.INPUT and not canary.exists()
    assert "nothing was executed" in stderr
    assert "weights_only" not in stderr and "trusted" not in stderr
    pickle.loads(path.read_bytes()) if form == "bare pickle" else torch.load(path, weights_only=False)
    assert canary.exists()  # the trap was live


def test_a_pickle_bomb_renamed_to_safetensors_is_not_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(pickle.dumps(Exploit(tmp_path / "canary")))
    assert "pickle" in refusal(path)
    assert not (tmp_path / "canary").exists()


def test_a_whole_module_is_refused(tmp_path: Path) -> None:
    said = refusal(save(tmp_path / "net.pt", torch.nn.Linear(7, 13)))
    assert "refuses" in said and "weights_only" not in said


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"a": torch.ones(1).expand(100_000, 100_000)}, ["'a'", "10000000000 elements", "4 bytes"]),
        ({"a": torch.empty(7, 13, device="meta")}, ["'a'", "without data"]),
        ({"a": torch.ones(7, dtype=torch.complex128)}, ["'a'", "complex128"]),
        ({"a": torch.eye(7).to_sparse()}, ["'a'", "sparse"]),
        ({"epoch": 7, "name": "net"}, ["no tensors", "epoch, name"]),
        ({}, ["no tensors"]),
        (torch.ones(7), ["holds a Tensor"]),
        ([torch.ones(7)], ["holds a list"]),
    ],
)
def test_a_torch_file_without_an_honest_table_of_tensors_is_refused(
    value: Any, words: list[str], tmp_path: Path
) -> None:
    said = refusal(save(tmp_path / "net.pt", value))
    assert [word for word in words if word not in said] == []


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    path = save(tmp_path / "net.pt", {"a": torch.zeros(300, 1000)})
    bomb = rezipped(path, tmp_path / "bomb.pt", zipfile.ZIP_DEFLATED)
    assert "unpack to 1200" in refusal(bomb)
    assert "a" in read_torch(rezipped(path, tmp_path / "net2.pt", zipfile.ZIP_STORED))  # zips are no crime


def test_members_that_lie_over_one_another_are_refused(tmp_path: Path) -> None:
    path, bomb = save(tmp_path / "net.pt", {str(n): torch.ones(999) for n in range(50)}), tmp_path / "bomb.pt"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(bomb, "w") as new:
        for info in old.infolist():
            if "/data/" not in info.filename or info.filename.endswith("/0"):
                new.writestr(info.filename, old.read(info))
        for n in range(1, 50):
            new.filelist.append(copy(new.getinfo("net/data/0")))
            new.filelist[-1].filename = f"net/data/{n}"
    assert len(torch.load(bomb, weights_only=True)) == 50  # 200 kB out of 10: torch does not mind
    assert "that unpack to 20" in refusal(bomb)


MAKERS = ("torch\nTensor", "torch\nFloatTensor", "builtins\nbytearray", "__builtin__\nbytearray")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("maker", MAKERS)
def test_memory_is_not_made_of_a_number_in_a_pickle(maker: str, zipped: bool, tmp_path: Path) -> None:
    bomb = b"\x80\x02}X\x01\0\0\0ac" + maker.encode() + b"\nJ\0\0\0\x20\x85Rs."  # {"a": maker(2**29)}
    path = save(tmp_path / "net.pt", {"a": torch.ones(7)})
    if zipped:
        members = {"data.pkl": bomb}
        path = rezipped(path, tmp_path / "bomb.pt", zipfile.ZIP_STORED, lambda n, d: members.get(n[4:], d))
    else:
        start = (torch.serialization.MAGIC_NUMBER, 1001, {"little_endian": True})
        path.write_bytes(b"".join(pickle.dumps(each, 2) for each in start) + bomb + pickle.dumps([], 2))
    before = psutil.Process().memory_info().rss
    assert "2147483648" in refusal(path) or "nothing was executed" in refusal(path)
    assert psutil.Process().memory_info().rss - before < 2**28


def test_ten_thousand_names_over_one_storage_are_refused(tmp_path: Path) -> None:
    storage = torch.arange(512 * 512, dtype=torch.float32).view(512, 512)
    path = save(tmp_path / "net.pt", {str(n): storage.t() for n in range(10_000)})
    assert "10000 names for 10485760000 bytes" in refusal(path)


def test_fifty_views_of_one_storage_take_its_memory_once(tmp_path: Path) -> None:
    storage = torch.arange(1024 * 1024, dtype=torch.float32).view(1024, 1024)
    path = save(tmp_path / "net.pt", {str(n): storage.t()[: 1024 - n] for n in range(50)})
    before = psutil.Process().memory_info().rss
    opened = open_checkpoint(path)
    assert psutil.Process().memory_info().rss - before < 50_000_000  # of 205 MB if each were written out
    assert np.array_equal(opened.tensors[49].read().view(np.float32), storage.t()[:975].numpy())


def test_tied_names_of_a_torch_file_are_one_tensor_in_every_output(tmp_path: Path) -> None:
    tied, other = torch.randn(7, 13), torch.randn(7, 13)
    path = save(tmp_path / "net.pt", {"a.weight": tied, "b.weight": other, "c.weight": tied})
    report = prune(path, tmp_path / "out", sparsity=0.5)
    assert [row.name for row in report.tensors] == ["a.weight", "b.weight"] and report.all.weights == 182
    assert verify(tmp_path / "out", path)["ok"]
    manifest = json.loads((tmp_path / "out" / "lpsparse.json").read_text())
    assert "'c.weight' is tied to 'a.weight': written once" in manifest["notes"]
    found = lpsparse.load(tmp_path / "out")
    assert torch.equal(found["c.weight"], found["a.weight"]) and found["c.weight"].count_nonzero() < 91

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (torch.nn.Linear(13, 7, bias=False) for _ in "abc")
            self.c.weight = self.a.weight

    safetensors.torch.load_model(net := Net(), tmp_path / "out" / "model.safetensors")
    assert torch.equal(net.c.weight, found["a.weight"])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is told by Linux")
def test_a_torch_file_is_mapped_not_read(tmp_path: Path) -> None:
    path = save(tmp_path / "net.pt", {"a.weight": torch.ones(2048, 4096)})  # 32 MiB
    before = anonymous_bytes()
    tensor = open_checkpoint(path).tensors[0]
    assert all((block.view(np.float32) == 1).all() for _, block in tensor.blocks())
    assert anonymous_bytes() - before < 16 << 20


def anonymous_bytes() -> int:
    found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) << 10 if found else 0


def test_a_negated_or_conjugate_view_is_refused_not_read_without_its_sign(tmp_path: Path) -> None:
    conjugate = torch.ones(7, dtype=torch.complex64).conj()
    assert torch.imag(conjugate).is_neg() and conjugate.is_conj()
    for value in (torch.imag(conjugate), conjugate):
        assert "'a'" in refusal(save(tmp_path / "net.pt", {"a": value}))


def test_an_empty_torch_file_says_so(tmp_path: Path) -> None:
    (tmp_path / "net.pt").touch()
    assert "0 bytes" in refusal(tmp_path / "net.pt")


@pytest.mark.parametrize(
    "data",
    [
        b"x",
        b"not a torch file",
        b"<html>",
        b"version https://git-lfs.github.com/spec/v1",
        bytes(99),
        b"PK\x03\x04",
        b"PK\x05\x06" + bytes(18),
        b"PK\x05\x06" + b"\xff" * 16 + b"\0\0",
        b"\x80\x02.",
        b"\x80\x02u.",
        b"\x80\x02].",
    ],
)
def test_a_torch_suffix_on_anything_else_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "net.pt").write_bytes(data)
    assert str(tmp_path / "net.pt") in refusal(tmp_path / "net.pt")


@pytest.mark.parametrize("zipped", [True, False])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_mutation_of_a_torch_file_opens_or_raises_input_error(
    zipped: bool, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / f"mutated-{zipped}.pt"
    torch.save({"a": torch.arange(91).view(7, 13), "n": 7}, path, _use_new_zipfile_serialization=zipped)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content[: data.draw(st.integers(1, len(content)) | st.just(len(content)))]))
    try:
        open_checkpoint(path)
    except InputError as refused:
        assert "weights_only" not in refused.what


# Hub ids and bundled models, offline


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def hub_cache(home: Path, name: str = "models--org--name") -> Path:
    """The layout of huggingface_hub's cache, by hand: blobs, and a snapshot of links to them."""
    repo = home / "hub" / name
    for part in ("refs", "blobs", f"snapshots/{COMMIT}"):
        (repo / part).mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    write_safetensors(repo / "blobs" / "aa", {"a.weight": f32(7, 13)})
    (repo / "blobs" / "bb").write_text("{}")
    (repo / "snapshots" / COMMIT / "model.safetensors").symlink_to("../../blobs/aa")
    (repo / "snapshots" / COMMIT / "config.json").symlink_to("../../blobs/bb")
    return home


def test_an_unreachable_hub_id_exits_8_and_says_what_to_give_instead(tmp_path: Path) -> None:
    rc, stdout, stderr = run_cli(["inspect", "org/name"], cwd=tmp_path, HF_HOME=str(tmp_path / "hf"))
    assert (rc, stdout) == (ExitCode.REMOTE, "")
    assert "org/name" in stderr.splitlines()[0]
    assert "--set model=" in stderr.splitlines()[1]


@pytest.mark.parametrize("text", ["org/name", "org/name@main", f"org/name@{COMMIT}"])
def test_a_cached_hub_id_opens_offline_and_names_its_commit(
    text: str, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub_cache(tmp_path / "hf") / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    rc, stdout, stderr = cli("inspect", text, "--json")
    assert (rc, stderr) == (0, "")
    found = json.loads(stdout)
    assert (found["model"], found["revision"]) == ("org/name", COMMIT)
    assert [tensor["name"] for tensor in found["tensors"]] == ["a.weight"]


def test_prune_of_a_hub_id_copies_sidecars_out_of_the_cache(tmp_path: Path) -> None:
    home = hub_cache(tmp_path / "hf")
    rc, _, _ = run_cli(["prune", "org/name", "out", "--sparsity", "0.5"], cwd=tmp_path, HF_HOME=str(home))
    assert rc == 0
    assert not (tmp_path / "out" / "config.json").is_symlink()
    assert (tmp_path / "out" / "config.json").read_text() == "{}"
    assert json.loads((tmp_path / "out" / "lpsparse.json").read_text())["source"]["revision"] == COMMIT


def test_a_folder_wins_over_a_hub_id_of_the_same_name(tmp_path: Path) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    write_safetensors(tmp_path / "org" / "name" / "model.safetensors", {"mine": f32(7, 13)})
    rc, stdout, _ = run_cli(["inspect", "org/name"], cwd=tmp_path, HF_HOME=str(hub_cache(tmp_path / "hf")))
    assert rc == 0 and "mine" in stdout


@pytest.mark.parametrize(
    "text", ["org/name@../../x", "org/..", "org/name\n", "a/b/c", "~/model", "x.safetensors"]
)
def test_text_that_is_neither_path_nor_hub_id_is_not_looked_up(text: str, tmp_path: Path) -> None:
    with pytest.raises(LpsparseError) as refused:
        open_checkpoint(text)
    assert refused.value.exit_code in (ExitCode.INPUT, ExitCode.REMOTE)


@pytest.mark.parametrize(
    "name", ["../x", "..", ".", "", "nothing", "../bundled/stories260k", "/etc", "stories260k/../.."]
)
def test_bundled_names_one_of_our_own_folders_only(name: str) -> None:
    with refuses("LPS326"):
        open_checkpoint(f"bundled:{name}")


def test_an_absolute_path_is_no_bundled_model(tmp_path: Path) -> None:
    (tmp_path / "bundled" / "x").mkdir(parents=True)
    with refuses("LPS326"):
        open_checkpoint(f"bundled:{tmp_path / 'bundled' / 'x'}")


def test_the_bundled_model_opens_from_any_folder(
    tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rc, stdout, _ = cli("inspect", "bundled:stories260k")
    assert rc == 0 and "\nbundled:stories260k: dense" in stdout


def test_a_remote_error_is_raised_in_python_too(tmp_path: Path) -> None:
    code = (
        "import lpsparse\ntry: lpsparse.open('org/name')\nexcept lpsparse.LpsparseError as e: print(e.code)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "LPS801\n"
    assert RemoteError.exit_code == ExitCode.REMOTE


def test_a_cache_without_weights_is_a_matter_of_the_hub_and_exits_8(tmp_path: Path) -> None:
    home = hub_cache(tmp_path / "hf")
    (home / "hub/models--org--name/snapshots" / COMMIT / "model.safetensors").unlink()
    rc, stdout, stderr = run_cli(["inspect", "org/name"], cwd=tmp_path, HF_HOME=str(home))
    assert (rc, stdout) == (ExitCode.REMOTE, "") and "LPS802" in stderr


def test_two_keys_that_are_one_as_text_are_refused(tmp_path: Path) -> None:
    torch.save({1: torch.ones(3), "1": torch.zeros(3)}, tmp_path / "net.pt")
    with refuses("LPS320"):
        open_checkpoint(tmp_path / "net.pt")


# One of several tables in a torch file


def matrices(factor: float = 1.0) -> dict[str, torch.Tensor]:
    return {"a.weight": torch.full((7, 13), factor), "a.bias": torch.zeros(7)}


OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(7, 13), "step": torch.tensor(3.0)}}, "param_groups": [{}]}
HOLDERS: dict[str, tuple[str, Any]] = {  # what people save: where the model is in it
    "a tutorial's": (
        "model_state_dict",
        {
            "epoch": 3,
            "model_state_dict": matrices(),
            "optimizer_state_dict": OPTIMIZER,
            "loss": torch.tensor(0.1),
        },
    ),
    "a speech model's": ("model_state_dict", {"dims": {"n_mels": 80}, "model_state_dict": matrices()}),
    "one of ZeRO's": ("module", {"module": matrices(), "buffer_names": [], "optimizer": OPTIMIZER}),
    "one of two networks'": ("generator", {"generator": matrices(), "optim_g": OPTIMIZER, "steps": 7}),
    "with random states": ("net", {"net": matrices(), "rng_state": torch.zeros(56, dtype=torch.uint8)}),
    "gathered parts": ("app.model", {"app": {"model": matrices(), "optimizer": OPTIMIZER, "epoch": 1}}),
    "an average alone": ("ema.student", {"ema": {"decay": 0.99, "student": matrices()}}),
    # pytorch-hair-segmentation#30
    "with what was measured": ("weight", {"weight": matrices(), "val_iou": 0.7}),
    "with a scaler": ("weights", {"weights": matrices(), "scaler": {"scale": torch.tensor(65536.0)}}),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_the_one_state_dict_is_found_under_any_key(holder: str, tmp_path: Path) -> None:
    key, value = HOLDERS[holder]
    found = open_checkpoint(save(tmp_path / "net.pt", value))
    assert [tensor.name for tensor in found.tensors] == ["a.weight", "a.bias"]
    assert found.notes[0].startswith(f"tensors taken from '{key}'")
    dropped = found.notes[0].partition("; dropped beside it: ")[2].split(", ")
    others = sorted(set(value) - {key.partition(".")[0]})
    assert [each for each in dropped if each and "." not in each] == others


PAIRS = {
    "params": {"params_ema": matrices(2), "params": matrices()},
    "state_dict": {  # OpenTAD#44
        "epoch": 9,
        "state_dict": matrices(),
        "state_dict_ema": {f"module.{name}": value for name, value in matrices(2).items()},
    },
    "mpd": {"mpd": matrices(), "msd": matrices(2), "optim_d": OPTIMIZER},
    "ema.model": {"model": matrices(2), "ema": {"model": matrices()}},
    "model": {"model": matrices(), "queue": torch.ones(3, 5)},
}


@pytest.mark.parametrize("key", PAIRS)
def test_of_several_state_dicts_the_named_one_is_opened_and_none_unnamed(key: str, tmp_path: Path) -> None:
    path = save(tmp_path / "net.pt", PAIRS[key])
    said = refusal(path)
    assert "2 tables of tensors" in said and f"{key!r} (2 tensors)" in said and "--key " in said
    assert float(load(path, key=key)["a.weight"].sum()) == 91
    with refuses("LPS261"):
        open_checkpoint(path, key="other")


@pytest.mark.parametrize("value", [OPTIMIZER, {"optimizer": OPTIMIZER}, {"optim_g": {"a": torch.ones(3, 5)}}])
def test_the_state_of_an_optimizer_is_not_a_model(value: object, tmp_path: Path) -> None:
    assert "no tensors of a model" in refusal(save(tmp_path / "net.pt", value))


def test_key_is_for_base_and_source_too_and_never_ignored(tmp_path: Path, cli: Cli) -> None:
    path = save(tmp_path / "net.pth", PAIRS["params"])
    assert cli("prune", path, tmp_path / "out", "--key", "params", "--sparsity", "0.5").rc == 0
    manifest = json.loads((tmp_path / "out" / "lpsparse.json").read_text())
    assert manifest["recipe"]["prune"]["key"] == "params"
    assert report(tmp_path / "out", path, key="params").base.is_source  # type: ignore[union-attr]
    assert verify(tmp_path / "out", path, key="params")["ok"]
    assert not verify(tmp_path / "out", path, key="params_ema")["ok"]
    assert cli("report", tmp_path / "out", path).rc == ExitCode.INPUT
    for words in (["inspect", "out"], ["report", "out"], ["pack", "out", "packed"], ["verify", "out"]):
        ran = cli(
            *(tmp_path / word if word in ("out", "packed") else word for word in words), "--key", "params"
        )
        assert ran.rc == ExitCode.USAGE


def test_a_torch_checkpoint_of_any_suffix_opens_where_it_is_named(tmp_path: Path) -> None:
    path = save(tmp_path / "last.ckpt", {"state_dict": matrices(), "callbacks": {}})
    assert [tensor.name for tensor in open_checkpoint(path).tensors] == ["a.weight", "a.bias"]
    assert "no weight file" in refusal(tmp_path)
    assert open_checkpoint(tmp_path, "last.ckpt").is_torch


def test_a_class_that_is_refused_is_named(tmp_path: Path) -> None:
    from argparse import Namespace
    from fractions import Fraction

    said = refusal(save(tmp_path / "net.pt", {"state_dict": matrices(), "args": Namespace(a=Fraction(1, 2))}))
    assert "argparse.Namespace, fractions.Fraction" in said


# What is no checkpoint as it lies there


def write_set(folder: Path, count: int, names: list[str]) -> dict[str, str]:
    """Shards of a set, and the index that they would have."""
    folder.mkdir(exist_ok=True)
    weight_map = {
        name: f"model-{i % count + 1:05d}-of-{count:05d}.safetensors" for i, name in enumerate(names)
    }
    for shard in set(weight_map.values()):
        tensors = {name: f32(7, 13, seed=i) for i, name in enumerate(names) if weight_map[name] == shard}
        write_safetensors(folder / shard, tensors)
    return weight_map


def test_an_index_of_another_set_of_shards_is_refused_and_the_set_that_is_there_opens(tmp_path: Path) -> None:
    """CoSER#3: an index of 30 shards beside all 15 of another set; sglang#32279: some are missing."""
    names = [f"layers.{i}.weight" for i in range(6)]
    stale = {name: f"model-{i % 3 + 1:05d}-of-00003.safetensors" for i, name in enumerate(names)}
    write_set(tmp_path / "m", 2, names)
    (tmp_path / "m" / EMPTY_INDEX).write_text(json.dumps({"weight_map": stale}))
    said = refusal(tmp_path / "m")
    assert "'model-00001-of-00003.safetensors' with 2 tensors is missing, as are 2 others" in said
    assert "--weights model-00001-of-00002.safetensors" in said
    for shard in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        assert {tensor.name for tensor in open_checkpoint(tmp_path / "m", shard).tensors} == set(names)
    (tmp_path / "m" / "model-00001-of-00002.safetensors").unlink()
    assert "--weights" not in refusal(tmp_path / "m")  # what is left is no whole set
    with refuses("LPS330", "2 shards"):
        open_checkpoint(tmp_path / "m", "model-00002-of-00002.safetensors")


def test_shards_without_an_index_open_as_a_set_and_one_alone_says_so(tmp_path: Path) -> None:
    write_set(tmp_path / "m", 3, [f"layers.{i}.weight" for i in range(6)])
    first = "model-00001-of-00003.safetensors"
    assert f"--weights {first}" in refusal(tmp_path / "m")
    assert len(open_checkpoint(tmp_path / "m", first).files) == 3
    (note,) = open_checkpoint(tmp_path / "m" / first).notes
    assert "one of 3 shards" in note


def hollow(*empty: str) -> dict[str, Any]:
    """As transformers#20082 and OpenRLHF#839 have them."""
    names = [f"layers.{i}.{part}" for i in (0, 1) for part in ("mlp.weight", "mlp.bias", "norm.weight")]
    return {name: f32(0) if name in empty else f32(7, 13) if "mlp.w" in name else f32(7) for name in names}


@pytest.mark.parametrize(
    "empty",
    [("layers.0.mlp.weight", "layers.1.mlp.weight"), ("layers.1.mlp.weight",), ("layers.0.mlp.bias",)],
)
def test_parameters_that_zero_left_empty_are_refused_by_every_command(
    empty: tuple[str, ...], tmp_path: Path
) -> None:
    path = write_safetensors(tmp_path / "model.safetensors", hollow(*empty))
    for command in (
        inspect,
        report,
        lambda model: prune(model, tmp_path / "o", sparsity=0.5),
        lambda model: lpsparse.pack(model, tmp_path / "o"),
        load,
    ):
        with pytest.raises(InputError, match=f"{len(empty)} of 6 tensors have the shape \\[0\\]") as refused:
            command(path)
        assert "zero_to_fp32.py" in refused.value.hint
    assert not (tmp_path / "o").exists()


def test_a_checkpoint_of_placeholders_is_refused(tmp_path: Path) -> None:
    """DeepSpeed#1394: an older ZeRO-3 left one value in the place of each parameter."""
    layer = {"q_proj.weight": f32(1), "k_proj.weight": f32(1), "norm.weight": f32(7)}
    path = write_safetensors(tmp_path / "model.safetensors", layer)
    assert "2 of 3 tensors have the shape [1]" in refusal(path) and "zero_to_fp32.py" in refusal(path)
    activation = {"0.weight": f32(7, 13), "1.weight": f32(1), "3.weight": f32(1)}  # PReLU's have one value
    assert len(open_checkpoint(write_safetensors(path, activation)).tensors) == 3
    assert len(open_checkpoint(write_safetensors(path, {"scale": f32(1), "bias": f32(1)})).tensors) == 2


def test_tensors_that_may_hold_nothing_do(tmp_path: Path) -> None:
    tensors = {"a.weight": f32(7, 13), "none.weight": f32(0, 7), "a.bias": f32(0), "state": ("U8", [0], b"")}
    assert len(open_checkpoint(write_safetensors(tmp_path / "m.safetensors", tensors)).tensors) == 4


@pytest.mark.parametrize(
    ("parts", "command"),
    [
        (
            [
                "global_step7/mp_rank_00_model_states.pt",
                "global_step7/zero_pp_rank_0_mp_rank_00_optim_states.pt",
            ],
            "zero_to_fp32.py",
        ),
        (
            ["model_fsdp_0/__0_0.distcp", "model_fsdp_0/__1_0.distcp", "model_fsdp_0/.metadata"],
            "dcp_to_torch",
        ),
    ],
)
def test_parts_that_were_not_gathered_are_refused_with_the_command_that_does(
    parts: list[str], command: str, tmp_path: Path
) -> None:
    paths = [tmp_path / part for part in parts]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    last = next(path for path in reversed(paths) if path.suffix in (".pt", ".distcp"))
    for model in (tmp_path, last.parent, last):
        said = refusal(model)
        assert command in said and "not gathered" in said
    write_safetensors(tmp_path / "model.safetensors", {"a.weight": f32(7, 13)})
    assert len(open_checkpoint(tmp_path).tensors) == 1  # a training's folder that holds the model, too


def test_programs_of_torch_are_named_with_the_line_that_saves_their_weights(tmp_path: Path) -> None:
    module = torch.nn.Linear(13, 7)
    with warnings.catch_warnings(action="ignore"):  # deprecated, and there are many such files
        torch.jit.script(module).save(tmp_path / "net.pt")
        state = torch.jit.load(tmp_path / "net.pt", map_location="cpu").state_dict()
    with zipfile.ZipFile(tmp_path / "net.pt2", "w") as archive:
        archive.writestr("net/archive_format", "pt2")
    for name, kind, call in (
        ("net.pt", "TorchScript", "torch.jit.load"),
        ("net.pt2", "torch.export", "export.load"),
    ):
        said = refusal(tmp_path / name)
        assert kind in said and call in said and "not a state dict" in said
    torch.save(state, tmp_path / "weights.pt")
    assert len(open_checkpoint(tmp_path / "weights.pt").tensors) == 2
