"""A dry run of a checkpoint on this machine: what OUT would hold, and what writing it would take."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from support.cli import Ran, cli_environment
from support.files import PRUNABLE_WEIGHTS, write_shards, write_tiny

import lpsparse
from lpsparse import pack, prune, unpack

Cli = Callable[..., Ran]


@pytest.mark.parametrize("write", [write_tiny, write_shards])
@pytest.mark.parametrize("rule", [{"sparsity": 0.6}, {"below": 0.5, "layout": "bitmask"}])
def test_a_dry_run_reports_what_the_run_will(write: Any, rule: dict[str, Any], tmp_path: Path) -> None:
    model = write(tmp_path / "model")
    told = prune(model, tmp_path / "out", dry_run=True, **rule)
    real = prune(model, tmp_path / "out", **rule)
    assert told.estimate is not None and real.estimate is None
    assert told.tensors and set(told.tensors) == set(real.tensors)
    same = {"estimate": None, "tensors": real.tensors, "identity": real.identity}  # which needs hashes
    assert told.model_copy(update=same) == real
    assert json.loads((tmp_path / "out" / "report.json").read_text())["estimate"] is None


def test_a_dry_run_of_pack_and_unpack_reports_what_the_run_will(shards: Path, tmp_path: Path) -> None:
    prune(shards, tmp_path / "sparse", sparsity=0.9)
    for verb, model, out in ((pack, "sparse", "packed"), (unpack, "packed", "dense")):
        told = verb(tmp_path / model, tmp_path / out, dry_run=True)
        real = verb(tmp_path / model, tmp_path / out)
        assert told.estimate is not None and told.bytes == real.bytes and told.layout == real.layout


def test_a_dry_run_shows_tensors_and_what_the_run_would_take(tiny: Path, tmp_path: Path, cli: Cli) -> None:
    shown = cli("prune", tiny, tmp_path / "out", "--sparsity", "0.5", "--dry-run").stdout
    assert f"would be zero ({PRUNABLE_WEIGHTS // 2} of {PRUNABLE_WEIGHTS})" in shown
    assert "\nlayers.{0..1}.attn.weight  x2" in shown and "without that of the disk" in shown
    assert re.search(r"would take .* of disk \(.* free\), .* of memory; about .* s here", shown)


def test_the_disk_that_a_dry_run_tells_is_what_out_takes(tmp_path: Path) -> None:
    model, ones = tmp_path / "m.safetensors", np.ones((64, 512), np.float32)
    save_file({f"layers.{i}.weight": ones for i in range(20)}, model)
    needs = prune(model, tmp_path / "out", sparsity=0.5, dry_run=True).estimate
    prune(model, tmp_path / "out", sparsity=0.5, allow_empty=True)
    taken = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*"))
    assert needs is not None and needs.seconds is not None and 0 < needs.seconds < 60
    assert 0.99 < needs.disk_bytes / taken < 1.01


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is told by Linux")
@pytest.mark.parametrize("rule", [("--sparsity", "0.8"), ("--n-m", "2:4")])
def test_the_memory_that_a_dry_run_tells_is_the_run_s_within_a_factor_of_two(
    rule: tuple[str, str], tmp_path: Path, cli: Cli
) -> None:
    draw = np.random.default_rng(0).standard_normal((512, 8192), np.float32)
    for i in range(4):
        save_file({f"layers.{i}.weight": draw}, tmp_path / f"m-{i}.safetensors")
    index = {"weight_map": {f"layers.{i}.weight": f"m-{i}.safetensors" for i in range(4)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    words = ["prune", tmp_path, tmp_path.parent / f"out-{rule[0]}", *rule, "--threads", "2", "--json"]
    told = json.loads(cli(*words, "--dry-run").stdout)["estimate"]["memory_bytes"]
    assert 0.5 < told / anonymous_peak(words) < 2


def anonymous_peak(words: list[Any]) -> int:
    """Bytes that a command holds at its highest, looked at every 2 ms."""
    command = [sys.executable, "-m", "lpsparse", *map(str, words)]
    peak = 0
    with subprocess.Popen(command, env=cli_environment(), stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text()
            held = re.search(r"RssAnon:\s+(\d+)", status)  # gone when the process is about to end
            peak = max(peak, int(held[1]) if held else 0)
            time.sleep(0.002)
    assert process.returncode == 0
    return peak << 10


def test_the_environment_asks_python_for_a_dry_run_too(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LPSPARSE_DRY_RUN", "1")
    assert lpsparse.prune(tiny, tmp_path / "out", sparsity=0.5).estimate is not None
    assert lpsparse.pack(tiny, tmp_path / "out").estimate is not None
    assert not (tmp_path / "out").exists()
    lpsparse.prune(tiny, tmp_path / "out", sparsity=0.5, dry_run=False)  # what is given wins
    assert lpsparse.push(tmp_path / "out", "org/name")["not_sent"] is not None  # it would ask the hub else
