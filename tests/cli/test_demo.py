"""The demo, as a person runs it: offline, from any folder, ending in a table, a report and a verdict."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.cli import Ran

import lpsparse


def demo(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    # A proxy that nothing listens on: whatever tries the network fails at once.
    env = {
        **os.environ,
        "HTTPS_PROXY": "http://127.0.0.1:9",
        "HTTP_PROXY": "http://127.0.0.1:9",
        "HF_HOME": str(folder),
    }
    env.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-m", "lpsparse", "demo", *words]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_demo_ends_in_a_table_and_a_report_and_meets_its_bounds(tmp_path: Path) -> None:
    ran = demo(tmp_path, "--json")
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    dense, magnitude, ours = found["table"]
    assert (dense["zeros"], ours["zeros"], magnitude["zeros"]) == (0, 158_592, 158_592)
    assert ours["sparsity"] >= 0.7 and ours["packed_bytes"] < 0.5 * ours["dense_bytes"]
    assert ours["loss"] - dense["loss"] <= 0.05  # the bound of its recipe
    assert abs(ours["loss"] - magnitude["loss"]) < 0.1  # a rival that was trained as long, not a straw man
    commands = [line for line in ran.stderr.splitlines() if "] finetune " in line or "] prune " in line]
    assert len(commands) == 4 and all("-> lpsparse-demo/" in line for line in commands)
    assert (tmp_path / found["report"]).is_file() and lpsparse.verify(tmp_path / "lpsparse-demo/sparse")["ok"]
    again = demo(tmp_path)
    assert again.returncode == 4 and "exists already" in again.stderr


LEAVING = """
import signal, subprocess, sys, time
from lpsparse.cli import signals
from lpsparse.cli.demo import _children
signal.signal(signal.SIGINT, signal.default_int_handler)
signals.listen()
with _children() as children:
    rival = "import time; print('here', flush=True); time.sleep(60)"
    children.append(subprocess.Popen([sys.executable, "-c", rival], stderr=subprocess.DEVNULL))
    try:
        time.sleep(60)
    finally:  # as the end of a training that was interrupted
        print("ends", flush=True)
        time.sleep(60)
"""


def test_a_second_interrupt_of_the_demo_alone_ends_the_rival_too() -> None:
    ran = subprocess.Popen([sys.executable, "-c", LEAVING], stdout=subprocess.PIPE, text=True)
    assert ran.stdout is not None
    for word in ("here", "ends"):
        assert ran.stdout.readline().strip() == word
        ran.send_signal(signal.SIGINT)
    assert ran.wait(20) == 130
    assert ran.communicate(timeout=20)[0] == ""  # the rival holds the pipe for as long as it lives


def test_a_missed_bound_is_a_verdict_with_exit_1(tmp_path: Path, cli: Callable[..., Ran]) -> None:
    recipe = tmp_path / "recipe.yaml"
    settings = "task: causal-lm, split: 'train[:9000]', eval_split: 'validation[:4000]', max_length: 32"
    recipe.write_text(
        "model: bundled:stories260k\ndata: bundled:shakespeare\nsteps:\n"
        f"  - finetune: {{{settings}, method: one-shot, target_sparsity: 0.9, steps: 1, lr: 1e-9}}\n"
        "  - prune: {sparsity: 0.9}\n"
        "  - report: {min_sparsity: 0.9, max_quality_drop: 0.01}\n"
    )
    ran = cli("run", recipe, "--set", f"out={tmp_path / 'out'}")
    assert ran.rc == 1, ran.stderr
    assert "1 of 2 budgets failed" in " ".join(ran.stdout.split()) and "max-quality-drop" in ran.stdout
