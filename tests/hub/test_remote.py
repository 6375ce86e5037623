"""A dry run on a hub id that is not in the cache: what its headers tell, from a hub of our own."""

import json
import time
from collections.abc import Iterator
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from support.cli import run_cli
from support.files import (
    PRUNABLE,
    PRUNABLE_WEIGHTS,
    f32,
    safetensors_bytes,
    tiny_arrays,
    with_header,
    write_shards,
    write_tiny,
)
from support.hub import hub_at

from lpsparse import ExitCode, LpsparseError, prune
from lpsparse.checkpoint.hub import fetch, is_remote
from lpsparse.cli import main
from lpsparse.errors import RemoteError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
GIB = 1 << 30


class Hub:
    """Files by name, each as its first bytes and its size: zeros follow. `how` is the way it misbehaves."""

    def __init__(self) -> None:
        self.files: dict[str, tuple[bytes, int]] = {}
        self.how, self.sha, self.address = "", COMMIT, ""
        self.told: dict[str, int] = {}  # sizes that it lies about
        self.asked: list[tuple[str, int, int]] = []  # file, first byte, bytes asked for
        self.paths: list[str] = []
        self.sent = 0

    def put(self, name: str, data: bytes, size: int | None = None) -> None:
        self.files[name] = data, len(data) if size is None else size

    def put_folder(self, folder: Path) -> None:
        for path in folder.rglob("*"):
            if path.is_file():
                self.put(path.relative_to(folder).as_posix(), path.read_bytes())

    def listing(self) -> bytes:
        files = [{"rfilename": n, "size": self.told.get(n, size)} for n, (_, size) in self.files.items()]
        return json.dumps({"id": "org/name", "sha": self.sha, "siblings": files, "likes": 3}).encode()


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self) -> None:
        hub, path = self.hub, self.path
        hub.paths.append(path)
        if hub.how in ("401", "429", "503"):
            self.answer(int(hub.how), b"", {"X-Error-Message": "Access to org/name is restricted"})
        elif hub.how == "leaves":
            self.close_connection = True
        elif hub.how == "hangs":
            time.sleep(2)
        elif path == "/api/models/org/name/revision/main?blobs=true":
            self.answer(200, b"{" if hub.how == "half" else hub.listing())
        elif path.startswith(f"/org/name/resolve/{COMMIT}/"):  # as the hub: what is large lies elsewhere
            self.answer(302, b"", {"Location": f"/cdn/{path.rpartition('/')[2]}"})
        elif path.removeprefix("/cdn/") in hub.files:
            self.part(path.removeprefix("/cdn/"))
        else:
            self.answer(404, b"", {"X-Error-Message": "Entry not found"})

    def part(self, name: str) -> None:
        data, size = self.hub.files[name]
        first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        self.hub.asked.append((name, int(first), int(last) - int(first) + 1))
        if self.hub.how == "whole":
            return self.stream(data, size)
        asked = data[int(first) : int(last) + 1].ljust(min(size, int(last) + 1) - int(first), b"\0")
        if self.hub.how == "drips":
            return self.drip(asked)
        self.answer(206, asked[:5] if self.hub.how == "short" else asked)

    def answer(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(data)

    def stream(self, data: bytes, size: int) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(size))
        self.end_headers()
        self.wfile.write(data)
        while self.hub.sent < size:
            self.hub.sent += self.wfile.write(bytes(1 << 16))

    def drip(self, data: bytes) -> None:
        self.send_response(206)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        for byte in data:
            self.wfile.write(bytes([byte]))
            time.sleep(0.05)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub at an address of this machine, for this process; with an empty cache and a second of patience."""
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 1)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    with hub_at(type("OwnHandler", (Handler,), {"hub": hub}), tmp_path / "cache", monkeypatch) as hub.address:
        yield hub


def dry(tmp_path: Path, **options: Any) -> dict[str, Any]:
    rule = {} if {"below", "gap", "n_m"} & set(options) else {"sparsity": 0.5}
    found: Any = prune("org/name", tmp_path / "out", dry_run=True, **(rule | options))
    assert not (tmp_path / "out").exists() and not list((tmp_path / "cache").rglob("*.safetensors"))
    return found


def refused(tmp_path: Path, **options: Any) -> LpsparseError:
    began = time.monotonic()
    with pytest.raises(LpsparseError) as error:
        dry(tmp_path, **options)
    assert time.monotonic() - began < 12 and not (tmp_path / "out").exists()
    return error.value


# What is told


@pytest.mark.parametrize("write", [write_tiny, write_shards])
def test_headers_are_all_that_is_fetched_of_weight_files(write: Any, hub: Hub, tmp_path: Path) -> None:
    hub.put_folder(write(tmp_path / "model"))
    found = dry(tmp_path)
    assert (found["model"], found["revision"], found["from_headers_alone"]) == ("org/name", COMMIT, True)
    assert {tensor["name"] for tensor in found["tensors"]} == set(tiny_arrays())
    weights = {name: data for name, (data, _) in hub.files.items() if name.endswith(".safetensors")}
    headers = {name: 8 + int.from_bytes(data[:8], "little") for name, data in weights.items()}
    asked = {name: sum(count for each, _, count in hub.asked if each == name) for name in weights}
    assert asked == headers and "config.json" not in {name for name, _, _ in hub.asked}


def test_disk_memory_and_download_are_told_and_time_is_not(hub: Hub, tmp_path: Path) -> None:
    hub.put_folder(write_tiny(tmp_path / "model"))
    hub.put("flax_model.msgpack", b"", 10 * GIB)  # nobody fetches it
    found = dry(tmp_path)
    total = sum(size for name, (_, size) in hub.files.items() if name != "flax_model.msgpack")
    assert found["download_bytes"] == total
    real = prune(tmp_path / "model", tmp_path / "out", sparsity=0.5)
    written = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert real.estimate is None
    needs = found["estimate"]
    assert 0.5 < needs["disk_bytes"] / written < 2 and needs["free_bytes"] > 0 and needs["seconds"] is None
    assert 32 << 20 < needs["memory_bytes"] < 400 << 20


@pytest.mark.parametrize(
    ("rule", "some_each"),
    [
        ({"sparsity": 0.29}, False),
        ({"sparsity": 0.29, "scope": "tensor"}, True),
        ({"below": 0.1}, False),
        ({"sparsity": 0.29, "scope": "row"}, True),
        ({"n_m": "3:7", "include": "*.mlp.weight"}, True),
        ({"sparsity": 0.5, "block": "1x7", "include": "*.mlp.weight"}, False),
        ({"gap": True}, False),
        ({"sparsity": 0.5, "block": "13x1", "scope": "tensor", "include": "*.0.mlp.weight"}, True),
    ],
)
def test_zeros_are_those_of_the_run_where_shapes_tell_them_and_else_not_known(
    rule: dict[str, Any], some_each: bool, hub: Hub, tmp_path: Path
) -> None:
    model = write_tiny(tmp_path / "model")
    hub.put_folder(model)
    found = dry(tmp_path, **rule)
    each = {tensor["name"]: tensor["zeros_at_least"] for tensor in found["tensors"] if tensor["prunable"]}
    assert all((zeros is not None) == some_each for zeros in each.values())
    if "below" in rule or "gap" in rule:
        assert found["zeros_at_least"] is None
        return
    real = prune(model, tmp_path / "out", **rule)
    assert found["zeros_at_least"] == real.prunable.zeros
    assert not some_each or each == {row.name: row.zeros for row in real.tensors if row.prunable}


def test_a_shape_that_the_rule_does_not_divide_is_refused_from_the_header(hub: Hub, tmp_path: Path) -> None:
    hub.put_folder(write_tiny(tmp_path / "model"))
    assert refused(tmp_path, n_m="2:4").code == "LPS215"
    assert refused(tmp_path, include="nothing.like.it").code == "LPS210"


def test_the_command_shows_what_is_known_and_that_no_weights_were_read(
    hub: Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.put_folder(write_tiny(tmp_path / "model"))
    with pytest.raises(SystemExit) as left:
        main(["prune", "org/name", str(tmp_path / "out"), "--sparsity", "0.5", "--dry-run"])
    out, err = capfd.readouterr()
    assert not left.value.code and "from headers alone" in out and "no weights are fetched" in err
    assert f"{PRUNABLE_WEIGHTS // 2} or more of {PRUNABLE_WEIGHTS} prunable weights" in out and COMMIT in out
    row = next(line for line in out.splitlines() if line.startswith(PRUNABLE[0]))
    assert "not known" in row and row.endswith("prunable")
    assert "to download" in out and "of memory" in out


def test_a_process_of_its_own_honours_endpoint_and_offline(hub: Hub, tmp_path: Path) -> None:
    hub.put_folder(write_tiny(tmp_path / "model"))
    words = ["prune", "org/name", "out", "--gap", "--dry-run", "--json"]
    home = {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": hub.address}
    rc, stdout, stderr = run_cli(words, cwd=tmp_path, HF_HUB_OFFLINE="0", **home)
    assert (rc, json.loads(stdout)["zeros_at_least"]) == (
        0,
        None,
    ) and "--gap cuts depends on their values" in stderr
    hub.paths.clear()
    rc, stdout, stderr = run_cli(words, cwd=tmp_path, HF_HUB_OFFLINE="1", **home)
    assert (rc, stdout, hub.paths) == (ExitCode.REMOTE, "", []) and "offline" in stderr


def cached(tmp_path: Path) -> Path:
    """Where the cache of `hub` has the files of org/name, which has none yet."""
    repo = tmp_path / "cache/models--org--name"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs/main").write_text(COMMIT)
    (repo / "snapshots").mkdir()
    return repo / "snapshots" / COMMIT


def test_a_hub_id_in_the_cache_is_read_and_nobody_is_asked(hub: Hub, tmp_path: Path) -> None:
    write_tiny(cached(tmp_path))
    found = prune("org/name", tmp_path / "out", sparsity=0.5, dry_run=True)
    assert found.prunable.zeros == PRUNABLE_WEIGHTS // 2 and found.estimate is not None
    assert hub.paths == []


@pytest.mark.parametrize(
    ("index", "files", "whole"),
    [
        ("model.safetensors.index.json", ["1.safetensors", "2.safetensors"], True),
        ("model.safetensors.index.json", ["1.safetensors"], False),
        ("model.safetensors.index.json", ["1.safetensors", "training_args.bin"], False),
        ("model.safetensors.index.json", ["1.safetensors", "model.safetensors"], True),
        ("pytorch_model.bin.index.json", ["model.safetensors"], True),
        ("pytorch_model.bin.index.json", ["1.safetensors"], True),  # the one that would be opened
        ("config.json", ["a-00001-of-00002.safetensors"], False),
        ("config.json", [], False),
    ],
)
def test_a_cache_is_used_where_it_holds_what_would_be_opened_and_else_the_hub_is_asked(
    index: str, files: list[str], whole: bool, hub: Hub, tmp_path: Path
) -> None:
    folder = cached(tmp_path)
    folder.mkdir()
    (folder / index).write_text('{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}')
    for name in files:
        (folder / name).touch()
    hub.how = "503"
    assert is_remote("org/name") is not whole and not hub.paths
    with nullcontext() if whole else pytest.raises(RemoteError) as refused:
        assert fetch("org/name") == (folder, COMMIT)
    assert bool(hub.paths) is not whole and (whole or refused.value.code in ("LPS801", "LPS802"))


# What is not believed


def test_a_server_that_knows_no_parts_is_left_after_the_header(hub: Hub, tmp_path: Path) -> None:
    table = {"a.weight": {"dtype": "F32", "shape": [GIB // 4, 1], "data_offsets": [0, GIB]}}
    hub.put("model.safetensors", with_header(table), len(with_header(table)) + GIB)
    hub.how = "whole"
    assert dry(tmp_path)["zeros_at_least"] == GIB // 8
    time.sleep(0.3)
    assert hub.sent < GIB // 16  # what lay in buffers


@pytest.mark.parametrize("how", ["401", "429", "503", "leaves", "hangs", "drips", "short", "half"])
def test_a_hub_that_refuses_or_dawdles_exits_8_soon(
    how: str, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    hub.put_folder(write_tiny(tmp_path / "model"))
    hub.how = how
    error = refused(tmp_path)
    assert (error.exit_code, error.code) == (ExitCode.REMOTE, "LPS803")
    assert how != "401" or "is restricted" in error.what


def test_a_hub_that_ends_the_connection_fails_a_download_with_exit_8(hub: Hub, tmp_path: Path) -> None:
    hub.how = "leaves"
    with pytest.raises(LpsparseError) as error:
        prune("org/name", tmp_path / "out", sparsity=0.5)
    assert error.value.code == "LPS801"


def test_nobody_at_the_address_exits_8(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert refused(tmp_path).exit_code == ExitCode.REMOTE


@pytest.mark.parametrize("size", [-1, 2**70, 1.5, "9", None])
def test_a_list_of_files_with_odd_sizes_exits_8(size: Any, hub: Hub, tmp_path: Path) -> None:
    hub.put_folder(write_tiny(tmp_path / "model"))
    hub.told["model.safetensors"] = size
    assert refused(tmp_path).code == "LPS803"


def test_a_commit_that_is_none_exits_8(hub: Hub, tmp_path: Path) -> None:
    hub.put_folder(write_tiny(tmp_path / "model"))
    hub.sha = "../../" + COMMIT[6:]
    assert refused(tmp_path).code == "LPS803"


@pytest.mark.parametrize(
    ("data", "told", "code"),
    [
        (safetensors_bytes({"a.weight": f32(7, 13)}), 7, "LPS301"),
        (safetensors_bytes({"a.weight": f32(7, 13)}), 0, "LPS301"),
        (safetensors_bytes({"a.weight": f32(7, 13)}), 20, "LPS303"),
        (safetensors_bytes({"a.weight": f32(7, 13)}), 300, "LPS303"),
        (safetensors_bytes({"a.weight": f32(7, 13)}), 2**40, "LPS313"),
        ((2**63).to_bytes(8, "little") + bytes(600), None, "LPS302"),
        (with_header('{"a":{}}'), None, "LPS311"),
        (with_header("[" * 5000), None, "LPS308"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\n", None, "LPS307"),
        (safetensors_bytes({"a": f32(7)}, {"lpsparse.layout": "bitmask"}), None, "LPS346"),
        (safetensors_bytes({"a.compressed": f32(7), "a.bitmask": f32(7)}), None, "LPS346"),
    ],
)
def test_headers_from_the_network_meet_the_checks_of_files(
    data: bytes, told: int | None, code: str, hub: Hub, tmp_path: Path
) -> None:
    hub.put("model.safetensors", data)
    if told is not None:
        hub.told["model.safetensors"] = told
    error = refused(tmp_path)
    assert (error.exit_code, error.code) == (ExitCode.INPUT, code)
    assert error.what.startswith("org/name/model.safetensors: ") and "again" not in error.hint


@pytest.mark.parametrize("shard", ["../../x.safetensors", "/etc/passwd", "a\\b", "gone.safetensors", ""])
def test_an_index_that_points_elsewhere_exits_3(shard: str, hub: Hub, tmp_path: Path) -> None:
    hub.put("model.safetensors.index.json", json.dumps({"weight_map": {"a.weight": shard}}).encode())
    error = refused(tmp_path)
    assert (error.exit_code, error.code) == (ExitCode.INPUT, "LPS330")
    assert {name for name, _, _ in hub.asked} == {"model.safetensors.index.json"}


def test_an_index_that_names_other_tensors_than_its_shard_exits_3(hub: Hub, tmp_path: Path) -> None:
    hub.put("x.safetensors", safetensors_bytes({"a.weight": f32(7, 13)}))
    hub.put("model.safetensors.index.json", b'{"weight_map": {"b.weight": "x.safetensors"}}')
    assert refused(tmp_path).code == "LPS332"


@pytest.mark.parametrize(
    ("names", "code", "hint"),
    [
        (["pytorch_model.bin"], "LPS345", "hf download org/name"),
        (["README.md"], "LPS345", "hf download"),
        (["a.safetensors", "b.safetensors"], "LPS328", "--weights"),
        ([], "LPS345", "hf download"),
        (["model.safetensors", "model.safetensors.index.json"], "LPS328", "--weights"),
        (["a.safetensors", "b.bin"], "LPS328", "--weights"),
        (["pytorch_model.bin.index.json"], "LPS345", "hf download"),
    ],
)
def test_a_repository_without_one_safetensors_checkpoint_exits_3_and_says_what_to_do(
    names: list[str], code: str, hint: str, hub: Hub, tmp_path: Path
) -> None:
    for name in names:
        hub.put(name, b"x")
    error = refused(tmp_path)
    assert (error.exit_code, error.code) == (ExitCode.INPUT, code) and hint in error.hint
    assert hub.asked == []


def test_weights_name_the_one_that_is_meant(hub: Hub, tmp_path: Path) -> None:
    for name in ("a", "b"):
        hub.put(f"{name}.safetensors", safetensors_bytes({f"{name}.weight": f32(7, 13)}))
    hub.put("c.bin", b"x")
    assert [tensor["name"] for tensor in dry(tmp_path, weights="b.safetensors")["tensors"]] == ["b.weight"]
    refusals = {"d.safetensors": "LPS329", "c.bin": "LPS345", "../a.safetensors": "LPS216"}
    assert {name: refused(tmp_path, weights=name).code for name in refusals} == refusals


def test_a_quantised_checkpoint_is_refused_from_its_headers(hub: Hub, tmp_path: Path) -> None:
    scaled = {"a.weight": ("F8_E4M3", [7, 8], bytes(56)), "a.weight_scale": ("F32", [1], bytes(4))}
    hub.put("model.safetensors", safetensors_bytes(scaled))
    assert refused(tmp_path).code == "LPS337"
