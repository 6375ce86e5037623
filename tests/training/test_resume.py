"""What happens to training jobs: a run that is stopped, killed or damaged goes on to the very same bits."""

import json
import os
import random
import shutil
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import psutil
import pytest
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from support.cli import Ran
from support.files import tree_hash

import lpsparse
from lpsparse import ExitCode, LpsparseError
from lpsparse.checkpoint.files import METRICS, OWNER, STATE
from lpsparse.checkpoint.transaction import _take  # pyright: ignore[reportPrivateUsage]
from lpsparse.commands.finetune import finetune_step
from lpsparse.errors import StateError
from lpsparse.steps.finetune import FinetuneStep
from lpsparse.steps.resolve import resolve
from lpsparse.training import state as state_module

Options = dict[str, Any]
STEPS = 15  # of the run of `faulty`; 5 an epoch


def train(out: Path, given: Options, monkeypatch: pytest.MonkeyPatch, fault: str = "", **more: Any) -> Ran:
    """A fine-tune in this process, with a fault; its exit code and what it said."""
    monkeypatch.setenv("TEST_FAULT", fault)
    said: list[str] = []
    try:
        finetune_step(resolve(FinetuneStep, {**given, "out": out, **more}), said.append)
        return Ran(0, "", "\n".join(said))
    except LpsparseError as error:
        return Ran(int(error.exit_code), error.hint, "\n".join([*said, error.what]))


def states(out: Path) -> list[str]:
    return sorted(path.name for path in (out.with_name(out.name + ".partial") / STATE).glob("*"))


METHODS: dict[str, Options] = {
    "the default": {"target_sparsity": "0.6"},
    "of two parts": {"target_sparsity": "0.6", "accumulate": 2},
    "no target, rows": {},
    "p from 2": {"target_sparsity": "0.6", "p_start": 2.0},
    **{name: {"target_sparsity": "0.6", "method": name} for name in ("gradual", "l1", "dwf", "rigl")},
    **{
        name: {"target_sparsity": "0.6", "condition": name}
        for name in ("rows", "weight-norm", "l1-rows", "spectral", "modular", "denoise")
    },
    **{name: {"target_sparsity": "0.6", "optimizer": name} for name in ("sgd", "adafactor", "muon")},
    "two sets of weights": {
        "target_sparsity": "0.6",
        "optimizer": f"{Path(__file__).with_name('test_own_loops.py')}:Averaging",
    },
    "keep zeros": {"method": "dense", "keep_zeros": True},
    "flips, distilled": {"target_sparsity": "0.6", "augment": "crop-flip", "distill": 0.5},
    "bf16": {"target_sparsity": "0.6", "mixed_precision": "bf16"},
}


@pytest.mark.parametrize("way", METHODS)
def test_a_run_that_was_stopped_ends_in_the_bits_of_one_that_was_not(
    way: str, faulty: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {**faulty, **METHODS[way]}
    assert train(tmp_path / "whole", given, monkeypatch).rc == 0
    parts = given.get("accumulate", 1)
    for at in (1, 4, 5, 6, STEPS) if way == "the default" else (4, 9):  # 6: the cut; 5: the end of an epoch
        out = tmp_path / f"at-{at}"
        stopped = train(out, given, monkeypatch, f"0:{at * parts}:SIGTERM")
        assert stopped.rc == ExitCode.RESUMABLE
        assert f"stopped by SIGTERM after step {at} of {STEPS}" in stopped.stderr
        assert not out.exists() and states(out) == [f"step-{at:08d}"]
        resumed = train(out, given, monkeypatch)
        assert resumed.rc == 0 and f"resuming at step {at} of {STEPS}" in resumed.stderr
        assert tree_hash(out) == tree_hash(tmp_path / "whole")
        assert (out / METRICS).read_bytes() == (tmp_path / "whole" / METRICS).read_bytes()
        assert not out.with_name(f"{out.name}.partial").exists() and not (out / STATE).exists()


def test_a_run_may_be_stopped_many_times(
    faulty: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {**faulty, "target_sparsity": "0.6"}
    train(tmp_path / "whole", given, monkeypatch)
    for _ in range(7):
        assert train(tmp_path / "out", given, monkeypatch, "0:2:SIGUSR1").rc == ExitCode.RESUMABLE
    assert train(tmp_path / "out", given, monkeypatch).rc == 0
    assert tree_hash(tmp_path / "out") == tree_hash(tmp_path / "whole")


def test_a_second_signal_does_not_wait_and_the_state_before_stays(
    faulty: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {**faulty, "target_sparsity": "0.6", "save_every": 3}
    train(tmp_path / "whole", given, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "out", given, monkeypatch, "0:8:SIGTERM+SIGTERM")
    assert states(tmp_path / "out") == ["step-00000003", "step-00000006"]
    assert "resuming at step 6" in train(tmp_path / "out", given, monkeypatch).stderr
    assert tree_hash(tmp_path / "out") == tree_hash(tmp_path / "whole")


def test_ctrl_c_saves_the_state_and_exits_130_with_the_way_on(
    faulty: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = train(tmp_path / "out", faulty, monkeypatch, "0:3:SIGINT")
    assert ran.rc == ExitCode.INTERRUPT and "stopped by SIGINT after step 3" in ran.stderr
    assert "run the same command again" in ran.stdout
    assert train(tmp_path / "out", faulty, monkeypatch).rc == 0


def test_the_time_limit_saves_the_state_and_exits_75(
    faulty: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = train(tmp_path / "out", faulty, monkeypatch, max_time=1e-6)
    assert ran.rc == ExitCode.RESUMABLE and "stopped by --max-time after step 1" in ran.stderr
    assert train(tmp_path / "out", faulty, monkeypatch, max_time=60.0).rc == 0  # of no meaning for the bits


def test_signals_do_what_they_did_before_once_a_run_is_over(
    faulty: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    train(tmp_path / "out", faulty, monkeypatch, "0:3:SIGHUP")
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)] == before


@pytest.mark.parametrize("damage", ["cut off", "a bit", "the record", "no file"])
def test_a_damaged_state_is_passed_over_and_said_and_kept(
    damage: str, faulty: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {**faulty, "save_every": 2}
    train(tmp_path / "whole", given, monkeypatch)
    train(tmp_path / "out", given, monkeypatch, "0:7:SIGTERM")
    newest = tmp_path / "out.partial" / STATE / "step-00000007"
    file = newest / ("state.json" if damage == "the record" else "rank-00000.safetensors")
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw[: len(raw) // 2] if damage == "cut off" else raw)
    if damage == "no file":
        file.unlink()
    ran = train(tmp_path / "out", given, monkeypatch, "0:1:SIGTERM")
    assert f"{newest}: damaged" in ran.stderr and "resuming at step 6" in ran.stderr
    assert train(tmp_path / "out", given, monkeypatch).rc == 0
    assert tree_hash(tmp_path / "out") == tree_hash(tmp_path / "whole")


def test_with_every_state_damaged_the_run_starts_afresh(
    faulty: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path / "whole", faulty, monkeypatch)
    train(tmp_path / "out", faulty, monkeypatch, "0:7:SIGTERM")
    (tmp_path / "out.partial" / STATE / "step-00000007" / "state.json").write_text("{")
    ran = train(tmp_path / "out", faulty, monkeypatch)
    assert ran.rc == 0 and "damaged" in ran.stderr and "resuming" not in ran.stderr
    assert "starting from step 0" in ran.stderr
    assert tree_hash(tmp_path / "out") == tree_hash(tmp_path / "whole")


def test_only_the_last_states_are_kept_and_an_older_one_goes_after_the_new_one_is_whole(
    faulty: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {**faulty, "save_every": 2, "keep_last": 3}
    train(tmp_path / "out", given, monkeypatch, "0:9:SIGTERM")
    assert states(tmp_path / "out") == ["step-00000006", "step-00000008", "step-00000009"]

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state_module, "save_file", full)
    ran = train(tmp_path / "out", given, monkeypatch)
    assert ran.rc == ExitCode.OUTPUT and "No space left on device" in ran.stderr
    whole = [name for name in states(tmp_path / "out") if not name.endswith(".partial")]
    assert whole == ["step-00000006", "step-00000008", "step-00000009"]


def test_a_damaged_newer_state_never_takes_the_place_of_a_whole_one(
    faulty: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {**faulty, "save_every": 2, "keep_last": 2}
    train(tmp_path / "out", given, monkeypatch, "0:9:SIGTERM")
    (tmp_path / "out.partial" / STATE / "step-00000009" / "state.json").write_text("{")
    ran = train(tmp_path / "out", {**given, "keep_last": 1}, monkeypatch, "0:1:SIGTERM")
    assert "resuming at step 8" in ran.stderr
    assert states(tmp_path / "out") == ["step-00000009"]  # written anew, and whole
    assert "resuming at step 9" in train(tmp_path / "out", given, monkeypatch).stderr


def test_a_full_disk_as_safetensors_tells_it_is_an_output_error(
    faulty: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(state_module, "save_file", full)
    ran = train(tmp_path / "out", {**faulty, "save_every": 2}, monkeypatch)
    assert ran.rc == ExitCode.OUTPUT and "No space left on device" in ran.stderr
    assert not list(tmp_path.glob("out*"))


def test_another_command_does_not_delete_the_states_of_a_run(
    faulty: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path / "out", faulty, monkeypatch, "0:3:SIGTERM")
    with pytest.raises(LpsparseError, match="holds the training states of an unfinished run") as caught:
        lpsparse.prune(faulty["model"], tmp_path / "out", sparsity=0.5)
    assert caught.value.exit_code == ExitCode.STATE
    assert "resuming at step 3" in train(tmp_path / "out", faulty, monkeypatch).stderr


@pytest.mark.parametrize("holder", ["a later process of this number", "no mark"])
def test_a_dead_holder_is_told_from_a_living_one(
    holder: str, faulty: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path / "out", faulty, monkeypatch, "0:3:SIGTERM")
    mark = tmp_path / "out.partial" / OWNER
    if holder == "no mark":
        mark.unlink()
    else:
        mark.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": 12.0}))
    assert "resuming at step 3" in train(tmp_path / "out", faulty, monkeypatch).stderr


@pytest.mark.parametrize("left", ["states", "a dead run's", "nothing"])
def test_of_many_that_take_one_out_at_once_one_can(left: str, tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    for _ in range(60):
        shutil.rmtree(partial, ignore_errors=True)
        if left != "nothing":
            (partial / STATE / "step-00000003").mkdir(parents=True)
            (partial / OWNER).write_text(json.dumps({"pid": -1, "host": socket.gethostname()}))
            (partial / "model.safetensors").write_text("half")
        together = Barrier(4)

        def take(together: Barrier) -> int:
            together.wait()
            try:
                _take(partial, "resume" if left == "states" else "drop", "drop")
                return 1
            except StateError:
                return 0

        with ThreadPoolExecutor(4) as pool:
            assert sum(pool.map(take, [together] * 4)) == 1
        assert json.loads((partial / OWNER).read_text())["pid"] == os.getpid()
        assert {path.name for path in partial.iterdir()} == {OWNER, STATE} if left == "states" else {OWNER}


def test_a_living_holder_is_left_alone(
    faulty: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path / "out", faulty, monkeypatch, "0:3:SIGTERM")
    since = psutil.Process().create_time()
    record = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
    (tmp_path / "out.partial" / OWNER).write_text(json.dumps(record))
    ran = train(tmp_path / "out", faulty, monkeypatch)
    assert ran.rc == ExitCode.STATE and f"process {os.getpid()}" in ran.stderr


def test_other_code_of_the_model_is_another_run(
    faulty: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path / "out", faulty, monkeypatch, "0:3:SIGTERM")
    code = Path(str(faulty["model_fn"]).rpartition(":")[0])
    code.write_text(code.read_text().replace("ReLU", "Tanh"))
    ran = train(tmp_path / "out", faulty, monkeypatch)
    assert ran.rc == ExitCode.STATE and "code.model_fn was" in ran.stderr


def test_a_signal_while_a_state_is_written_leaves_it_whole(
    faulty: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = state_module.save_file

    def asked(tensors: Any, path: Any) -> None:
        write(tensors, path)
        if "step-00000004" in str(path):
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(state_module, "save_file", asked)
    ran = train(tmp_path / "out", {**faulty, "save_every": 4}, monkeypatch)
    assert ran.rc == ExitCode.RESUMABLE and states(tmp_path / "out") == ["step-00000004", "step-00000005"]
    monkeypatch.setattr(state_module, "save_file", write)
    assert "damaged" not in train(tmp_path / "out", faulty, monkeypatch).stderr


def test_a_state_of_other_settings_is_refused_with_the_first_differences(
    faulty: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path / "out", faulty, monkeypatch, "0:3:SIGTERM")
    before = tree_hash(tmp_path / "out.partial")
    ran = train(tmp_path / "out", faulty, monkeypatch, lr=0.02, p=0.8, seed=3, clip=2.0)
    assert ran.rc == ExitCode.STATE
    assert "recipe.finetune.clip was 1.0, is 2.0; recipe.finetune.lr was 0.01, is 0.02" in ran.stderr
    assert "and 1 more" in ran.stderr and "--resume never" in ran.stdout
    assert {**tree_hash(tmp_path / "out.partial"), ".lpsparse-owner.json": ""} == {
        **before,
        ".lpsparse-owner.json": "",
    }
    fresh = train(tmp_path / "out", faulty, monkeypatch, lr=0.02, resume="never")
    assert fresh.rc == 0 and "resuming" not in fresh.stderr


def test_a_state_of_other_data_or_another_model_is_refused(
    faulty: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path / "out", faulty, monkeypatch, "0:3:SIGTERM")
    for key, name in (("model", "model"), ("data", "recipe.finetune.data")):
        path = Path(str(faulty[key]))
        raw = path.read_bytes()
        other = path.with_name(f"other{path.suffix}")
        other.write_bytes(raw)
        ran = train(tmp_path / "out", {**faulty, key: str(other)}, monkeypatch)
        assert ran.rc == ExitCode.STATE and name in ran.stderr


@pytest.mark.parametrize(("key", "value"), [("version", 99), ("lpsparse", "9.9"), ("torch", "1.0")])
def test_a_state_of_another_version_is_refused(
    key: str, value: Any, faulty: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path / "out", faulty, monkeypatch, "0:3:SIGTERM")
    path = tmp_path / "out.partial" / STATE / "step-00000003" / "state.json"
    record = json.loads(path.read_text())
    del record["sha256"]
    (record if key == "version" else record["made_by"]["versions"])[key] = value
    record["sha256"] = state_module._digest(record)
    path.write_text(json.dumps(record))
    ran = train(tmp_path / "out", faulty, monkeypatch)
    assert ran.rc == ExitCode.STATE and str(value) in ran.stderr


def test_a_state_of_the_first_release_is_resumed(
    faulty: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path / "out", faulty, monkeypatch, "0:3:SIGTERM")
    path = tmp_path / "out.partial" / STATE / "step-00000003" / "state.json"
    assert json.loads(path.read_text())["made_by"]["versions"]["lpsparse"] == "0.1"  # as 0.1.0 wrote it
    assert train(tmp_path / "out", faulty, monkeypatch).rc == 0


def test_a_state_may_be_named_and_one_that_is_none_is_refused(
    faulty: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path / "whole", faulty, monkeypatch)
    train(tmp_path / "out", {**faulty, "save_every": 4}, monkeypatch, "0:9:SIGTERM")
    earlier = tmp_path / "out.partial" / STATE / "step-00000008"
    ran = train(tmp_path / "second", faulty, monkeypatch, resume=str(earlier))
    assert ran.rc == 0 and "resuming at step 8" in ran.stderr
    assert tree_hash(tmp_path / "second") == tree_hash(tmp_path / "whole")
    stopped = train(tmp_path / "fourth", faulty, monkeypatch, "0:2:SIGTERM", resume=str(earlier))
    assert "with --resume auto" in stopped.stdout
    again = train(tmp_path / "fourth", faulty, monkeypatch, resume=str(earlier))
    assert again.rc == 0 and "resuming at step 10" in again.stderr  # not from the named one once more
    for folder, what in ((tmp_path, "not a complete training state"), (tmp_path / "nver", "no such folder")):
        ran = train(tmp_path / "third", faulty, monkeypatch, resume=str(folder))
        assert ran.rc == ExitCode.STATE and what in ran.stderr and "auto, never or a state" in ran.stdout
    train(tmp_path / "fifth", faulty, monkeypatch, "0:2:SIGTERM")
    ran = train(tmp_path / "third", faulty, monkeypatch, resume=str(tmp_path / "fifth.partial"))
    assert ran.rc == ExitCode.STATE and ran.stdout.endswith("fifth.partial/.lpsparse-state/step-00000002")


def test_nothing_in_a_state_is_ever_run(
    faulty: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path / "out", faulty, monkeypatch, "0:3:SIGTERM")
    folder = tmp_path / "out.partial" / STATE / "step-00000003"
    bomb = b"cos\nsystem\n(S'touch canary'\ntR."
    for name in ("custom_checkpoint_0.pkl", "random_states_0.pkl", "optimizer.bin"):
        (folder / name).write_bytes(bomb)
    monkeypatch.chdir(tmp_path)
    assert train(tmp_path / "out", faulty, monkeypatch).rc == 0
    assert not (tmp_path / "canary").exists()


def test_a_state_that_points_outside_of_its_folder_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"x")
    folder = tmp_path / "step-00000001"
    folder.mkdir()
    record = {"version": 1, "files": {"../secret": state_module._sha256(tmp_path / "secret")}}
    (folder / "state.json").write_text(json.dumps({**record, "sha256": state_module._digest(record)}))
    assert state_module._whole(folder) is None


def test_nan_stops_before_the_step_and_names_the_last_whole_state(
    faulty: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {**faulty, "save_every": 3}
    ran = train(tmp_path / "out", given, monkeypatch, "0:8:nan")
    assert ran.rc == ExitCode.NUMERIC and "step 8 of 15: loss nan" in ran.stderr
    assert "the state of step 6" in ran.stderr and "lower --lr" in ran.stdout
    assert train(tmp_path / "out", given, monkeypatch).rc == 0  # what was bad was outside of the data


@pytest.mark.parametrize("states", [True, False])
def test_out_of_memory_says_the_batch_that_would_fit(
    states: bool, faulty: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {**faulty, "save_every": 3} if states else faulty
    ran = train(tmp_path / "out", given, monkeypatch, "0:4:memory")
    assert ran.rc == ExitCode.RESOURCE and "out of memory at step 4, with 8 examples at a time" in ran.stderr
    assert ran.stdout.startswith("--accumulate 2 ")
    assert ("--resume never" in ran.stdout) == states == (tmp_path / "out.partial").exists()
    ran = train(tmp_path / "two", {**faulty, "accumulate": 8}, monkeypatch, "0:4:memory")
    assert "with 1 examples at a time" in ran.stderr and ran.stdout.startswith("use --checkpointing, a ")
    odd = {**faulty, "accumulate": 2, "batch_size": 3}
    assert train(tmp_path / "three", odd, monkeypatch, "0:4:memory").stdout.startswith(
        "--accumulate 3 uses 1"
    )


def test_steps_that_a_loss_scaler_leaves_out_are_counted(
    faulty: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scaled(_: FinetuneStep) -> Accelerator:
        accelerator = Accelerator(cpu=True)  # which has a scaler on a GPU only
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
        return accelerator

    monkeypatch.setattr("lpsparse.training.build._accelerator", scaled)
    given = {**faulty, "target_sparsity": "0.6"}
    assert train(tmp_path / "whole", given, monkeypatch, "0:2:spike,0:4:spike").rc == 0
    notes = " ".join(json.loads((tmp_path / "whole" / "lpsparse.json").read_text())["notes"])
    assert "; 2 steps left out, whose gradients overflowed in fp16" in notes
    train(tmp_path / "out", given, monkeypatch, "0:2:spike,0:4:spike,0:9:SIGTERM")
    assert train(tmp_path / "out", given, monkeypatch).rc == 0
    assert tree_hash(tmp_path / "out") == tree_hash(tmp_path / "whole")


def test_a_spike_of_the_loss_is_said(
    faulty: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = train(tmp_path / "out", {**faulty, "epochs": 6}, monkeypatch, "0:25:spike")
    assert "step 25: loss" in ran.stderr and "times the usual" in ran.stderr
    assert "times the usual" not in train(tmp_path / "calm", {**faulty, "epochs": 6}, monkeypatch).stderr


def test_a_run_without_states_leaves_nothing_when_it_fails(
    faulty: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(tmp_path / "out", faulty, monkeypatch, "0:8:nan").rc == ExitCode.NUMERIC
    assert not list(tmp_path.glob("out*"))


def test_twenty_kills_at_any_moment_lose_nothing(
    faulty: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {**faulty, "target_sparsity": "0.6", "save_every": 1, "epochs": 20}
    train(tmp_path / "whole", given, monkeypatch)
    draw, out, kills = random.Random(7), tmp_path / "out", 0
    for _ in range(60):
        pid = os.fork()
        if pid == 0:  # imports are paid for: a run is a second
            try:
                os._exit(train(out, given, monkeypatch).rc)
            finally:
                os._exit(99)
        time.sleep(draw.uniform(0.02, 0.4))
        if os.waitpid(pid, os.WNOHANG) == (0, 0):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            kills += 1
        if kills == 20:
            break
    if not out.exists():
        assert train(out, given, monkeypatch).rc == 0
    assert kills == 20 or out.exists()
    assert tree_hash(out) == tree_hash(tmp_path / "whole")
    assert lpsparse.verify(out)["ok"]
