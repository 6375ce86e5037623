"""Several processes share the work on a checkpoint: the bytes are those of one, and none when one is lost."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.cli import Ran, cli_environment, run_cli
from support.files import SHARDS, again, tree_hash
from support.ranks import free_port

import lpsparse
from lpsparse.errors import ExitCode
from lpsparse.parallel.environment import set_torch_names

# Every command on four processes, as a program of theirs; each says what it read to select, and what it got.
PROGRAM = """
import json, os, sys
import lpsparse
from lpsparse.checkpoint.layouts import dense
from lpsparse.pruning import rules
model, out = sys.argv[1:]
read, selecting = [], rules.select
def select(*args, **options):
    exactly = dense.read_exactly
    dense.read_exactly = lambda *given: read.append(given[-1]) or exactly(*given)
    found = selecting(*args, **options)
    dense.read_exactly = exactly
    return found
rules.select = select
with lpsparse.together():
    found = [lpsparse.prune(model, f"{out}/sparse", sparsity=0.8).prunable.zeros]
    found.insert(0, sum(read))
    rules.select = selecting
    found += [lpsparse.prune(model, f"{out}/rows", sparsity=0.5, scope="tensor").prunable.zeros]
with lpsparse.together():
    found += [lpsparse.pack(f"{out}/sparse", f"{out}/packed", layout="bitmask").bytes.file_bytes]
    found += [lpsparse.unpack(f"{out}/packed", f"{out}/dense").bytes.file_bytes]
    try:  # of four only the second has no such model
        alone = os.environ.get("RANK", "1") == "1"
        lpsparse.unpack(f"{out}/{'gone' if alone else 'packed'}", f"{out}/never")
    except lpsparse.LpsparseError as error:
        found += [error.code, error.what]
    found += [lpsparse.verify(f"{out}/sparse", model).as_data()]
    found += [lpsparse.report(f"{out}/packed", model).base.bytes_ratio]
    for bad in ("prune", "pack"):
        try:
            getattr(lpsparse, bad)(model, f"{out}/sparse", **({"sparsity": 0.5} if bad == "prune" else {}))
        except lpsparse.LpsparseError as error:
            found += [error.code, int(error.exit_code)]
print(json.dumps(found))
"""
# A process that is lost when it is to write.
LOST = """
import os, signal, time
from lpsparse.checkpoint.layouts import dense
from lpsparse.cli import main
if os.environ["RANK"] == os.environ["LOST"]:
    dense.write_tensors = lambda *_: time.sleep(0.2) or os.kill(os.getpid(), signal.SIGKILL)
main()
"""


def start(words: list[str], **env: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, *words], env=cli_environment(**env), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def end(process: subprocess.Popen[bytes]) -> Ran:
    stdout, stderr = process.communicate(timeout=120)
    return Ran(process.returncode, stdout.decode(), stderr.decode())


def launched(count: int, words: list[str], **env: str) -> list[Ran]:
    """The processes of a job, with what a launcher sets for each."""
    env |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    env |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    ranks = [start(words, **env, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(count)]
    return [end(each) for each in ranks]


def test_four_processes_write_the_bytes_of_one(shards: Path, tmp_path: Path) -> None:
    for name in ("one", "four"):
        (tmp_path / name).mkdir()
    alone = end(start(["-c", PROGRAM, str(shards), str(tmp_path / "one")]))
    words = ["-c", PROGRAM, str(shards), str(tmp_path / "four")]
    ran = launched(4, words)
    assert [each.rc for each in ran] == [0] * 4, ran[0].stderr
    said = [json.loads(each.stdout) for each in ran]
    assert [found[1:] for found in said] == [json.loads(alone.stdout.replace("/one/", "/four/"))[1:]] * 4
    assert all(0 < found[0] <= json.loads(alone.stdout)[0] / 2 for found in said)  # each looks at its share
    assert tree_hash(tmp_path / "four") == tree_hash(tmp_path / "one")
    assert said[0][-4:] == ["LPS401", 4] * 2 and "LPS327" in said[0]


TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port"]
ACCELERATE = [
    "-m",
    "accelerate.commands.launch",
    "--multi_gpu",
    "--num_processes=2",
    "--num_machines=1",
    "--mixed_precision=no",
    "--dynamo_backend=no",
    "--main_process_port",
]


@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_a_launched_command_speaks_once_and_ends_as_alone(
    launcher: list[str], shards: Path, tmp_path: Path
) -> None:
    words = ["-m", "lpsparse", "prune", str(shards), str(tmp_path / "out"), "--sparsity", "0.8"]
    ran = end(start([*launcher, str(free_port()), *words]))
    assert ran.rc == 0, ran.stderr
    alone = run_cli(["prune", shards, tmp_path / "alone", "--sparsity", "0.8"])
    assert ran.stdout == alone.stdout.replace("alone: ", "out: ", 1) and ran.stderr.count("wrote ") == 1
    assert tree_hash(tmp_path / "out") == tree_hash(tmp_path / "alone")


SRUN = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost"}


@pytest.mark.parametrize(("rank", "step"), [("SLURM_PROCID", SRUN), ("PMI_RANK", {"PMI_SIZE": "2"})])
def test_the_processes_of_srun_and_of_mpirun_find_one_another(
    rank: str, step: dict[str, str], shards: Path, tmp_path: Path
) -> None:
    words = ["-m", "lpsparse", "report", str(shards), "--json", str(tmp_path / "report.json")]
    port = free_port(range(15000, 25000))
    meet = {"SLURM_JOB_ID": str(port - 15000)} if step is SRUN else {"MASTER_PORT": str(port)}
    ran = [end(each) for each in [start(words, **{rank: str(i)}, **step, **meet) for i in range(2)]]
    assert [each.rc for each in ran] == [0, 0], ran[0].stderr
    assert ran[1].stdout == "" and json.loads((tmp_path / "report.json").read_text())["model"] == "shards"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("node7", "node7"), ("a1,b2", "a1"), ("node[003-007,9],b", "node003"), ("rack[1-2]n[3,4]", "rack1n3")],
)
def test_the_first_host_of_a_step_is_where_processes_meet(
    nodes: str, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # to be put back as it was
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_PROCID", "3")
    set_torch_names()
    assert "RANK" not in os.environ  # a batch script
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    monkeypatch.setenv("SLURM_STEP_NODELIST", nodes)
    set_torch_names()
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("3", "8")
    assert os.environ["MASTER_ADDR"] == first


@pytest.mark.parametrize("lost", [0, 2])
def test_a_lost_process_ends_the_others_and_leaves_no_artefact(
    lost: int, shards: Path, tmp_path: Path
) -> None:
    words = ["-c", LOST, "prune", str(shards), str(tmp_path / "out"), "--sparsity", "0.5"]
    ended = launched(3, words, LOST=str(lost))
    assert ended[lost].rc == -signal.SIGKILL and not (tmp_path / "out").exists()
    assert [each.rc for i, each in enumerate(ended) if i != lost] == [ExitCode.RESOURCE] * 2
    if lost:
        assert "error[LPS604]" in ended[0].stderr
    left = sorted(path.name for path in (tmp_path / "out.partial").glob("*.safetensors"))
    dealt = sorted(SHARDS, key=lambda name: -(shards / name).stat().st_size)  # the largest first
    assert left == sorted(name for i, name in enumerate(dealt) if i != lost)
    assert "2 of 3 weight files were complete already" in again(shards, tmp_path / "out")
    assert lpsparse.verify(tmp_path / "out", shards)["ok"]
    assert sorted(os.listdir(tmp_path)) == ["out", "shards"]


def test_an_error_of_one_process_is_that_of_all(shards: Path, tmp_path: Path) -> None:
    (shards / "model-00002-of-00003.safetensors").write_bytes(b"")
    words = ["-m", "lpsparse", "prune", str(shards), str(tmp_path / "out"), "--sparsity", "0.8"]
    ran = launched(2, words)
    assert [each.rc for each in ran] == [ExitCode.INPUT] * 2
    assert ran[0].stderr.count("error[LPS301]") == 1 and ran[1].stderr == ""
