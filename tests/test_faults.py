"""Whatever fails and whenever a run dies: OUT is whole or absent, the input as it was, the next run succeeds.

The short forms of benchmarks/faults.py, in a process of its own, since it forks; and faults that take two.
"""

import errno
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file
from support.cli import Ran, cli_environment
from support.files import ROOT, tree_hash, write_tiny

from lpsparse import pack, prune, report, verify
from lpsparse.commands.prune import prune_step
from lpsparse.errors import InputError
from lpsparse.parallel.threads import beside, check_going_on
from lpsparse.steps.prune import PruneStep
from lpsparse.steps.resolve import resolve

Cli = Callable[..., Ran]


def faults(*words: str) -> dict[str, dict[str, int]]:
    """The table that benchmarks/faults.py prints, where it found nothing wrong."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "faults.py"), *words],
        env=cli_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    head, _, *lines = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()]
    return {line[0]: dict(zip(head, map(int, line[1:]), strict=True)) for line in lines}


@pytest.mark.slow
def test_of_twenty_kills_most_hit_the_writing_and_none_leaves_half_an_artefact() -> None:
    rows = faults("kills", "--kills", "20", "--mib", "24").values()
    assert sum(row["kills"] for row in rows) == 20
    assert sum(row["between it and the rename"] for row in rows) >= 10
    assert sum(row["OUT absent"] + row["OUT whole"] for row in rows) == 20


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "kinds", "mode"),
    [
        ("prune", "ENOSPC:write EIO:close", ("at", "from")),
        ("prune", "EIO:write EIO:fsync EIO:mkdir", ("at",)),
        ("prune", "EIO:rename EXDEV:rename EOPNOTSUPP:rename", ("at", "from")),
        ("prune", "EROFS:change EMFILE:open", ("from",)),
        ("prune --overwrite", "EIO:rename EROFS:change", ("at",)),
        ("prune --overwrite", "POWER:any", ("at",)),
        ("prune on 2", "SIGKILL:any", ("at",)),
        ("pack", "EIO:fsync", ("at",)),
    ],
)
def test_every_call_to_the_system_may_fail(command: str, kinds: str, mode: tuple[str, ...]) -> None:
    rows = faults("calls", "--command", command, "--fault", *kinds.split(), "--mode", *mode)
    assert len(rows) == len(kinds.split())
    for name, row in rows.items():
        assert row["calls"] >= 2 and row["errors"] + row["killed"] >= row["calls"] / 2, (name, row)
        assert row["old OUT lost"] == row["corrupted"] == row["wrong"] == 0


def test_a_flipped_bit_and_a_zeroed_page_are_found_by_verify_and_by_report() -> None:
    for row in faults("pages", "--times", "24").values():
        assert row["verify found it"] == row["report refused it"] == row["times"] == 12
    assert row["tensor named"] >= 10  # a page of zeros changes how many there are, but in a header


def test_a_report_names_the_tensor_that_is_not_the_manifests(tiny: Path, tmp_path: Path) -> None:
    prune(tiny, tmp_path / "out", sparsity=0.5)
    path = tmp_path / "out" / "model.safetensors"
    arrays = load_file(path)
    save_file(arrays | {"norm.weight": arrays["norm.weight"] * 0}, path, metadata={"format": "pt"})
    for given in ((tmp_path / "out",), (tiny, tmp_path / "out")):
        with pytest.raises(
            InputError, match=r"model\.safetensors: .*'norm\.weight': 7 zeros, 0 there"
        ) as error:
            report(*given)
        assert error.value.code == "LPS352"
    (tmp_path / "out" / "lpsparse.json").unlink()  # as the error says
    assert report(tmp_path / "out").all.zeros > 0


# A run of which nothing is left, so that it says so when all is written and OUT not there yet; then it waits.
HELD = """
import sys
from pathlib import Path
from lpsparse.steps.prune import PruneStep
from lpsparse.commands.prune import prune_step

def say(text):
    if "100 % zero" in text:
        print("held", flush=True)
        sys.stdin.readline()

prune_step(PruneStep(model=sys.argv[1], out=Path(sys.argv[2]), sparsity=1), say)
"""


@pytest.mark.parametrize("ends", ["goes on", "is killed"])
def test_of_two_runs_on_one_out_the_second_names_the_first_and_takes_over_when_it_is_dead(
    ends: str, tiny: Path, tmp_path: Path, cli: Cli
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HELD, str(tiny), str(tmp_path / "out")],
        env=cli_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as first:
        assert first.stdout is not None and first.stdout.readline() == "held\n"
        second = cli("prune", tiny, tmp_path / "out", "--sparsity", "0.5")
        assert second.rc == 7 and f"process {first.pid} on {socket.gethostname()}" in second.stderr
        first.kill() if ends == "is killed" else first.communicate("\n")
    if ends == "is killed":
        assert cli("prune", tiny, tmp_path / "out", "--sparsity", "0.5").rc == 0
    assert verify(tmp_path / "out")["ok"] and sorted(os.listdir(tmp_path)) == ["out", "tiny"]


def touched(path: Path) -> None:
    os.utime(path, ns=(1, 1))


def appended(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


def replaced(path: Path) -> None:
    """By one of the same size and time."""
    shutil.copy2(path, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


@pytest.mark.parametrize("change", [touched, appended, replaced])
def test_a_source_that_changes_while_it_is_read_is_refused(
    change: Callable[[Path], None], tiny: Path, tmp_path: Path
) -> None:
    before = tree_hash(tiny)

    def say(text: str) -> None:
        if text.startswith("threshold"):  # decided, and not written yet
            change(tiny / "model.safetensors")

    with pytest.raises(InputError, match="was changed while it was read"):
        prune_step(resolve(PruneStep, {"model": str(tiny), "out": tmp_path / "out", "sparsity": 0.5}), say)
    assert not list(tmp_path.glob("out*"))
    assert change is appended or tree_hash(tiny) == before


def test_a_source_that_another_takes_the_place_of_while_it_is_packed_is_refused(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny(tmp_path / "other", seed=7)
    sync = os.fsync

    def replace_at_the_first(descriptor: int) -> None:
        with suppress(FileNotFoundError):
            (tmp_path / "other" / "model.safetensors").replace(tiny / "model.safetensors")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", replace_at_the_first)
    with pytest.raises(InputError, match="was changed while it was read") as error:
        pack(tiny, tmp_path / "out")
    assert error.value.code == "LPS344" and not list(tmp_path.glob("out*"))


class Failing(FileIO):
    """A file whose header can be read, and its tensors not."""

    def readinto(self, _: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize("command", ["prune", "pack"])
def test_a_tensor_that_the_disk_does_not_give_is_named_and_exits_3(
    command: str, tiny: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Path.open

    def open_badly(path: Path, *way: Any, **ways: Any) -> Any:
        return Failing(path) if path == tiny / "model.safetensors" else opened(path, *way, **ways)

    monkeypatch.setattr(Path, "open", open_badly)
    ran = cli(command, tiny, tmp_path / "out", *["--sparsity", "0.5"] * (command == "prune"))
    assert ran.rc == 3 and "error[LPS338]" in ran.stderr and "Input/output error" in ran.stderr
    assert "model.safetensors: '" in ran.stderr and os.listdir(tmp_path) == ["tiny"]


def test_an_error_ends_the_work_beside_it_soon_and_is_the_one_that_is_told() -> None:
    ended: list[str] = []

    def work() -> None:
        try:
            for _ in range(5000):
                check_going_on()
                time.sleep(0.001)
            ended.append("at its end")
        except CancelledError:
            ended.append("early")
            raise

    with pytest.raises(ValueError, match="of the block"), beside(work):
        raise ValueError("of the block")
    assert ended == ["early"]
