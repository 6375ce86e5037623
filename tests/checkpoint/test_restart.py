"""What a run that was stopped leaves behind, and what the next one makes of it; how OUT is exchanged."""

import ctypes
import errno
import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
from support.files import SHARDS, again, refuses, tree_hash

from lpsparse import pack, prune, verify
from lpsparse.checkpoint.files import OWNER, REPLACED
from lpsparse.checkpoint.transaction import output_folder
from lpsparse.errors import TerminatedError


@pytest.fixture
def killed(shards: Path, tmp_path: Path) -> tuple[Path, Path, dict[str, str]]:
    """A model of three shards, the OUT.partial of a run that was killed with the weights written, and the
    hashes of the result of one that was not."""
    prune(shards, tmp_path / "whole", sparsity=0.5)
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / OWNER).write_text(json.dumps({"pid": -1, "host": socket.gethostname()}))
    for name in SHARDS:
        shutil.copyfile(tmp_path / "whole" / name, partial / name)
        os.utime(partial / name, ns=(1, 1))
    return shards, partial, tree_hash(tmp_path / "whole")


def untouched(out: Path) -> list[str]:
    return [name for name in SHARDS if (out / name).stat().st_mtime_ns == 1]


def test_the_shards_of_a_killed_run_are_used(killed: tuple[Path, Path, Any], tmp_path: Path) -> None:
    shards, _, whole = killed
    assert "3 of 3 weight files were complete already" in again(shards, tmp_path / "out")
    assert tree_hash(tmp_path / "out") == whole
    assert untouched(tmp_path / "out") == SHARDS
    assert sorted(os.listdir(tmp_path)) == ["out", "shards", "whole"]


@pytest.mark.parametrize("damage", ["cut", "longer", "zeroed", "flipped", "empty", "folder", "header"])
def test_a_shard_that_is_not_whole_is_written_again(
    damage: str, killed: tuple[Path, Path, Any], tmp_path: Path
) -> None:
    shards, partial, whole = killed
    torn = partial / SHARDS[1]
    data = bytearray(torn.read_bytes())
    if damage == "folder":
        torn.unlink()
        torn.mkdir()
    else:
        changed = {
            "cut": data[:-200],
            "longer": data + b"more",
            "zeroed": data[:-200] + bytes(200),
            "empty": b"",
            "flipped": data[:-50] + bytes([data[-50] ^ 1]) + data[-49:],
            "header": b"\xff" * 16 + data[16:],
        }
        torn.write_bytes(changed[damage])
    assert "2 of 3" in again(shards, tmp_path / "out")
    assert tree_hash(tmp_path / "out") == whole and verify(tmp_path / "out", shards)["ok"]


def test_what_other_settings_left_is_replaced_and_deleted(
    killed: tuple[Path, Path, Any], tmp_path: Path
) -> None:
    shards, partial, whole = killed
    prune(shards, tmp_path / "other", sparsity=0.9)
    for name in SHARDS:
        shutil.copyfile(tmp_path / "other" / name, partial / name)
    (partial / "model-00004-of-00004.safetensors").write_bytes(b"of a model with more shards")
    (partial / "config.json").write_text("{}")
    again(shards, tmp_path / "out")
    assert tree_hash(tmp_path / "out") == whole


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_nothing_is_written_through_a_link_in_what_was_left(
    link: Any, killed: tuple[Path, Path, Any], tmp_path: Path
) -> None:
    shards, partial, whole = killed
    (tmp_path / "mine").write_bytes(b"mine")
    (partial / SHARDS[0]).unlink()
    link(tmp_path / "mine", partial / SHARDS[0])
    again(shards, tmp_path / "out")
    assert (tmp_path / "mine").read_bytes() == b"mine" and tree_hash(tmp_path / "out") == whole


def test_packed_shards_of_a_killed_run_are_used_too(shards: Path, tmp_path: Path) -> None:
    prune(shards, tmp_path / "sparse", sparsity=0.9)
    pack(tmp_path / "sparse", tmp_path / "whole", layout="bitmask")
    shutil.copytree(tmp_path / "whole", tmp_path / "out.partial")
    (tmp_path / "out.partial" / OWNER).write_text(json.dumps({"pid": -1, "host": socket.gethostname()}))
    (kept,) = (tmp_path / "out.partial").glob("*-00002-of-*.safetensors")
    os.utime(kept, ns=(1, 1))
    pack(tmp_path / "sparse", tmp_path / "out", layout="bitmask")
    assert tree_hash(tmp_path / "out") == tree_hash(tmp_path / "whole")
    assert (tmp_path / "out" / kept.name).stat().st_mtime_ns == 1


@pytest.mark.parametrize(("asked", "left"), [(TerminatedError, True), (KeyboardInterrupt, False)])
def test_weights_stay_when_a_run_is_terminated_and_go_at_ctrl_c(
    asked: type[BaseException], left: bool, tmp_path: Path
) -> None:
    def write() -> None:
        with output_folder(tmp_path / "out", weights="keep") as folder:
            (folder / SHARDS[0]).write_bytes(b"half")
            raise asked

    with pytest.raises(asked):
        write()
    assert (tmp_path / "out.partial" / SHARDS[0]).exists() == left
    with output_folder(tmp_path / "out", weights="keep") as folder:  # nobody holds it
        assert (folder / SHARDS[0]).exists() == left


# Exchanges


@pytest.mark.parametrize("can_exchange", [True, False])
def test_an_exchange_leaves_the_new_result_alone(
    can_exchange: bool, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prune(tiny, tmp_path / "fresh", sparsity=0.7)
    prune(tiny, tmp_path / "out", sparsity=0.5)
    if not can_exchange:
        monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())  # a C library without renameat2
    prune(tiny, tmp_path / "out", sparsity=0.7, overwrite=True)
    assert tree_hash(tmp_path / "out") == tree_hash(tmp_path / "fresh")
    assert sorted(os.listdir(tmp_path)) == ["fresh", "out", "tiny"]


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_run_that_died_after_the_exchange_has_left_a_whole_result(
    overwrite: bool, tiny: Path, tmp_path: Path
) -> None:
    prune(tiny, tmp_path / "out", sparsity=0.7)
    prune(tiny, tmp_path / "out.partial", sparsity=0.5)  # the old one, under the name that the new one had
    (tmp_path / "out.partial" / REPLACED).touch()
    (tmp_path / "out" / OWNER).write_text(json.dumps({"pid": -1, "host": socket.gethostname()}))
    assert verify(tmp_path / "out")["ok"]
    if overwrite:
        prune(tiny, tmp_path / "out", sparsity=0.7, overwrite=True)
        assert sorted(os.listdir(tmp_path)) == ["out", "tiny"]
    else:
        with refuses("LPS401"):
            prune(tiny, tmp_path / "out", sparsity=0.7)
    assert verify(tmp_path / "out")["ok"]


@pytest.mark.parametrize(
    "left", [[REPLACED], [REPLACED, OWNER], [REPLACED, OWNER, "model.safetensors", "notes.txt"]]
)
def test_what_a_deletion_of_the_old_result_left_is_taken_over(
    left: list[str], tiny: Path, tmp_path: Path
) -> None:
    prune(tiny, tmp_path / "fresh", sparsity=0.5)
    (tmp_path / "out.partial").mkdir()
    for name in left:
        (tmp_path / "out.partial" / name).touch()
    for overwrite in (False, True):  # over a mark that had stayed it would not be told from an old one
        prune(tiny, tmp_path / "out", sparsity=0.5, overwrite=overwrite)
        assert tree_hash(tmp_path / "out") == tree_hash(tmp_path / "fresh")
        assert sorted(os.listdir(tmp_path)) == ["fresh", "out", "tiny"]


def test_a_disk_that_cannot_rename_folders_is_refused_before_the_first_weight(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.rename

    def of_files_only(a: str | Path, b: str | Path) -> None:
        if os.path.isdir(a):
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        rename(a, b)

    monkeypatch.setattr(os, "rename", of_files_only)
    with refuses("LPS410") as refused:
        prune(tiny, tmp_path / "out", sparsity=0.5)
    assert refused.value.code == "LPS410" and os.listdir(tmp_path) == ["tiny"]


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"])
def test_an_out_in_the_hubs_cache_is_refused(
    variable: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(tmp_path / "cache"))
    below = {"HF_HUB_CACHE": ".", "HF_HOME": "hub", "XDG_CACHE_HOME": "huggingface/hub"}[variable]
    snapshot = tmp_path / "cache" / below / "models--a--b" / "snapshots"
    snapshot.mkdir(parents=True)
    with refuses("LPS405"):
        prune(tiny, snapshot / "out", sparsity=0.5)
    assert not list(snapshot.iterdir())
