"""Progress: what is left, by the steps themselves; bars on a terminal, lines elsewhere."""

import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterable
from fcntl import ioctl
from pathlib import Path
from typing import Any

import pytest
from support.cli import LISTENING, cli_environment
from support.models import built

from lpsparse.cli.bar import Bar, Pace
from lpsparse.cli.output import Voice
from lpsparse.parallel.progress import Position, advance, phase, told_to


def left_after(times: Iterable[float], total: int, done: int = 0) -> list[float | None]:
    """What is left after each step, whose durations are given."""
    pace, now, found = Pace(done, total, 0.0), 0.0, list[float | None]()
    for step, seconds in enumerate(times, done + 1):
        now += seconds
        pace.move(step, now)
        found.append(pace.left(now))
    return found


def test_what_is_left_is_known_from_the_first_step_on_and_is_nothing_at_the_end() -> None:
    assert Pace(0, 10, 0.0).left(5.0) is None
    assert left_after([2.0] * 10, 10) == [18, 16, 14, 12, 10, 8, 6, 4, 2, 0]


def test_steps_of_minutes_are_not_forgotten() -> None:
    assert left_after([60.0, 60.0, 60.0], 60)[-1] == 57 * 60


def test_a_slow_first_step_does_not_count_from_the_second_on() -> None:
    assert left_after([90.0, 3.0, 3.0, 3.0], 60) == [59 * 90, 58 * 3, 57 * 3, 56 * 3]


def test_steps_before_a_resume_took_no_time_here() -> None:
    assert left_after([2.0, 2.0], 100, done=50) == [98, 96]


def test_a_phase_that_becomes_slower_is_told_by_its_later_half() -> None:
    assert left_after([1.0] * 20 + [4.0] * 20, 100)[-1] == pytest.approx(60 * 4)


def test_time_goes_on_between_two_steps() -> None:
    pace = Pace(0, 4, 0.0)
    pace.move(1, 10.0)
    assert (pace.left(10.0), pace.left(14.0), pace.left(99.0)) == (30, 26, 0)


def test_a_million_moves_are_told_by_few_marks() -> None:
    pace = Pace(0, 10**6, 0.0)
    for done in range(0, 10**6, 100):
        pace.move(done, done / 1000)
    assert len(pace._marks) < 200 and pace.per_second == pytest.approx(1000)


def test_a_phase_within_another_and_its_units_are_not_told() -> None:
    heard: list[Position | None] = []
    with told_to(heard.append), phase("training", 3, "steps", done=1):
        with phase("reading", 100):
            advance(50)
        advance(1, "steps", what="recover", facts=("loss 1",))
    assert [each and (each.what, each.done) for each in heard] == [("training", 1), ("recover", 2), None]


def test_what_is_left_is_not_guessed_before_anything_was_read(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lpsparse.cli.bar._SILENCE", 0.0)
    bar = Bar(Voice())
    for done in (0, 500):
        bar.update(Position("reading", "bytes", done, 1000))
    first, second = capfd.readouterr().err.splitlines()
    assert "left" not in first and "0:00 left" in second and second.startswith("reading: 500 B of ")


def test_progress_is_told_in_bytes_where_there_is_no_terminal(tiny: Path, tmp_path: Path) -> None:
    code = "from lpsparse.cli import bar, main; bar._SILENCE = 0.0; main()"
    words = ["prune", str(tiny), str(tmp_path / "out"), "--sparsity", "0.5", "--layout", "packed"]
    for more, wanted in (([], True), (["-q"], False)):
        done = subprocess.run(
            [sys.executable, "-c", code, *words, *more], env=cli_environment(), capture_output=True, text=True
        )
        said = {line.partition(":")[0] for line in done.stderr.splitlines() if " left" in line}
        assert done.returncode == 0 and ({"selecting", "writing and reading back"} <= said) is wanted
        words[2] += "-again"


# At a terminal

SLOW = """
import time
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(48, 13), nn.Linear(13, 12), nn.Linear(12, 4))

    def forward(self, x):
        if self.training:
            time.sleep(0.15)  # longer than the bar's own pause between two drawings
        return self.body(x)

def build():
    return Net()
"""


@pytest.fixture
def slow(tmp_path: Path) -> list[str]:
    """A command that trains 6 steps of 0.15 s and more."""
    import numpy as np
    import torch

    torch.save(built(tmp_path / "slow.py", SLOW, seed=5), tmp_path / "net.pt")
    y = np.arange(44) % 4
    x = np.broadcast_to(y[:, None, None, None], (44, 4, 4, 3)).astype(np.uint8)
    np.savez(tmp_path / "images.npz", x=x, y=y)
    words = "finetune net.pt out --task image-classification --data images.npz --model-fn slow.py:build"
    return f"{words} --steps 6 --target-sparsity 0.5 --batch-size 8 --threads 1".split()


def at_terminal(words: list[str], cwd: Path, columns: int, after: bytes | None = None) -> tuple[int, str]:
    """Exit code, and what a terminal is sent. Ctrl-C comes `after` these bytes."""
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    env: dict[str, Any] = cli_environment(COLUMNS=None, TERM="xterm")
    with subprocess.Popen(
        [sys.executable, "-c", LISTENING, *words],
        cwd=cwd,
        env=env,
        stdout=theirs,
        stderr=theirs,
        stdin=theirs,
    ) as process:
        os.close(theirs)
        sent = b""
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # how Linux tells that nobody writes any more
                break
            sent += part
            if after is not None and after in sent:
                process.send_signal(signal.SIGINT)
                after = None
            if not part:
                break
    os.close(ours)
    return process.returncode, sent.decode()


def drawn(sent: str) -> list[str]:
    """All lines that were to be seen at some time, without colours."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", sent)
    return [line for line in re.split(r"[\r\n]+|\x1b\[[0-9;?]*[A-Za-z]", text) if line.strip()]


@pytest.mark.parametrize("columns", [80, 40])
def test_every_step_is_drawn_with_its_phase_and_what_is_left(
    columns: int, slow: list[str], tmp_path: Path
) -> None:
    rc, sent = at_terminal(slow, tmp_path, columns)
    lines = drawn(sent)
    steps = [re.match(r"(decay|recover) (\d)/6 ", line) for line in lines]
    shown = {int(match[2]): line for match, line in zip(steps, lines, strict=True) if match}
    assert rc == 0 and set(shown) == {0, 1, 2, 3, 4, 5, 6}
    assert all(re.search(r"\d:\d\d left", shown[step]) for step in range(1, 6))
    assert {match[1] for match in steps if match} == {"decay", "recover"}
    if columns == 80:
        assert all(re.search(r"loss \d.* it/s  0:0\d so far", shown[step]) for step in range(1, 6))
    assert [line for line in lines if len(line) > columns] == []
    for stage in ("loading net.pt", "measuring before: ", "measuring after: ", "writing out"):
        assert any(line.startswith(stage) for line in lines)
    assert sent.rindex("\x1b[?25h") > sent.rindex("\x1b[?25l")  # the cursor is back


def test_ctrl_c_leaves_a_clean_terminal(slow: list[str], tmp_path: Path) -> None:
    rc, sent = at_terminal(slow, tmp_path, 80, after=b"1/6")
    end = sent[sent.rindex("\x1b[?25h") :]
    assert rc == 130 and "left" not in end and end.count("\n") == 2 and "error[LPS750]" in end


def test_elsewhere_stages_are_lines_and_quiet_is_quiet(slow: list[str], tmp_path: Path) -> None:
    words = [sys.executable, "-m", "lpsparse", *slow]
    done = subprocess.run(words, cwd=tmp_path, env=cli_environment(), capture_output=True, text=True)
    said = [line.partition(":")[0] for line in done.stderr.splitlines()]
    for stage in ("loading net.pt", "measuring before", "measuring after", "writing out"):
        assert said.count(stage) == 1
    assert "\x1b" not in done.stderr and "recover: 6 of 6 steps, loss " in done.stderr
    words += ["--overwrite", "-q"]
    again = subprocess.run(words, cwd=tmp_path, env=cli_environment(), capture_output=True, text=True)
    assert (again.returncode, again.stderr) == (0, "")
