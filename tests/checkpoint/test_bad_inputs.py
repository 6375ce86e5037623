"""The table of bad inputs: each stops with its exit code in two lines, nothing is written, the input stays.

A row's number leads its name: 1-44 and 48-53 files, 62-64 settings, 65-67 outputs, 72 hub ids; 28-33, 50, 73
and 74 are no errors, and are carried. Rows of training and of recipes are tested where these are.
"""

import os
import pickle
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from support.cli import Ran, cli_environment, failed, run_cli
from support.files import (
    EMPTY_INDEX,
    GOOD,
    HOSTILE,
    Exploit,
    f32,
    rezipped,
    safetensors_bytes,
    save,
    tree_hash,
    with_header,
    write_index,
    write_tiny,
)

import lpsparse

Cli = Callable[..., Ran]
Make = Callable[[Path], object]  # writes an input into a folder; what it returns, if any, is MODEL
INDEX = {"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}


def file(data: bytes, name: str = "model.safetensors") -> Make:
    def make(folder: Path) -> None:
        (folder / name).write_bytes(data)

    return make


def index(table: Any) -> Make:
    return lambda folder: write_index(folder, table) and None


def shard(name: object) -> Make:
    return index({"weight_map": {"a": name, "b": "one.safetensors"}})


def torch_file(value: object) -> Make:
    return lambda folder: save(folder / "net.pt", value)


def sparse_index(folder: Path) -> None:
    """An index of 100 MB, which takes no room."""
    with (folder / EMPTY_INDEX).open("wb") as out:
        out.truncate(100_000_001)


def a_socket(folder: Path) -> None:
    here = Path.cwd()
    os.chdir(folder)  # a socket's address is short
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("model.safetensors")
    os.chdir(here)


def two_checkpoints(folder: Path) -> None:
    write_index(folder, INDEX)
    (folder / "model.safetensors").write_bytes(GOOD)


def in_two_shards(folder: Path) -> None:
    write_index(
        folder, {"weight_map": {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}}
    )
    (folder / "two.safetensors").write_bytes(safetensors_bytes({"c": f32(7), "a": f32(7, 13)}))


def zip_bomb(folder: Path) -> Path:
    path = save(folder / "net.pt", {"a": torch.zeros(300, 1000)})
    return rezipped(path, folder / "bomb.pt", 8)


TENSOR = '"{}": {{"dtype": "{}", "shape": [{}], "data_offsets": [0, 4]}}'
TWICE = "{" + TENSOR.format("a", "U8", 4) + ", " + TENSOR.format("a", "F32", 1) + "}"
INPUTS: dict[str, tuple[Make, list[str]]] = {
    "1 no such path": (lambda folder: folder.with_name("inn"), ["LPS327", "/in?"]),
    "2 empty folder": (lambda folder: None, ["LPS329", "model.safetensors"]),
    "3 zero bytes": (file(b""), ["LPS301", "0 bytes"]),
    "4 seven bytes": (file(bytes(7)), ["LPS301", "7 bytes"]),
    "9 safetensors under a torch name": (file(GOOD, "net.pt"), ["LPS323", "net.pt: "]),
    "17 duplicate name, another dtype": (file(with_header(TWICE, bytes(4))), ["LPS308", "'a', at 1 and 2"]),
    "34 a folder": (lambda folder: (folder / "model.safetensors").mkdir(), ["LPS306"]),
    "34 a folder under a torch name": (lambda folder: (folder / "net.pt").mkdir(), ["LPS306"]),
    "35 fifo": (lambda folder: os.mkfifo(folder / "model.safetensors"), ["LPS306"]),
    "35 fifo under a torch name": (lambda folder: os.mkfifo(folder / "net.pt"), ["LPS306"]),
    "35 fifo for an index": (lambda folder: os.mkfifo(folder / EMPTY_INDEX), ["LPS306"]),
    "35 socket": (a_socket, ["LPS306"]),
    "35 device": (lambda folder: (folder / "net.pt").symlink_to("/dev/zero"), ["LPS306"]),
    "36 dangling link": (
        lambda folder: (folder / "model.safetensors").symlink_to("../blobs/7"),
        ["LPS305", "a link to ../blobs/7"],
    ),
    "36 link loop": (
        lambda folder: (folder / "model.safetensors").symlink_to("model.safetensors"),
        ["LPS305"],
    ),
    "36 link loop for MODEL": (lambda folder: (folder / "m").symlink_to("m") or folder / "m", ["LPS305"]),
    "38 index out of the folder": (shard("../one.safetensors"), ["LPS330", "outside"]),
    "39 absolute": (shard("/etc/passwd"), ["LPS330", "outside"]),
    "39 drive": (shard("C:\\one.safetensors"), ["LPS330", "outside"]),
    "39 UNC": (shard("\\\\host\\one.safetensors"), ["LPS330", "outside"]),
    "39 backslashes": (shard("a\\..\\b"), ["LPS330", "outside"]),
    "40 missing shard": (shard("two.safetensors"), ["LPS330", "'two.safetensors'", "1 tensors"]),
    "40 shard of too long a name": (shard("x" * 300), ["LPS330", "1 tensors"]),
    "41 in the index only": (
        index({"weight_map": dict.fromkeys("abcd", "one.safetensors")}),
        ["LPS332", "2 tensors", ": c, d"],
    ),
    "41 in the shard only": (index({"weight_map": {"a": "one.safetensors"}}), ["LPS332", "1 tensors", ": b"]),
    "42 no weight_map": (index({"metadata": {}}), ["LPS330", "weight_map"]),
    "42 not JSON": (index(b"{"), ["LPS330", "JSON"]),
    "42 too large": (sparse_index, ["LPS330", "larger than 100000000 bytes"]),
    "43 two checkpoints": (two_checkpoints, ["LPS328", "model.safetensors", "--weights"]),
    "44 in two shards": (in_two_shards, ["LPS332", "1 tensors", "two.safetensors", ": a"]),
    "51 exploit": (
        lambda folder: save(folder / "net.pt", {"a": torch.ones(7), "b": Exploit(folder / "canary")}),
        ["LPS322"],
    ),
    "51 bare exploit": (
        lambda folder: (folder / "net.pt").write_bytes(pickle.dumps(Exploit(folder / "canary"))) and None,
        ["LPS322"],
    ),
    "51 whole module": (torch_file(torch.nn.Linear(7, 13)), ["LPS322"]),
    "52 stride 0": (
        torch_file({"a": torch.ones(1).expand(10**5, 10**5)}),
        ["LPS325", "10000000000 elements"],
    ),
    "52 zip ratio": (zip_bomb, ["LPS321", "unpack to 1200"]),
    "53 empty torch file": (file(b"", "net.pt"), ["LPS301", "0 bytes"]),
}
HEADERS = {
    "5": "header of 2**63",
    "6": "header past the end",
    "7": "git lfs pointer",
    "8": "html page",
    "9": "gguf, onnx, zip, pickle, framed pickle",
    "10": "truncated tail",
    "11": "trailing junk",
    "12": "not utf-8",
    "13": "json list, cut json",
    "14": "nested 5,000 deep",
    "16": "duplicate name",
    "18": "duplicate metadata, metadata not strings",
    "19": "overlap, the same range twice",
    "20": "hole between, hole at the start",
    "21": "reversed offsets, negative offset",
    "22": "shape and bytes differ",
    "23": "64 bit overflow",
    "24": "float dimension, negative dimension",
    "25": "unknown dtype",
    "27": "f4 not ending on a byte",
}
INPUTS |= {
    f"{row} {name}": (file(HOSTILE[name][0]), HOSTILE[name][1])
    for row, names in HEADERS.items()
    for name in (names.split(", ") if names not in HOSTILE else [names])
}


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that lpsparse wrote."""
    folder = tmp_path_factory.mktemp("made")
    lpsparse.prune(write_tiny(folder / "tiny"), folder / "out", sparsity=0.5)
    return folder / "out"


def arguments(command: str, model: object, out: Path, made: Path) -> list[object]:
    return {
        "prune": ["prune", model, out, "--sparsity", "0.5"],
        "pack": ["pack", model, out],
        "report": ["report", model],
        "verify": ["verify", made, model],
        "inspect": ["inspect", model],
    }[command]


@pytest.mark.parametrize(("make", "words"), INPUTS.values(), ids=INPUTS.keys())
def test_a_bad_input_is_refused_and_stays(
    make: Make, words: list[str], made: Path, tmp_path: Path, cli: Cli
) -> None:
    (tmp_path / "in").mkdir()
    model = make(tmp_path / "in")
    model = model if isinstance(model, Path) else tmp_path / "in"
    before = tree_hash(tmp_path)
    for command in ("prune", "pack", "report", "verify", "inspect"):
        started = time.perf_counter()
        said = failed(cli(*arguments(command, model, tmp_path / "out", made)), 3)
        assert time.perf_counter() - started < 5
        assert [word for word in words if word not in said] == []
        assert "weights_only" not in said
    assert tree_hash(tmp_path) == before


def test_15_a_header_of_51_megabytes_is_refused_before_it_is_parsed(tmp_path: Path, cli: Cli) -> None:
    empty = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    text = "{" + ",".join(f'"layers.{n}.weight":{empty}' for n in range(700_000)) + "}"
    (tmp_path / "m.safetensors").write_bytes(with_header(text))
    started = time.perf_counter()
    said = failed(cli("prune", tmp_path / "m.safetensors", tmp_path / "out", "--sparsity", "0.5"), 3)
    assert "700000 tensors, the cap is 500000" in said and time.perf_counter() - started < 2
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize("case", ["28 no tensors", "48 nan", "48 inf"])
def test_what_cannot_be_cut_can_be_reported(case: str, tmp_path: Path, cli: Cli) -> None:
    values = np.ones((7, 13), np.float32) * {"nan": np.nan, "inf": np.inf}.get(case[3:], 1)
    tensors = {} if "28" in case else {"a.weight": ("F32", [7, 13], values.tobytes())}
    model, words = tmp_path / "m.safetensors", "holds no tensors" if "28" in case else "a.weight"
    model.write_bytes(safetensors_bytes(tensors))
    for command in ("prune", "pack")[: 2 if "28" in case else 1]:  # NaN is packed as it is
        assert words in failed(cli(*arguments(command, model, tmp_path / "out", model)), 3)
    for command in ("report", "inspect"):
        ran = cli(command, model)
        assert ran.rc == 0 and words in ran.stdout + ran.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


CARRIED: dict[str, dict[str, Any]] = {
    "26 sub-byte and float8": {"four": ("F4", [2, 8], bytes(range(8))), "e": ("F8_E8M0", [4], b"\1\2\3\4")},
    "29 empty and of no dimensions": {"none": ("F32", [0, 7], b""), "one": ("F32", [], b"\0\0\x80?")},
    "30 a tag": {"<script>alert(1)</script>": f32(7)},
    "31 escapes": {"\x1b[31m\n\0\u202e": f32(7)},
    "32 a path": {"../../x": f32(7), "/etc/passwd": f32(7)},
    "33 a formula": {"=cmd|' /C calc'!A0": f32(7)},
}


@pytest.mark.parametrize("tensors", CARRIED.values(), ids=CARRIED.keys())
def test_what_is_odd_but_right_is_carried_untouched(
    tensors: dict[str, Any], tmp_path: Path, cli: Cli
) -> None:
    (tmp_path / "m.safetensors").write_bytes(safetensors_bytes(tensors | {"a.weight": f32(7, 13)}))
    for command, model, out in (("prune", "m.safetensors", "a"), ("pack", "a", "b"), ("unpack", "b", "c")):
        flags = ["--sparsity", "0.5"] if command == "prune" else []
        ran = cli(command, tmp_path / model, tmp_path / out, *flags)
        assert ran.rc == 0 and not any(c in ran.stdout + ran.stderr for c in "\x1b\0\u202e")
    found = {each.name: each.read().tobytes() for each in lpsparse.open(tmp_path / "c").tensors}
    assert {name: found[name] for name in tensors} == {name: raw for name, (_, _, raw) in tensors.items()}
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "c", "m.safetensors"]
    assert all("<script>" not in (tmp_path / out / "README.md").read_text() for out in "abc")


def test_49_a_tensor_that_is_cut_to_nothing_is_told(tiny: Path, tmp_path: Path, cli: Cli) -> None:
    ran = cli("prune", tiny, tmp_path / "out", "--sparsity", "1")
    assert (
        ran.rc == 1 and "100 % zero" in ran.stderr and "(4 tensors). Keep them with `--exclude`" in ran.stderr
    )


def test_50_an_honest_torch_file_is_read_by_the_restricted_loader(tmp_path: Path, cli: Cli) -> None:
    path = save(tmp_path / "net.bin", {"a.weight": torch.ones(7, 13)})
    assert cli("prune", path, tmp_path / "out", "--sparsity", "0.5").rc == 0
    assert np.count_nonzero(load_file(tmp_path / "out" / "model.safetensors")["a.weight"]) == 46


# Who may not

CLOSED = {"a closed sidecar": "config.json", "a closed folder in it": "extra", "closed itself": ""}


@pytest.fixture
def nobody() -> Iterator[Path]:
    """A folder that a user without rights may enter, with a model, and this process as that user."""
    with tempfile.TemporaryDirectory() as name:
        folder, own = Path(name), os.geteuid()
        folder.chmod(0o755)
        for name in ("tiny", *CLOSED):
            (write_tiny(folder / name) / "model.safetensors").chmod(0o644)
        for name, part in CLOSED.items():
            (folder / name / part).chmod(0)
        for kind in ("safetensors", "pt"):
            (folder / f"model.{kind}").write_bytes(GOOD)
            (folder / f"model.{kind}").chmod(0)
        os.setresuid(own or 65534, own or 65534, own)
        try:
            yield folder
        finally:
            os.setresuid(own, own, own)


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_37_a_file_without_read_permission_is_refused(name: str, nobody: Path, cli: Cli) -> None:
    for command in ("inspect", "report"):
        assert "Permission denied" in failed(cli(command, nobody / name), 3)
    assert "Permission denied" in failed(cli("pack", nobody / name, nobody / "out"), 3)


@pytest.mark.parametrize("name", CLOSED)
def test_37_a_model_of_which_a_part_cannot_be_read_is_refused_before_anything_is_written(
    name: str, nobody: Path, cli: Cli
) -> None:
    with tempfile.TemporaryDirectory() as place:
        for command in ("prune", "pack"):
            said = failed(cli(*arguments(command, nobody / name, Path(place) / "out", nobody)), 3)
            assert "error[LPS305]" in said
            assert os.listdir(place) == []


def test_67_a_parent_that_is_read_only_is_refused(nobody: Path, cli: Cli) -> None:
    if os.geteuid() == os.stat(nobody).st_uid:
        nobody.chmod(0o555)
    before = os.listdir(nobody)
    for command in ("prune", "pack"):
        said = failed(cli(*arguments(command, nobody / "tiny", nobody / "out", nobody)), 4)
        assert "no permission to write here" in said
    assert os.listdir(nobody) == before


# Settings


FLAGS: dict[str, tuple[tuple[str, ...], list[str]]] = {
    "62 above 1": (("--sparsity", "1.5"), ["--sparsity", "1.5", "less than or equal to 1", "0..1"]),
    "62 below 0": (("--sparsity", "-0.1"), ["--sparsity", "-0.1", "0..1"]),
    "62 per cent": (("--sparsity", "150%"), ["--sparsity", "fractions are 0..1"]),
    "62 nan": (("--sparsity", "nan"), ["--sparsity", "nan"]),
    "62 inf": (("--sparsity", "inf"), ["--sparsity", "inf"]),
    "62 empty": (("--sparsity", ""), ["--sparsity"]),
    "62 negative threshold": (("--below", "-1"), ["--below", "-1"]),
    "62 nan threshold": (("--below", "nan"), ["--below", "nan"]),
    "62 inf threshold": (("--below", "inf"), ["--below", "inf"]),
    "62 no number": (("--below", "small"), ["--below", "small"]),
    "62 n-m 4:2": (("--n-m", "4:2"), ["--n-m 4:2", "0 < N < M"]),
    "62 n-m half": (("--n-m", "0.5"), ["--n-m 0.5", "2:4"]),
    "62 block": (("--sparsity", "0.5", "--block", "0x4"), ["--block 0x4", "16x16"]),
    "62 threads": (("--sparsity", "0.5", "--threads", "0"), ["--threads", "0"]),
    "62 scope": (("--sparsity", "0.5", "--scope", "layer"), ["--scope", "'layer'", "'tensor'"]),
    "62 layout": (("--sparsity", "0.5", "--layout", "zip"), ["--layout", "'zip'", "'bitmask'"]),
    "62 no value": (("--sparsity",), ["--sparsity"]),
    "62 one word too many": (("--sparsity", "0.5", "surplus"), ["surplus"]),
    "63 two rules": (("--sparsity", "0.5", "--below", "1"), ["--sparsity, --below"]),
    "63 a gap, too": (("--sparsity", "0.5", "--gap"), ["--sparsity, --gap"]),
    "63 no rule": ((), ["--sparsity, --below, --gap", "got none"]),
    "63 scope of a threshold": (("--below", "1", "--scope", "row"), ["--scope", "--sparsity"]),
    "63 n-m that does not divide": (("--n-m", "2:4"), ["--n-m", "layers.0.attn.weight", "13"]),
    "63 block that does not divide": (("--sparsity", "0.5", "--block", "2x2"), ["--block", "2 x 2"]),
    "64 pattern": (
        ("--sparsity", "0.5", "--include", "layers.0.atn.weight"),
        ["nearest tensor: layers.0.attn.weight"],
    ),
    "43 weights by path": (("--sparsity", "0.5", "--weights", "../x"), ["--weights ../x", "not a path"]),
}


@pytest.mark.parametrize(("flags", "words"), FLAGS.values(), ids=FLAGS.keys())
def test_a_wrong_setting_is_named_with_what_is_allowed(
    flags: tuple[str, ...], words: list[str], tiny: Path, cli: Cli
) -> None:
    before = tree_hash(tiny.parent)
    said = failed(cli("prune", tiny, tiny.parent / "out", *flags), 2)
    assert [word for word in words if word not in said] == []
    assert tree_hash(tiny.parent) == before


@pytest.mark.parametrize(
    "flags", ["--p 0", "--p nan", "--lr -1", "--lr nan", "--target-sparsity 1.5", "--p x"]
)
def test_62_a_wrong_setting_of_a_run_is_refused_before_it_begins(flags: str, tiny: Path, cli: Cli) -> None:
    flag, value = flags.split()
    words = ["finetune", tiny, tiny.parent / "out", "--data", "bundled:shakespeare", "--task", "causal-lm"]
    said = failed(cli(*words, flag, value), 2)
    assert flag in said and value in said and os.listdir(tiny.parent) == ["tiny"]


# Outputs


def out_link(folder: Path, link: str = "gone") -> Path:
    (folder / "link").symlink_to(folder / link)
    return folder / "link"


def filled(folder: Path) -> Path:
    (folder / "full").mkdir()
    (folder / "full" / "notes.txt").write_text("mine")
    return folder / "full"


def in_artefact(folder: Path) -> Path:
    lpsparse.prune(folder / "tiny", folder / "made", sparsity=0.5)
    return folder / "made" / "extra" / "out"


OUTPUTS: dict[str, tuple[Callable[[Path], Path], list[str]]] = {
    "65 the input": (lambda folder: folder / "tiny", ["exists already"]),
    "65 inside the input": (lambda folder: folder / "tiny" / "out", ["inside the input"]),
    "65 inside by another way": (
        lambda folder: folder / "tiny" / ".." / "tiny" / "out",
        ["inside the input"],
    ),
    "65 a link to nothing": (out_link, ["exists already"]),
    "65 a link to the input": (lambda folder: out_link(folder, "tiny"), ["exists already"]),
    "65 a link into the input": (lambda folder: out_link(folder, "tiny") / "out", ["inside the input"]),
    "65 inside what lpsparse wrote": (in_artefact, ["lies inside made"]),
    "66 a folder with files": (filled, ["exists already", "choose another OUT\n"]),
    "66 a file": (lambda folder: folder / "tiny" / "config.json", ["exists already"]),
    "67 no parent": (lambda folder: folder / "gone" / "out", ["no such folder", "mkdir -p"]),
    "67 a parent that is a file": (lambda folder: folder / "tiny" / "config.json" / "out", []),
    "67 a name too long": (lambda folder: folder / ("o" * 300), ["too long"]),
}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("command", ["prune", "pack", "unpack"])
@pytest.mark.parametrize(("make", "words"), OUTPUTS.values(), ids=OUTPUTS.keys())
def test_an_output_that_cannot_be_is_refused(
    make: Callable[[Path], Path], words: list[str], command: str, overwrite: bool, tiny: Path, cli: Cli
) -> None:
    out = make(tiny.parent)
    before = tree_hash(tiny.parent)
    flags = ["--sparsity", "0.5"] * (command == "prune") + ["--overwrite"] * overwrite
    said = failed(cli(command, tiny, out, *flags), 4)
    assert overwrite or [word for word in words if word not in said] == []
    assert tree_hash(tiny.parent) == before


# Hub ids


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does to who asks for what is gated, not there, or of another revision."""

    def do_GET(self) -> None:
        code = next(code for name, code in HUB.items() if name in self.path or name == "gone")
        self.send_response(403 if code == "GatedRepo" else 404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        pass


HUB = {"gated": "GatedRepo", "misspelt": "RepoNotFound", "gone": "RevisionNotFound"}


@pytest.mark.parametrize("name", ["nobody listens", *HUB])
def test_72_a_hub_id_that_gives_nothing_exits_8(name: str, tmp_path: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = 9 if name not in HUB else server.server_address[1]
        started = time.perf_counter()
        ran = run_cli(
            ["prune", f"org/{name.split()[0]}@main", "out", "--sparsity", "0.5"],
            cwd=tmp_path,
            HF_HOME=str(tmp_path / "hf"),
            HF_HUB_OFFLINE=None,
            HF_ENDPOINT=f"http://127.0.0.1:{port}",
        )
        server.shutdown()
    assert f"org/{name.split()[0]}" in failed(ran, 8) and time.perf_counter() - started < 15
    assert not list(tmp_path.glob("out*"))


# Paths and places


PATHS = ["größe 模型 \U0001f600", "a b  c", "con", "a'b\"c;$(x)&", "-x", "x" * 200]


@pytest.mark.parametrize("name", PATHS, ids=lambda name: f"73 {name[:9]}")
def test_a_path_of_any_letters_works(name: str, tmp_path: Path, cli: Cli) -> None:
    model = write_tiny(tmp_path / name / name)
    assert cli("prune", model, tmp_path / name / "out", "--sparsity", "0.5").rc == 0
    assert cli("verify", tmp_path / name / "out", model).rc == 0
    assert len(str(model)) > 300 or len(name) < 200


def test_74_neither_home_nor_terminal_nor_width_is_needed(tiny: Path) -> None:
    env = {"HOME": None, "LC_ALL": "C", "TERM": "dumb", "COLUMNS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "lpsparse", "prune", tiny, tiny.parent / "out", "--sparsity", "0.5"],
        env=cli_environment(**env),
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        capture_output=True,
    )
    assert done.returncode == 0 and b"\x1b" not in done.stdout + done.stderr
    assert lpsparse.verify(tiny.parent / "out")["ok"]


@pytest.mark.parametrize("command", ["prune", "pack"])
def test_65_an_output_in_the_hub_cache_is_refused(
    command: str, tiny: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, cache in (("HF_HOME", tmp_path / "hf"), ("HF_HUB_CACHE", tmp_path / "hf" / "hub")):
        (tmp_path / "hf" / "hub").mkdir(parents=True, exist_ok=True)
        with monkeypatch.context() as names:
            names.setenv(name, str(cache))
            failed(cli(*arguments(command, tiny, tmp_path / "hf" / "hub" / "out", tiny)), 4)
        assert os.listdir(tmp_path / "hf" / "hub") == []


@pytest.mark.parametrize(
    "words", [("verify", ""), ("report", ""), ("prune", "", "out", "--sparsity", "0.5"), ("report", ".", "")]
)
def test_an_empty_name_is_not_the_current_folder(
    words: tuple[str, ...], tiny: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny)
    before = tree_hash(tiny)
    said = failed(cli(*words), 3 if len(words) == 3 else 2)  # BASE may be anything that is there
    assert "empty" in said or "at least 1 character" in said
    assert tree_hash(tiny) == before


def test_the_next_command_is_one_even_for_an_out_like_a_flag(
    tiny: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny.parent)
    said = cli("prune", "--sparsity", "0.5", "--", tiny.name, "-out").stderr
    command = re.findall("next: lpsparse (.*)", said)[0]
    assert command == f"report -- -out {tiny.name}" and cli(*command.split()).rc == 0
