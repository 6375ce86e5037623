"""Two processes on a CPU: the same weights as one, DDP and FSDP2, and what happens when one of them fails."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from support.cli import Ran, cli_environment
from support.files import tree_hash
from support.models import BUNDLED, experts, gemma, gpt2, llama
from support.ranks import free_port, on_two_ranks
from transformers import AutoModelForCausalLM

import lpsparse
from lpsparse import ExitCode, LpsparseError
from lpsparse.checkpoint.files import OWNER, STATE
from lpsparse.checkpoint.open import open_checkpoint
from lpsparse.commands.finetune import finetune_step
from lpsparse.parallel import ranks
from lpsparse.steps.finetune import FinetuneStep
from lpsparse.steps.resolve import resolve
from lpsparse.training.build import prepare
from lpsparse.training.loss import blocks
from lpsparse.training.model import load_transformer
from lpsparse.training.quality import evaluate

Options = dict[str, Any]


def command(given: Options, out: Path, **more: Any) -> list[str]:
    step = resolve(FinetuneStep, {**given, "out": out, **more})
    return [sys.executable, "-m", "lpsparse", "finetune", step.model, str(step.out), *step.options()]


def start(words: list[str], **env: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(words, env=cli_environment(**env), stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def end(process: subprocess.Popen[bytes]) -> Ran:
    out, err = process.communicate(timeout=120)
    return Ran(process.returncode, out.decode(), err.decode())


def run(given: Options, out: Path, fault: str = "", **more: Any) -> Ran:
    return end(start(command(given, out, **more), TEST_FAULT=fault))


def weights(out: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(out / "model.safetensors")


@pytest.fixture
def plain(faulty: Options) -> Options:
    """Without dropout, which no two numbers of processes can share."""
    code = Path(str(faulty["model_fn"]).rpartition(":")[0])
    code.write_text(code.read_text().replace("nn.Dropout(0.1)", "nn.Identity()"))
    return {**faulty, "target_sparsity": "0.6"}


def _train(rank: int, given: Options, runs: list[tuple[str, str, Options]], told: str) -> None:
    """Runs of one job after another, each with its OUT, fault and changes (under OTHER those of process 1
    alone); what process 0 says of each. One job for many runs, since torch takes seconds to start."""
    found: list[Ran] = []
    for out, fault, more in runs:
        os.environ["TEST_FAULT"] = fault
        said: list[str] = []
        own = {**given, **more, "out": out}
        other = own.pop(OTHER, {})
        if "data" in other:  # the same bytes under another name
            other = {"data": str(shutil.copy(given["data"], f"{out}-{rank}.npz"))}
        try:
            finetune_step(resolve(FinetuneStep, own | (other if rank == 1 else {})), said.append)
            found.append(Ran(0, "", "\n".join(said)))
        except LpsparseError as error:
            found.append(Ran(int(error.exit_code), "", "\n".join([*said, error.code, error.what])))
            assert not Path(out).exists()
    if rank == 0:
        Path(told).write_text(json.dumps(found))


OTHER = "of process 1"
WAYS: dict[str, Options] = {"DDP": {}, "FSDP2": {"shard": True}, "two parts": {"accumulate": 2}}
REFUSED: dict[str, tuple[str, Options, ExitCode, str]] = {  # fault, changes, exit code, words
    "nan": ("1:5:nan", {"save_every": 2}, ExitCode.NUMERIC, "the state of step 4"),
    "lamp": ("", {"shard": True, "allocation": "lamp"}, ExitCode.USAGE, "lamp needs whole tensors"),
    "seed": ("", {OTHER: {"seed": 1}}, ExitCode.STATE, "rank 1 has other options"),
    "data": ("", {OTHER: {"data": "other.npz"}}, ExitCode.STATE, "rank 1 has other options"),
    "apart": ("1:9:perturb", {}, ExitCode.RESOURCE, "LPS605"),
}


def test_two_processes_train_as_one_does_and_stop_together(plain: Options, tmp_path: Path) -> None:
    lpsparse.finetune(out=tmp_path / "one", **plain)
    runs = [(str(tmp_path / name), "", way) for name, way in WAYS.items()]
    runs += [(str(tmp_path / name), fault, more) for name, (fault, more, *_) in REFUSED.items()]
    on_two_ranks(_train, plain, runs, str(tmp_path / "told.json"))
    told = [Ran(*each) for each in json.loads((tmp_path / "told.json").read_text())]
    one = weights(tmp_path / "one")
    for name in WAYS:
        two = weights(tmp_path / name)
        for key, weight in one.items():
            torch.testing.assert_close(two[key], weight, rtol=1e-3, atol=1e-5)
            assert torch.equal(two[key] == 0, weight == 0)
    assert [each.rc for each in told[: len(WAYS)]] == [0] * len(WAYS)
    for (_, _, code, words), ran in zip(REFUSED.values(), told[len(WAYS) :], strict=True):
        assert ran.rc == code and words in ran.stderr, ran.stderr


TEXT = "The quick brown fox jumps over the lazy dog and says that it is a fine day. " * 60
MODELS: dict[str, tuple[Options, Callable[[Path], Path]]] = {
    "gpt2": ({}, gpt2),
    "gemma": ({}, gemma),
    "llama": ({"shard": True}, llama),
    "experts": ({"shard": True}, experts),
}


def test_two_processes_train_transformers_as_one_does(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    given = {
        "data": str(tmp_path / "text.txt"),
        "task": "causal-lm",
        "steps": 8,
        "batch_size": 4,
        "max_length": 16,
        "lr": 1e-3,
        "target_sparsity": "0.6",
        "threads": 1,
        "distill": 0.5,
    }
    runs: list[tuple[str, str, Options]] = []
    for name, (way, make) in MODELS.items():
        model = {"model": str(make(tmp_path / f"{name}-model"))}
        lpsparse.finetune(out=tmp_path / f"{name}-one", **given, **model)
        runs.append((str(tmp_path / f"{name}-two"), "", {**model, **way}))
    on_two_ranks(_train, given, runs, str(tmp_path / "told.json"))
    assert all(rc == 0 for rc, *_ in json.loads((tmp_path / "told.json").read_text()))
    for name in MODELS:
        one, two = (weights(tmp_path / f"{name}-{many}") for many in ("one", "two"))
        for key, weight in one.items():
            # A gradient near zero is noise, which AdamW makes as large as any; gemma is rounded to bfloat16.
            torch.testing.assert_close(two[key], weight, rtol=1e-2, atol=3e-4)
        alone, found = (lpsparse.report(tmp_path / f"{name}-{many}") for many in ("one", "two"))
        assert found.prunable.zeros == alone.prunable.zeros
        assert found.quality[0].before == pytest.approx(alone.quality[0].before, abs=1e-5)
        assert found.quality[0].after == pytest.approx(alone.quality[0].after, abs=1e-3)


def _unreadable(*_: Any) -> Any:
    raise AssertionError("only process 0 reads the weights")


def _load(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo")
    checkpoint = open_checkpoint(BUNDLED)
    if rank > 0:
        tensors = tuple(replace(tensor, blocks=_unreadable) for tensor in checkpoint.tensors)
        checkpoint = replace(checkpoint, tensors=tensors)
    for shard in (False, True):
        model: Any = load_transformer(checkpoint, AutoModelForCausalLM, {}).module
        assert all(param.is_meta == (rank > 0) for param in model.parameters())
        ranks.distribute(model, torch.device("cpu"), blocks(model), shard=shard, bf16=False)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        parts = [ranks.local_tensor(param).numel() for param in model.parameters()]
        whole = {name: ranks.full_tensor(value) for name, value in model.state_dict().items()}
        torch.save((parts, whole, dict(model.named_buffers())), f"{folder}/{shard}-{rank}.pt")


def test_the_weights_are_read_once_and_spread(tmp_path: Path) -> None:
    on_two_ranks(_load, str(tmp_path))
    model = AutoModelForCausalLM.from_pretrained(BUNDLED)
    own = [model.state_dict(), dict(model.named_buffers())]
    sizes = [param.numel() for param in model.parameters()]
    for shard in (False, True):
        (mine, *first), (theirs, *second) = (torch.load(tmp_path / f"{shard}-{rank}.pt") for rank in (0, 1))
        for tables in (first, second):
            for found, given in zip(tables, own, strict=True):
                assert found.keys() == given.keys()
                assert all(torch.equal(found[name], given[name]) for name in given)
        assert [a + b for a, b in zip(mine, theirs, strict=True)] == [(2 - shard) * size for size in sizes]


# After the first step, the end of an epoch, between two lines of the metrics, the last one.
STOPS: dict[str, tuple[Options, tuple[int, ...]]] = {
    "DDP": ({}, (1, 4, 2, 8)),
    "FSDP2": ({"shard": True}, (7, 8)),
}


def test_two_processes_that_were_stopped_end_in_the_bits_of_two_that_were_not(
    plain: Options, tmp_path: Path
) -> None:
    told = tmp_path / "told.json"
    runs: list[tuple[str, str, Options]] = []
    for name, (way, stops) in STOPS.items():
        out = str(tmp_path / name)
        runs += [(out, f"1:{steps}:SIGTERM", way) for steps in stops]  # one is asked, and both stop
        runs += [(out, "", {"shard": not way}), (str(tmp_path / f"{name} whole"), "", way)]
    on_two_ranks(_train, plain, runs, str(told))
    found = iter([Ran(*each) for each in json.loads(told.read_text())])
    for name, (way, stops) in STOPS.items():
        for done in accumulate(stops):
            stopped = next(found)
            assert stopped.rc == ExitCode.RESUMABLE and f"after step {done} of 15" in stopped.stderr
        other, whole = next(found), next(found)
        assert other.rc == ExitCode.STATE and f"shard was {bool(way)}, is {not way}" in other.stderr
        resumed = run({**plain, **way, "processes": 2}, tmp_path / name)  # by other processes
        assert whole.rc == resumed.rc == 0 and "resuming at step 15" in resumed.stderr
        assert tree_hash(tmp_path / name) == tree_hash(tmp_path / f"{name} whole")


def test_quiet_processes_say_nothing(plain: Options, tmp_path: Path) -> None:
    ran = end(start([*command(plain, tmp_path / "out", processes=2, steps=1), "--quiet", "--json"]))
    assert (ran.rc, ran.stderr) == (0, "") and json.loads(ran.stdout)["prunable"]["zeros"] > 0


def started(plain: Options, out: Path) -> subprocess.Popen[bytes]:
    """A long run of two processes that has done its first steps."""
    process = start(command({**plain, "processes": 2, "epochs": 2000}, out))
    metrics = out.with_name(out.name + ".partial") / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 3)
    return process


def wait_for(there: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not there() and time.monotonic() < until:
        time.sleep(0.1)
    assert there()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent was killed")
def test_processes_whose_launcher_was_killed_save_their_state_and_end(plain: Options, tmp_path: Path) -> None:
    process = started(plain, tmp_path / "out")
    process.kill()
    assert process.wait() == -signal.SIGKILL
    for stream in (process.stdout, process.stderr):
        assert stream is not None
        stream.close()  # the others hold its ends, and go on
    folder = tmp_path / "out.partial"
    wait_for(lambda: json.loads((folder / OWNER).read_text())["pid"] == -1)
    assert [path.name[:5] for path in (folder / STATE).iterdir()] == ["step-"]


def test_a_signal_to_the_launcher_stops_all_after_a_state(plain: Options, tmp_path: Path) -> None:
    process = started(plain, tmp_path / "out")
    process.send_signal(signal.SIGTERM)
    ran = end(process)
    assert ran.rc == ExitCode.RESUMABLE and "its state is in" in ran.stderr, ran.stderr
    assert "Traceback" not in ran.stderr
    assert [path.name[:5] for path in (tmp_path / "out.partial" / STATE).iterdir()] == ["step-"]


def test_a_killed_process_ends_the_run_in_time_and_its_last_state_is_whole(
    plain: Options, tmp_path: Path
) -> None:
    given = {**plain, "processes": 2, "save_every": 3}
    begun = time.monotonic()
    ran = run(given, tmp_path / "out", "1:8:SIGKILL")
    assert time.monotonic() - begun < 60  # start-up included
    assert ran.rc == ExitCode.RESOURCE and "process 1 was ended by SIGKILL" in ran.stderr, ran.stderr
    assert "Traceback" not in ran.stderr
    assert "resuming at step 6" in run(given, tmp_path / "out").stderr


def test_a_frozen_process_ends_the_run_when_the_others_have_waited_long_enough(
    plain: Options, tmp_path: Path
) -> None:
    ran = run({**plain, "processes": 2, "rank_timeout": 4.0}, tmp_path / "out", "1:5:SIGSTOP")
    assert ran.rc == ExitCode.RESOURCE and "process 0: step 5" in ran.stderr, ran.stderr
    assert "Traceback" not in ran.stderr and not (tmp_path / "out").exists()


def test_a_parameter_without_a_gradient_is_no_lost_process_and_quality_is_that_of_the_files(
    plain: Options, tmp_path: Path
) -> None:
    code = Path(str(plain["model_fn"]).rpartition(":")[0])
    code.write_text(
        code.read_text().replace("nn.ReLU(), nn.Identity()", "nn.ReLU(), nn.BatchNorm1d(13)") + ODD
    )
    build: dict[str, Any] = {}
    exec(code.read_text(), build)
    torch.save(build["build"]().state_dict(), str(plain["model"]))
    tensors = safetensors.torch.load_file(BUNDLED / "model.safetensors")
    del tensors["model.norm.weight"]
    shutil.copytree(BUNDLED, tmp_path / "broken")
    safetensors.torch.save_file(tensors, tmp_path / "broken" / "model.safetensors")
    text = {"model": str(tmp_path / "broken"), "data": "bundled:shakespeare", "task": "causal-lm"}
    runs: list[tuple[str, str, Options]] = [
        (str(tmp_path / "out"), "", {"epochs": 6}),
        (str(tmp_path / "none"), "", {**text, "model_fn": None}),  # what process 0 finds all are told
    ]
    on_two_ranks(_train, plain, runs, str(tmp_path / "told.json"))
    ran, broken = (Ran(*each) for each in json.loads((tmp_path / "told.json").read_text()))
    assert ran.rc == 0, ran.stderr
    assert broken.rc == ExitCode.INPUT and "model.norm.weight" in broken.stderr
    manifest = json.loads((tmp_path / "out" / "lpsparse.json").read_text())
    options = {key: plain[key] for key in ("task", "data", "model_fn", "batch_size")}
    found = lpsparse.evaluate(tmp_path / "out", split="train", **options)
    held = resolve(FinetuneStep, {**plain, "out": "o"})
    task = prepare(held, open_checkpoint(tmp_path / "out"))
    assert manifest["quality"][0]["after"] == pytest.approx(evaluate(held, task).of("accuracy"), abs=1e-9)
    assert found["images"] == 44


ODD = """
class Odd(Net):
    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(3, 5)

def build():
    return Odd()
"""


def test_what_a_process_other_than_the_first_says_is_passed_on(plain: Options, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(PICKY)
    ran = run({**plain, "processes": 2, "optimizer": f"{tmp_path / 'mine.py'}:Picky"}, tmp_path / "out")
    assert ran.rc == ExitCode.USAGE, ran.stderr
    assert "no room on process 1" in ran.stderr and ran.stderr.count("hint:") == 1, ran.stderr


PICKY = """
import os
import torch

class Picky(torch.optim.SGD):
    def __init__(self, params, lr):
        if os.environ.get("RANK") == "1":
            raise ValueError("no room on process 1")
        super().__init__(params, lr)
"""


def test_out_of_memory_on_any_process_ends_the_run_with_the_batch_that_would_fit(
    plain: Options, tmp_path: Path
) -> None:
    ran = run({**plain, "processes": 2}, tmp_path / "out", "1:4:memory")
    assert ran.rc == ExitCode.RESOURCE, ran.stderr
    assert (
        "out of memory at step 4, with 4 examples at a time" in ran.stderr and "--accumulate 2" in ran.stderr
    )
    assert "Traceback" not in ran.stderr


def test_the_exit_code_and_the_two_lines_of_a_failing_process_are_kept(
    plain: Options, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.npz"
    bad.write_bytes(b"no images")
    ran = run({**plain, "data": str(bad), "processes": 2}, tmp_path / "out")
    assert ran.rc == ExitCode.INPUT
    assert ran.stderr.count("error[LPS") == 1 and ran.stderr.count("hint:") == 1, ran.stderr


def by_hand(given: Options, out: Path, changes: list[Options]) -> list[subprocess.Popen[bytes]]:
    """The processes of a job that nobody watches over, each with its own changes."""
    port = free_port()
    return [
        start(
            command(given, out, **changed),
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE="2",
            LOCAL_WORLD_SIZE="2",
            MASTER_ADDR="localhost",
            MASTER_PORT=str(port),
        )
        for rank, changed in enumerate(changes)
    ]


def test_a_process_that_ends_before_the_first_step_ends_the_others(plain: Options, tmp_path: Path) -> None:
    begun = time.monotonic()
    missing = {"data": str(tmp_path / "nowhere.npz")}  # the others load the model and wait for it
    ran = [end(process) for process in by_hand(plain, tmp_path / "out", [{}, missing])]
    assert time.monotonic() - begun < 60
    assert ran[0].rc == ExitCode.RESOURCE and "error[LPS604]" in ran[0].stderr, ran[0].stderr
    assert ran[1].rc == ExitCode.INPUT and "Traceback" not in ran[0].stderr + ran[1].stderr


def _train_and_measure(rank: int, out: str) -> None:
    given: Options = {"data": "bundled:shakespeare", "task": "causal-lm", "max_length": 16, "batch_size": 4}
    splits = {"split": "train[:2000]", "eval_split": "validation[:2000]"}
    lpsparse.finetune("bundled:stories260k", out, steps=2, method="dense", **splits, **given)
    loss = lpsparse.evaluate(out, split="validation[:2000]", **given)["loss"]
    Path(f"{out}-{rank}.json").write_text(json.dumps(loss))


def test_a_program_of_two_processes_trains_and_then_measures(tmp_path: Path) -> None:
    on_two_ranks(_train_and_measure, str(tmp_path / "out"))
    after = json.loads((tmp_path / "out" / "lpsparse.json").read_text())["quality"][0]["after"]
    for rank in (0, 1):
        assert json.loads((tmp_path / f"out-{rank}.json").read_text()) == pytest.approx(after, abs=1e-6)


def test_another_launcher_starts_the_same_run(plain: Options, tmp_path: Path) -> None:
    words = command(plain, tmp_path / "out")[1:]
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    ran = end(start([sys.executable, *torchrun, *words]))
    assert ran.rc == 0 and ran.stdout.count("prunable weights are zero") == 1, ran.stderr


def test_deepspeed_is_refused(plain: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(LpsparseError) as refused:
        lpsparse.finetune(out=tmp_path / "out", **plain)
    assert refused.value.exit_code == ExitCode.USAGE and "--shard" in refused.value.hint


def test_sharding_needs_more_than_one_process(plain: Options, tmp_path: Path) -> None:
    with pytest.raises(LpsparseError, match="one process") as refused:
        lpsparse.finetune(out=tmp_path / "out", **plain, shard=True)
    assert refused.value.exit_code == ExitCode.USAGE and "--processes 2 or more" in refused.value.hint
    assert not list(tmp_path.glob("out*"))


def test_a_signal_to_a_whole_job_with_workers_saves_the_state(plain: Options, tmp_path: Path) -> None:
    words = command({**plain, "workers": 1, "epochs": 2000}, tmp_path / "out")
    process = subprocess.Popen(
        words, env=cli_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    metrics = tmp_path / "out.partial" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 3)
    os.killpg(process.pid, signal.SIGTERM)
    ran = end(process)
    assert ran.rc == ExitCode.RESUMABLE and "its state is in" in ran.stderr, ran.stderr


def test_sigterm_before_the_first_step_exits_75_and_leaves_nothing(plain: Options, tmp_path: Path) -> None:
    process = start([sys.executable, "-c", SLOW, *command(plain, tmp_path / "out")[3:]])
    assert process.stdout is not None and process.stdout.readline() == b"loading\n"
    process.send_signal(signal.SIGTERM)
    ran = end(process)
    assert ran.rc == ExitCode.RESUMABLE and "stopped by SIGTERM" in ran.stderr, ran.stderr
    assert "Traceback" not in ran.stderr and not list(tmp_path.glob("out*"))


SLOW = """
import time
from lpsparse.commands import finetune
from lpsparse.cli import main

def slow(*_):
    print("loading", flush=True)
    time.sleep(60)

finetune.opened = slow
main()
"""
