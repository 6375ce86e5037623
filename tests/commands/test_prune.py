"""`lpsparse prune` from end to end: OUT is whole or absent, and nothing but the chosen weights changes."""

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch
from support.cli import LISTENING, Ran, cli_environment, run_cli
from support.files import (
    PRUNABLE,
    PRUNABLE_WEIGHTS,
    f32,
    tiny_arrays,
    tree_hash,
    write_safetensors,
    write_sidecars,
    write_tiny,
)

import lpsparse
from lpsparse import pack, prune, report, unpack, verify
from lpsparse.checkpoint.files import OWNER, REPLACED
from lpsparse.checkpoint.open import open_checkpoint
from lpsparse.checkpoint.transaction import remove_ours
from lpsparse.commands.prune import prune_step
from lpsparse.errors import InputError, LpsparseError, OutputError, StateError
from lpsparse.families import LAYOUTS
from lpsparse.reporting.summary import drained
from lpsparse.steps.prune import PruneStep
from lpsparse.steps.resolve import resolve

Cli = Callable[..., Ran]


# What comes out


@pytest.fixture(scope="session")
def pruned_minilm(minilm: Path) -> tuple[Path, Path, dict[str, str]]:
    """MiniLM, MiniLM at 0.8, and the hashes of the input before."""
    before = tree_hash(minilm)
    prune(minilm, minilm.parent / "sparse", sparsity=0.8)
    return minilm, minilm.parent / "sparse", before


def test_a_real_model_gets_exactly_the_zeros_asked_for_and_no_other_change(
    pruned_minilm: tuple[Path, Path, Any],
) -> None:
    dense = load_file(pruned_minilm[0] / "model.safetensors")
    sparse = load_file(pruned_minilm[1] / "model.safetensors")
    manifest = json.loads((pruned_minilm[1] / "lpsparse.json").read_text())
    cut = [record["name"] for record in manifest["tensors"] if record["prunable"]]
    weights = sum(dense[name].size for name in cut)
    assert len(cut) == 36 and weights == 10_616_832
    assert (
        sum(int(np.count_nonzero(sparse[name] == 0)) for name in cut)
        == math.floor(0.8 * weights)
        == 8_493_465
    )
    assert sparse.keys() == dense.keys()
    for name, array in sparse.items():
        changed = array.view(np.uint8) != dense[name].view(np.uint8)
        assert name in cut or not changed.any()
        assert not array.view(np.uint8)[changed].any()  # what changed is +0.0


def test_the_input_is_not_touched(pruned_minilm: tuple[Path, Path, dict[str, str]]) -> None:
    assert tree_hash(pruned_minilm[0]) == pruned_minilm[2]
    assert not list(pruned_minilm[0].parent.glob("*.partial"))


def test_sidecars_are_copied_byte_for_byte(pruned_minilm: tuple[Path, Path, dict[str, str]]) -> None:
    _, out, before = pruned_minilm
    after = tree_hash(out)
    new = {"README.md", "README.base.md", "lpsparse.json", "report.json", "model.safetensors"}
    new |= {"figures", "figures/sparsity.svg"}
    assert {name: after[name] for name in after if name not in new} == {
        name: before[name] for name in before if name not in new
    }
    assert after.keys() == before.keys() | new
    assert after["README.base.md"] == before["README.md"] != after["README.md"]


def test_report_card_and_manifest_say_what_was_done(pruned_minilm: tuple[Path, Path, Any]) -> None:
    out = pruned_minilm[1]
    manifest = json.loads((out / "lpsparse.json").read_text())
    report = json.loads((out / "report.json").read_text())
    assert manifest["recipe"]["prune"]["sparsity"] == "0.8"
    assert report["prunable"]["zeros"] == 8_493_465
    assert "8,493,465 of 10,616,832 (80.00 %)" in (out / "README.md").read_text()
    assert {file["name"] for file in manifest["files"]} == {
        name for name, kind in tree_hash(out).items() if kind != "dir"
    } - {"lpsparse.json"}


def test_neither_paths_nor_names_of_this_machine_are_written(tiny: Path, tmp_path: Path) -> None:
    prune(tiny, tmp_path / "out", sparsity=0.5)
    for name in ("lpsparse.json", "report.json", "README.md"):
        text = (tmp_path / "out" / name).read_text()
        assert str(tmp_path) not in text and socket.gethostname() not in text


def test_the_command_line_and_python_write_the_same_bytes_twice(tiny: Path, tmp_path: Path) -> None:
    ran = run_cli(["prune", tiny, tmp_path / "first", "--sparsity", "0.29"], PYTHONHASHSEED="1")
    prune(tiny, tmp_path / "second", sparsity=0.29)
    assert ran.rc == 0
    assert tree_hash(tmp_path / "first") == tree_hash(tmp_path / "second")


def test_the_command_line_says_what_it_keeps_and_what_comes_next(
    tiny: Path, tmp_path: Path, cli: Cli
) -> None:
    ran = cli("prune", tiny, tmp_path / "out", "--sparsity", "0.5")
    assert ran.rc == 0
    assert "\nout: 50.00 % of prunable weights are zero (182 of 364)\n" in ran.stdout
    assert "4 tensors can be pruned" in ran.stderr and "1 embedding" in ran.stderr
    assert f"next: lpsparse report {tmp_path / 'out'} {tiny}" in ran.stderr


def test_weights_in_foreign_formats_stay_behind_and_are_named(tiny: Path, tmp_path: Path, cli: Cli) -> None:
    foreign = ("pytorch_model.bin", "onnx/model.onnx", "tf_model.h5", "model.gguf", "onnx/model.safetensors")
    (tiny / "onnx").mkdir()
    for name in foreign:
        (tiny / name).write_bytes(b"weights")
    ran = cli("prune", tiny, tmp_path / "out", "--sparsity", "0.5")
    assert not any((tmp_path / "out" / name).exists() for name in foreign)
    (left,) = (line for line in ran.stderr.splitlines() if line.startswith("left behind: "))
    assert set(left.removeprefix("left behind: ").split(", ")) == set(foreign)
    assert json.loads((tmp_path / "out" / "lpsparse.json").read_text())["notes"] == [left]


def test_links_out_of_the_folder_and_hidden_folders_stay_behind(tiny: Path, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    (tiny / "link.txt").symlink_to(tmp_path / "secret.txt")
    (tiny / ".git").mkdir()
    (tiny / ".git" / "config").write_text("x")
    ran = cli("prune", tiny, tmp_path / "out", "--sparsity", "0.5")
    assert "link.txt (a link out of the folder)" in ran.stderr
    assert not {"link.txt", ".git"} & set(os.listdir(tmp_path / "out"))


def test_what_cannot_be_cut_passes_through_unharmed(tiny: Path, tmp_path: Path) -> None:
    prune(tiny, tmp_path / "out", sparsity=1, allow_empty=True)
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, array in tiny_arrays().items():
        expected = np.zeros_like(array) if name in PRUNABLE else array
        assert found[name].shape == array.shape
        assert found[name].tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_every_float_dtype_is_cut_in_its_own_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.randn(31, 37, generator=torch.Generator().manual_seed(3)).to(dtype)
    buffers = {
        "mask": torch.tensor([[True, False]]),
        "steps": torch.tensor(7),
        "none": torch.empty(0, 7, dtype=dtype),
    }
    save_torch({"a.weight": values, **buffers}, tmp_path / "m.safetensors")
    prune(tmp_path / "m.safetensors", tmp_path / "out", sparsity=0.71)
    found = load_torch(tmp_path / "out" / "m.safetensors")
    kept = found["a.weight"].double() != 0
    assert int((~kept).sum()) == math.floor(0.71 * 31 * 37)
    assert torch.equal(found["a.weight"].double()[kept], values.double()[kept])
    assert values.double().abs()[kept].min() >= values.double().abs()[~kept].max()
    assert all(
        torch.equal(found[name].to(torch.int8), value.to(torch.int8)) for name, value in buffers.items()
    )


def test_a_torch_file_comes_out_as_safetensors_with_its_own_names(tmp_path: Path) -> None:
    torch.save({"state_dict": {"module.a.weight": torch.ones(7, 13)}, "epoch": 3}, tmp_path / "net.th")
    prune(tmp_path / "net.th", tmp_path / "out", sparsity=0.5)
    assert sorted(os.listdir(tmp_path / "out")) == [
        "README.md",
        "figures",
        "lpsparse.json",
        "model.safetensors",
        "report.json",
    ]
    assert list(load_file(tmp_path / "out" / "model.safetensors")) == ["module.a.weight"]
    notes = json.loads((tmp_path / "out" / "lpsparse.json").read_text())["notes"]
    assert notes == ["tensors taken from 'state_dict'; dropped beside it: epoch"]


def test_shards_stay_shards_with_an_index_of_their_own(shards: Path, tmp_path: Path) -> None:
    prune(shards, tmp_path / "out", sparsity=0.5)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    old = json.loads((shards / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == dict(sorted(old["weight_map"].items()))
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in tiny_arrays().values())
    assert verify(tmp_path / "out")["ok"]


def test_pruning_what_lpsparse_wrote_keeps_the_base_card(tiny: Path, tmp_path: Path) -> None:
    prune(tiny, tmp_path / "once", sparsity=0.5)
    prune(tmp_path / "once", tmp_path / "twice", sparsity=0.7)
    assert (tmp_path / "twice" / "README.base.md").read_bytes() == (tiny / "README.md").read_bytes()
    assert sorted(tree_hash(tmp_path / "once")) == sorted(tree_hash(tmp_path / "twice"))


def test_a_dry_run_measures_the_cut_and_writes_nothing(tiny: Path, tmp_path: Path, cli: Cli) -> None:
    before = tree_hash(tmp_path)
    ran = cli("prune", tiny, tmp_path / "out", "--sparsity", "0.29", "--dry-run", "--json")
    assert ran.rc == 0 and "dry run: nothing is written" in ran.stderr
    assert json.loads(ran.stdout)["prunable"]["zeros"] == math.floor(0.29 * PRUNABLE_WEIGHTS)
    assert tree_hash(tmp_path) == before


# What is refused, with nothing left behind


def refused(model: Path, out: Path, **options: Any) -> LpsparseError:
    """The refusal of a prune that leaves every file below OUT's parent as it was."""
    root = out.absolute().parent if out.absolute().parent.is_dir() else model.parent
    before = tree_hash(root)
    with pytest.raises(LpsparseError) as error:
        prune(model, out, **({"sparsity": 0.5} | options))
    assert tree_hash(root) == before
    return error.value


def test_an_out_that_exists_is_refused(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for name in ("folder", "file", "link"):
        error = refused(tiny, tmp_path / name)
        assert (int(error.exit_code), "exists already" in error.what) == (4, True)


@pytest.mark.parametrize("where", [".", "..", "/", ""])
def test_the_folder_we_are_in_is_no_out(where: str, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tiny.parent / "empty").mkdir()
    monkeypatch.chdir(tiny.parent / "empty")
    before = tree_hash(tiny.parent)
    for overwrite in (False, True):
        with pytest.raises(OutputError):
            prune(tiny, where, sparsity=0.5, overwrite=overwrite)
    assert tree_hash(tiny.parent) == before


def test_an_out_inside_the_model_is_refused(tiny: Path) -> None:
    assert "inside the input" in refused(tiny, tiny / "out").what
    assert "inside the input" in refused(tiny, tiny / "extra" / "out").what


def test_overwriting_the_model_with_its_own_result_is_refused(tiny: Path, tmp_path: Path) -> None:
    prune(tiny, tmp_path / "out", sparsity=0.5)
    for model in (tmp_path / "out", tmp_path / "out" / "model.safetensors"):
        error = refused(model, tmp_path / "out", overwrite=True)
        assert (int(error.exit_code), error.code) == (4, "LPS405")


def test_an_out_without_a_parent_is_refused_with_the_command_that_makes_it(
    tiny: Path, tmp_path: Path
) -> None:
    error = refused(tiny, tmp_path / "a" / "b")
    assert int(error.exit_code) == 4
    assert error.hint == f"mkdir -p {tmp_path / 'a'}"


def test_an_out_with_too_long_a_name_is_refused(tiny: Path, tmp_path: Path, cli: Cli) -> None:
    ran = cli("prune", tiny, tmp_path / ("o" * 300), "--sparsity", "0.5")
    assert ran.rc == 4
    assert ran.stderr.splitlines()[-2].startswith("error[LPS4")


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", [PRUNABLE[0], "norm.weight"])
def test_nan_or_infinity_anywhere_names_the_tensor(name: str, value: float, tmp_path: Path) -> None:
    array = np.ones((7, 13), np.float32)
    array[6, 12] = value
    given = {PRUNABLE[1]: f32(7, 13), name: ("F32", [7, 13], array.tobytes())}
    write_safetensors(tmp_path / "m.safetensors", given)
    error = refused(tmp_path / "m.safetensors", tmp_path / "out")
    assert isinstance(error, InputError)
    assert f"m.safetensors: {name!r}: 1 values are NaN or Inf" in error.what


def test_a_disk_too_small_is_refused_before_the_first_byte(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    error = refused(tiny, tmp_path / "out")
    assert int(error.exit_code) == 4 and "1000 are free" in error.what


def test_a_full_disk_while_writing_leaves_nothing(tiny: Path, tmp_path: Path) -> None:
    code = (  # a file-size limit, as a full disk: every larger write fails with EFBIG
        "import resource, signal, sys; from lpsparse.cli import main;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700)); main(sys.argv[1:])"
    )
    arguments = ["prune", tiny, tmp_path / "out", "--sparsity", "0.5"]
    before = tree_hash(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=cli_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 4
    assert "File too large" in done.stderr.splitlines()[-2]
    assert tree_hash(tmp_path) == before


# Overwriting


def test_overwrite_replaces_what_lpsparse_wrote(tiny: Path, tmp_path: Path) -> None:
    prune(tiny, tmp_path / "out", sparsity=0.5)
    prune(tiny, tmp_path / "out", sparsity=0.7, overwrite=True)
    prune(tiny, tmp_path / "fresh", sparsity=0.7)
    assert tree_hash(tmp_path / "out") == tree_hash(tmp_path / "fresh")
    assert sorted(os.listdir(tmp_path)) == ["fresh", "out", "tiny"]


@pytest.mark.parametrize("kind", ["empty folder", "folder of a person", "file"])
def test_overwrite_touches_nothing_that_lpsparse_did_not_write(kind: str, tiny: Path, tmp_path: Path) -> None:
    if kind == "file":
        (tmp_path / "out").write_text("mine")
    else:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.txt").write_text("mine") if "person" in kind else None
    error = refused(tiny, tmp_path / "out", overwrite=True)
    assert (int(error.exit_code), error.code) == (4, "LPS402")


@pytest.mark.parametrize("made", ["{}", "no manifest", None])
def test_overwrite_deletes_no_file_that_is_not_in_the_manifest(
    made: str | None, tiny: Path, tmp_path: Path
) -> None:
    if made is None:
        prune(tiny, tmp_path / "out", sparsity=0.5)
    else:
        (tmp_path / "out" / "data").mkdir(parents=True)
        (tmp_path / "out" / "lpsparse.json").write_text(made)
    for name in ("thesis.txt", ".git", "figures/own.svg"):
        path = tmp_path / "out" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
        before = tree_hash(tmp_path)
        error = refused(tiny, tmp_path / "out", overwrite=True)
        assert error.code == "LPS402" and (made is not None or f"{name} would be lost" in error.what)
        assert tree_hash(tmp_path) == before
        path.unlink()
    if made is None:
        prune(tiny, tmp_path / "out", sparsity=0.6, overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_persons_own_folder_called_out_old_is_left_alone(
    overwrite: bool, tiny: Path, tmp_path: Path
) -> None:
    (tmp_path / "out.old").mkdir()
    (tmp_path / "out.old" / "thesis.txt").write_text("mine")
    if overwrite:
        assert "out.old" in refused(tiny, tmp_path / "out", overwrite=True).what
    else:
        prune(tiny, tmp_path / "out", sparsity=0.5)
    assert (tmp_path / "out.old" / "thesis.txt").read_text() == "mine"


def test_a_run_that_died_between_the_two_renames_is_put_back(tiny: Path, tmp_path: Path) -> None:
    prune(tiny, tmp_path / "out", sparsity=0.5)
    before = tree_hash(tmp_path / "out")
    (tmp_path / "out" / REPLACED).touch()  # what an exchange does first
    (tmp_path / "out").rename(tmp_path / "out.old")
    with pytest.raises(OutputError, match="exists already"):
        prune(tiny, tmp_path / "out", sparsity=0.7)
    assert tree_hash(tmp_path / "out") == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_backup_called_out_old_that_lpsparse_wrote_is_nobodys_to_move_or_delete(
    overwrite: bool, tiny: Path, tmp_path: Path
) -> None:
    prune(tiny, tmp_path / "out.old", sparsity=0.5)
    before = tree_hash(tmp_path / "out.old")
    prune(tiny, tmp_path / "out", sparsity=0.7)
    if overwrite:
        assert refused(tiny, tmp_path / "out", overwrite=True).code == "LPS402"
    assert tree_hash(tmp_path / "out.old") == before and verify(tmp_path / "out")["ok"]


def test_overwriting_twice_leaves_one_result_and_no_mark(tiny: Path, tmp_path: Path) -> None:
    for sparsity in (0.5, 0.6, 0.7):
        prune(tiny, tmp_path / "out", sparsity=sparsity, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tiny"]
    assert not (tmp_path / "out" / REPLACED).exists() and verify(tmp_path / "out")["ok"]


def test_one_shard_of_one_comes_out_under_the_name_that_loaders_look_for(tiny: Path, tmp_path: Path) -> None:
    shard = "model-00001-of-00001.safetensors"
    (tiny / "model.safetensors").rename(tiny / shard)
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(tiny / shard), shard)}
    (tiny / "model.safetensors.index.json").write_text(json.dumps(index))
    prune(tiny, tmp_path / "out", sparsity=0.5)
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors*")] == ["model.safetensors"]


def test_a_failed_overwrite_leaves_the_old_result(tiny: Path, tmp_path: Path) -> None:
    prune(tiny, tmp_path / "out", sparsity=0.5)
    array = np.full((7, 13), np.nan, np.float32)
    write_safetensors(tmp_path / "m.safetensors", {"a.weight": ("F32", [7, 13], array.tobytes())})
    assert int(refused(tmp_path / "m.safetensors", tmp_path / "out", overwrite=True).exit_code) == 3


# Runs that died, and runs that live


def leave_partial(folder: Path, pid: int, host: str | None = None) -> Path:
    partial = folder / "out.partial"
    partial.mkdir()
    owner = {"pid": pid, "host": host or socket.gethostname()}
    (partial / ".lpsparse-owner.json").write_text(json.dumps(owner))
    (partial / "model.safetensors").write_bytes(bytes(91))
    return partial


def dead_pid() -> int:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def test_the_left_over_of_a_dead_process_is_cleaned(tiny: Path, tmp_path: Path) -> None:
    leave_partial(tmp_path, dead_pid())
    prune(tiny, tmp_path / "out", sparsity=0.5)
    assert sorted(os.listdir(tmp_path)) == ["out", "tiny"]
    assert verify(tmp_path / "out")["ok"]


@pytest.mark.parametrize("owner", [None, "", '{"pid": '])
def test_a_process_that_died_before_it_could_sign_is_cleaned_up_too(
    owner: str | None, tiny: Path, tmp_path: Path
) -> None:
    (tmp_path / "out.partial").mkdir()
    if owner is not None:
        (tmp_path / "out.partial" / ".lpsparse-owner.json").write_text(owner)
    prune(tiny, tmp_path / "out", sparsity=0.5)
    assert sorted(os.listdir(tmp_path)) == ["out", "tiny"]


def test_an_out_that_a_living_process_writes_is_refused(tiny: Path, tmp_path: Path, cli: Cli) -> None:
    leave_partial(tmp_path, os.getpid())
    before = tree_hash(tmp_path)
    ran = cli("prune", tiny, tmp_path / "out", "--sparsity", "0.5")
    assert ran.rc == 7
    assert f"process {os.getpid()} on {socket.gethostname()}" in ran.stderr
    assert tree_hash(tmp_path) == before


def test_an_out_that_another_machine_may_be_writing_is_refused(tiny: Path, tmp_path: Path) -> None:
    leave_partial(tmp_path, dead_pid(), host="elsewhere")
    assert isinstance(refused(tiny, tmp_path / "out"), StateError)


def test_a_persons_own_folder_called_out_partial_is_left_alone(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("mine")
    assert isinstance(refused(tiny, tmp_path / "out"), StateError)


def start(model: Path, out: Path, delay: float) -> subprocess.Popen[bytes]:
    """A prune in a process of its own, `delay` seconds after it began to write; or ended."""
    process = subprocess.Popen(
        [sys.executable, "-c", LISTENING, "prune", str(model), str(out), "--sparsity", "0.8"],
        env=cli_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    partial = out.with_name(f"{out.name}.partial")
    while not partial.exists() and process.poll() is None:
        time.sleep(0.001)
    time.sleep(delay)
    return process


def test_ctrl_c_leaves_nothing_and_exits_130(minilm: Path, tmp_path: Path) -> None:
    process = start(minilm, tmp_path / "out", 0.02)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"interrupted" in stderr and b"Traceback" not in stderr
    assert os.listdir(tmp_path) == []


def test_sidecars_of_every_name_arrive(tmp_path: Path) -> None:
    write_sidecars(tmp_path / "Ünï cödé 模型")
    for name in ("metrics.jsonl", "report.json", "LICENSE", "a b\tc.txt", ".gitattributes"):
        (tmp_path / "Ünï cödé 模型" / name).write_text(name)
    write_safetensors(tmp_path / "Ünï cödé 模型" / "model.safetensors", {"a.weight": f32(7, 13)})
    prune(tmp_path / "Ünï cödé 模型", tmp_path / "aus gang", sparsity=0.5)
    found = set(os.listdir(tmp_path / "aus gang"))
    assert {"LICENSE", "a b\tc.txt", ".gitattributes", "extra", "README.base.md"} <= found
    assert "metrics.jsonl" not in found  # an earlier run's
    assert verify(tmp_path / "aus gang")["ok"]


def test_weights_of_the_modules_of_a_sentence_transformer_come_along(tiny: Path, tmp_path: Path) -> None:
    modules = [{"idx": i, "path": path} for i, path in enumerate(("", "1_Pooling", "2_Dense"))]
    (tiny / "modules.json").write_text(json.dumps(modules))
    for name in ("2_Dense", "onnx"):
        (tiny / name).mkdir()
        save_file({"linear.weight": np.ones((4, 4), np.float32)}, tiny / name / "model.safetensors")
    prune(tiny, tmp_path / "out", sparsity=0.5)
    pack(tmp_path / "out", tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "back")
    for name in ("out", "packed", "back"):
        copied = (tmp_path / name / "2_Dense" / "model.safetensors").read_bytes()
        assert copied == (tiny / "2_Dense" / "model.safetensors").read_bytes()
        assert not (tmp_path / name / "onnx").exists() and verify(tmp_path / name)["ok"]
    assert report(tmp_path / "out").all.weights == report(tiny).all.weights


@pytest.mark.parametrize("table", ["[", "7", "{}", "[7]", '[{"path": 7}]', '[{"path": "../tiny"}]', "null"])
def test_modules_that_are_none_change_nothing(table: str, tiny: Path, tmp_path: Path) -> None:
    (tiny / "modules.json").write_text(table)
    (tiny / "2_Dense").mkdir()
    save_file({"linear.weight": np.ones((4, 4), np.float32)}, tiny / "2_Dense" / "model.safetensors")
    prune(tiny, tmp_path / "out", sparsity=0.5)
    assert (tmp_path / "out" / "modules.json").read_text() == table
    assert not (tmp_path / "out" / "2_Dense").exists()


def test_sidecars_that_are_left_behind_are_named(tiny: Path, tmp_path: Path, cli: Cli) -> None:
    for name in ("report.json", "metrics.jsonl", "README.base.md", "model.onnx"):
        (tiny / name).write_text(name)  # somebody else's, where ours are to be
    (tiny / "gone.txt").symlink_to("../nowhere")
    (tmp_path / "elsewhere").mkdir()
    (tiny / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "a.txt").touch()
    (tiny / "a.txt").symlink_to(tmp_path / "elsewhere" / "a.txt")
    said = cli("prune", tiny, tmp_path / "out", "--sparsity", "0.5").stderr
    left = (
        "README.base.md, a.txt (a link out of the folder), gone.txt (no file), metrics.jsonl, model.onnx, "
        "more (a link to a folder), report.json"
    )
    assert f"left behind: {left}\n" in said
    assert json.loads((tmp_path / "out" / "lpsparse.json").read_text())["notes"] == [f"left behind: {left}"]
    assert (tmp_path / "out" / "README.base.md").read_text() == (tiny / "README.md").read_text()


def test_a_dry_run_refuses_what_the_run_would_refuse(tiny: Path, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "out").mkdir()
    assert cli("prune", tiny, tmp_path / "out", "--sparsity", "0.5", "--dry-run").rc == 4


def test_a_tensor_of_which_nothing_is_left_is_named(tiny: Path, tmp_path: Path, cli: Cli) -> None:
    arrays = tiny_arrays() | {PRUNABLE[1]: tiny_arrays()[PRUNABLE[1]] * 1e-6}
    save_torch({name: torch.from_numpy(array) for name, array in arrays.items()}, tiny / "model.safetensors")
    said = cli("prune", tiny, tmp_path / "out", "--sparsity", "0.5").stderr
    assert f"100 % zero: {PRUNABLE[1]}. Keep it with `--exclude`" in said and PRUNABLE[0] not in said


def test_a_tensor_of_which_next_to_nothing_is_left_is_named_in_every_view(tmp_path: Path, cli: Cli) -> None:
    draw = np.random.default_rng(0)
    small, large = (draw.standard_normal((53, 48)).astype("f4") * scale for scale in (1e-3, 1))
    small[3, 5] = 9
    save_file({"block.dense.weight": small, "a.weight": large}, tmp_path / "m.safetensors")
    told = "nearly 100 % zero: block.dense.weight (1 of 2,544 weights left). Keep it with `--exclude`, or"
    ran = cli("prune", tmp_path / "m.safetensors", tmp_path / "out", "--sparsity", "0.6")
    assert f"\n{told} spread the cut with `prune --scope" in ran.stderr and "100 %" not in ran.stdout
    shown = cli("report", tmp_path / "out", "--html", tmp_path / "r.html", "--markdown", tmp_path / "r.md")
    assert f"\nwarning: {told}" in shown.stdout
    assert "Warning: nearly 100 % zero: `block.dense.weight`" in (tmp_path / "r.md").read_text()
    assert "Nearly 100 % zero: <bdi>block.dense.weight</bdi>" in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize(
    ("zeros", "told"),
    [
        ((998, 0), None),
        ((999, 0), "nearly 100 % zero: a (1 of 1,000 weights left). "),
        ((1000, 0), "now 100 % zero: a. "),
        ((999, 999), None),
        ((999, 901), None),
        ((1000, 1000), "now 100 % zero: a, b (2 tensors). "),
        ((1000, 901), "now 100 % zero: a. "),
        ((1000, 999), "now 100 % zero: a. "),
    ],
)
def test_next_to_nothing_is_told_where_less_is_cut(zeros: tuple[int, int], told: str | None) -> None:
    found = drained([("a", zeros[0], 1000), ("b", zeros[1], 1000), ("empty", 0, 0)])
    assert found is None if told is None else str(found).startswith(told)


@pytest.mark.parametrize("mark", [OWNER, REPLACED])
def test_a_deletion_that_is_cut_short_leaves_the_mark_that_the_folder_is_ours(
    mark: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out.partial"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.json", mark, "z.json", "sub/b"):
        (folder / name).write_text("{}")
    rmtree = shutil.rmtree

    def killed_at_the_end(path: Path) -> None:
        if path == folder:
            raise KeyboardInterrupt
        rmtree(path)

    monkeypatch.setattr(shutil, "rmtree", killed_at_the_end)
    with pytest.raises(KeyboardInterrupt):
        remove_ours(folder, mark)
    assert [path.name for path in folder.iterdir()] == [mark]
    monkeypatch.undo()
    remove_ours(folder, mark)
    assert not folder.exists()


# Against the source


def test_what_was_cut_is_its_source_or_zero(tiny: Path, shards: Path, tmp_path: Path, cli: Cli) -> None:
    prune(tiny, tmp_path / "out", sparsity=0.5)
    pack(tmp_path / "out", tmp_path / "packed")
    for folder in (tmp_path / "out", tmp_path / "packed"):
        for source in (tiny, shards):  # the same tensors
            assert verify(folder, source)["ok"]
    said = cli("verify", tmp_path / "out", tiny)
    assert said.rc == 0 and f"every value is that of {tiny} or 0" in said.stdout


def test_values_names_and_shapes_that_are_not_the_sources_are_named(tmp_path: Path, cli: Cli) -> None:
    array = np.arange(1, 92, dtype=np.float32).reshape(7, 13)
    base = {"a.weight": array, "b.weight": array, "c.weight": array, "ids": np.arange(1, 8)}
    other = {"a.weight": array.copy(), "b.weight": array[:5], "d.weight": array, "ids": np.arange(7)}
    other["a.weight"][2, 3] = np.nextafter(other["a.weight"][2, 3], np.float32(99))
    for name, arrays in (("base", base), ("other", other)):
        (tmp_path / name).mkdir()
        save_file(arrays, tmp_path / name / "model.safetensors")
    prune(tmp_path / "other", tmp_path / "out", sparsity=0)
    said = cli("verify", tmp_path / "out", tmp_path / "base")
    assert said.rc == 1 and "FAILED: 5 differences" in said.stdout
    for what in (
        "a.weight: 1 values are neither",
        "b.weight: F32 (5, 13), base has F32 (7, 13)",
        "d.weight: not in base",
        "c.weight: missing",
        "ids: 7 values are neither",
    ):
        assert what in said.stdout, said.stdout


@pytest.mark.parametrize("layout", ["dense", "bitmask"])
def test_a_bit_that_the_disk_flips_is_seen_before_out_is_there(
    layout: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = os.fsync

    def flip(descriptor: int) -> None:
        size = os.fstat(descriptor).st_size
        if size > 1000:
            with suppress(OSError):  # of what is only read
                os.pwrite(descriptor, b"\x55", size - 1)
        sync(descriptor)

    monkeypatch.setattr("lpsparse.checkpoint.files.os.fsync", flip)
    with pytest.raises(OutputError, match=r"read back") as caught:
        prune(tiny, tmp_path / "out", sparsity=0.2, layout=layout)
    assert caught.value.code == "LPS408" and not list(tmp_path.glob("out*"))


def test_a_tensor_that_a_layout_loses_is_seen_before_out_is_there(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = LAYOUTS["dense"]
    loses = replace(dense, write=lambda target, tensors, *more: dense.write(target, tensors[1:], *more))
    monkeypatch.setitem(LAYOUTS.members, "dense", loses)
    with pytest.raises(OutputError) as caught:
        prune(tiny, tmp_path / "out", sparsity=0.2)
    assert caught.value.code == "LPS408" and not list(tmp_path.glob("out*"))


def test_values_under_a_byte_are_counted_and_carried_within_their_own_bytes(tmp_path: Path, cli: Cli) -> None:
    source = tmp_path / "m.safetensors"
    given = {
        "a.weight": ("F4", [6, 2], b"\x11" * 6),
        "b.weight": f32(7, 13),
        "c.weight": ("F4", [8], b"\x22" * 4),
    }
    write_safetensors(source, given)
    found = {row.name: row for row in report(source).tensors}
    assert [found[name].zeros for name in ("a.weight", "c.weight")] == [0, 0]
    prune(source, tmp_path / "out", sparsity=0.5)
    written = open_checkpoint(tmp_path / "out")
    raw = {tensor.name: tensor.read().tobytes() for tensor in written.tensors if tensor.dtype == "F4"}
    assert raw == {"a.weight": b"\x11" * 6, "c.weight": b"\x22" * 4}
    assert verify(tmp_path / "out", source)["ok"]


def test_an_empty_tensor_of_a_torch_file_is_like_its_source(tmp_path: Path) -> None:
    torch.save({"a.weight": torch.ones(7, 13), "b.weight": torch.ones(3, 0)}, tmp_path / "m.pt")
    prune(tmp_path / "m.pt", tmp_path / "out", sparsity=0.5)
    assert verify(tmp_path / "out", tmp_path / "m.pt")["ok"]


def test_a_source_that_is_gone_when_all_is_written_is_refused(tiny: Path, tmp_path: Path) -> None:
    def say(text: str) -> None:
        if "100 % zero" in text:  # said when all is written
            (tiny / "model.safetensors").unlink()

    step = resolve(PruneStep, {"model": str(tiny), "out": tmp_path / "out", "sparsity": 1})
    with pytest.raises(LpsparseError, match=r"model\.safetensors"):
        prune_step(step, say)
    assert not list(tmp_path.glob("out*"))


# Which sidecars go along

LEFT = (  # what a training, a copy or another format leaves beside a model, and how it is named
    ("optimizer.pt", ""),
    ("model.safetensors.bak", ""),
    ("weights.tar.gz", ""),
    ("embeddings.npy", ""),
    (".env", ""),
    ("model.pdparams", ""),
    ("onnx/model.onnx_data", ""),
    ("output.log", ""),
    ("a.jsonl", ""),
    ("wandb/run-1/files/config.yaml", "wandb/"),
    ("runs/Mar01/events.out.tfevents.1", "runs/"),
    ("checkpoint-500/trainer_state.json", "checkpoint-500/"),
    ("checkpoints-7/a/b.json", "checkpoints-7/"),
    ("model_fsdp_0/.metadata", "model_fsdp_0/"),
    ("sub/__pycache__/a.py", "sub/__pycache__/"),
    ("last-checkpoint/trainer_state.json", "last-checkpoint/"),  # transformers#13503
    ("training_state/scheduler_state.json", "training_state/"),  # lerobot#4546
)
ALONG = (
    "tokenizer.model",
    "spiece.spm",
    "chat_template.jinja",
    "modeling_own.py",
    "LICENSE",
    "USE_POLICY.md",
    "assets/plot.png",
    "1_Pooling/config.json",
    "tokenizer/vocab.txt",
    ".gitattributes",
)


def test_what_loaders_read_goes_along_and_the_rest_is_named_before_and_after(
    tiny: Path, tmp_path: Path, cli: Cli
) -> None:
    for name in (*ALONG, *(name for name, _ in LEFT)):
        (tiny / name).parent.mkdir(parents=True, exist_ok=True)
        (tiny / name).write_text("x")
    names = ", ".join(sorted(called or name for name, called in LEFT))
    for command in (("prune", "--sparsity", "0.5"), ("pack",)):
        told = cli(*command, tiny, tmp_path / command[0], "--dry-run").stderr
        assert set(told.partition("would be left behind: ")[2].splitlines()[0].split(", ")) == set(
            names.split(", ")
        )
        assert not (tmp_path / command[0]).exists()
    assert cli("prune", tiny, tmp_path / "out", "--sparsity", "0.5").rc == 0
    there = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*")}
    assert there >= set(ALONG) and not there & {name for name, _ in LEFT}
    pushed = lpsparse.push(tmp_path / "out", "org/name", dry_run=True)
    assert {each["name"] for each in pushed["names"]} >= set(ALONG)


def test_the_links_of_a_snapshot_are_followed_into_its_own_blobs_alone(tmp_path: Path) -> None:
    repo = tmp_path / "models--org--name"
    snapshot, other = repo / "snapshots" / "0123", tmp_path / "models--org--other" / "blobs"
    for folder in (snapshot / "sub", repo / "blobs", other):
        folder.mkdir(parents=True)
    made = write_tiny(tmp_path / "tiny")
    for name in ("config.json", "model.safetensors", "README.md", "extra/vocab.txt"):
        blob = repo / "blobs" / name.replace("/", "-")
        blob.write_bytes((made / name).read_bytes())
        (snapshot / name).parent.mkdir(exist_ok=True)
        (snapshot / name).symlink_to(blob)
    (other / "secret").write_text("secret")
    (snapshot / "merges.txt").symlink_to(other / "secret")
    (snapshot / "vocab.json").symlink_to("models--org--name/blobs/vocab.json")  # huggingface_hub#1388
    said: list[str] = []
    prune_step(
        resolve(PruneStep, {"model": str(snapshot), "out": tmp_path / "out", "sparsity": 0.5}), said.append
    )
    assert any("vocab.json (no file)" in text and "left behind" in text for text in said)
    assert (tmp_path / "out" / "config.json").read_bytes() == (made / "config.json").read_bytes()
    assert (tmp_path / "out" / "extra" / "vocab.txt").is_file()
    assert not (tmp_path / "out" / "merges.txt").exists()
    (repo / "blobs").rename(tmp_path / "elsewhere")
    (repo / "blobs").symlink_to(tmp_path / "elsewhere")  # a folder that only looks like a cache
    prune(snapshot, tmp_path / "again", sparsity=0.5)
    assert not (tmp_path / "again" / "config.json").exists()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "bert"}, "transformers from_pretrained"),
        ({"_class_name": "UNet2DModel", "_diffusers_version": "0.36.0"}, "diffusers from_pretrained"),
        ({"architecture": "resnet18", "pretrained_cfg": {}}, "timm create_model"),
        ({}, ""),
        (None, ""),
    ],
)
def test_what_opens_a_folder_is_told_by_its_config(config: Any, words: str, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    write_safetensors(tmp_path / "m" / "model.safetensors", {"a.weight": f32(70, 130)})
    if config is not None:
        (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    found = prune(tmp_path / "m", tmp_path / "out", sparsity=0.5).opens_with
    assert found == "any safetensors reader" + (f"; {words}" if words else "")
    packed = pack(tmp_path / "out", tmp_path / "packed").opens_with
    assert ("after `import lpsparse`" in packed) == words.startswith("transformers")
