"""`push` through huggingface_hub's own client, to a hub of ours that keeps commits and LFS objects."""

import json
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.cli import LISTENING, Ran, cli_environment, run_cli
from support.files import write_shards, write_tiny
from support.hub import TOKEN, Hub

from lpsparse import ExitCode, LpsparseError, pack, prune, push, verify
from lpsparse.errors import TerminatedError

Cli = Callable[..., Ran]


@pytest.fixture
def sparse(tmp_path: Path) -> Path:
    prune(write_shards(tmp_path / "dense"), tmp_path / "sparse", sparsity=0.5)
    return tmp_path / "sparse"


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def refused(folder: Path, code: str, exit_code: int, **options: Any) -> LpsparseError:
    with pytest.raises(LpsparseError) as error:
        push(folder, "org/name", **options)
    assert (error.value.code, error.value.exit_code) == (code, exit_code), error.value.what
    assert TOKEN not in error.value.what + error.value.hint and error.value.hint
    return error.value


# What goes out


def test_a_new_repository_gets_all_files_in_one_commit_and_opens_from_there(
    hub: Hub, sparse: Path, cli: Cli
) -> None:
    ran = cli("push", sparse, "org/name", "--private", "--message", "half of it")
    repo = hub.repos["org/name"]
    assert ran.rc == 0, ran.stderr
    assert ran.stdout == f"{hub.address}/org/name/commit/{repo.heads['main']}\n"
    assert repo.private and [told["summary"] for told in repo.told] == ["half of it"]
    rules = {".gitattributes": b"*.safetensors filter=lfs\n"}  # the hub's own stay
    assert repo.files() == contents(sparse) | rules
    said = ran.stderr
    assert "private" in said and "11 files" in said and "a remark" in said
    assert TOKEN not in said and "content=" not in said
    assert "sending 3 of 3 weight files: model-00003-of-00003.safetensors" in said
    found = json.loads(cli("inspect", "org/name", "--json").stdout)
    assert found["revision"] == repo.heads["main"] and len(found["tensors"]) == 11
    snapshot = next((sparse.parent / "cache").rglob("lpsparse.json")).parent
    assert verify(snapshot)["ok"]


def test_json_names_the_commit_and_quiet_says_nothing_else(hub: Hub, sparse: Path, cli: Cli) -> None:
    ran = cli("push", sparse, "org/name", "--json", "--quiet")
    found = json.loads(ran.stdout)
    files = contents(sparse)
    assert (found["files"], found["bytes"]) == (len(files), sum(map(len, files.values())))
    assert found["commit"] == hub.repos["org/name"].heads["main"] and found["url"].endswith(found["commit"])
    assert found["new"] and found["changed"] and ran.stderr == ""


def test_what_has_arrived_is_not_sent_twice_and_nothing_new_is_no_commit(hub: Hub, sparse: Path) -> None:
    hub.fails["/commit/"] = 503
    assert "503" in refused(sparse, "LPS807", ExitCode.REMOTE).what
    assert len(hub.objects) == 3 and len(hub.repos["org/name"].commits) == 1
    hub.fails.clear()
    hub.asked.clear()
    first = push(sparse, "org/name")
    assert first["changed"] and not [asked for asked in hub.asked if "/lfs/" in asked and "PUT" in asked]
    again = push(sparse, "org/name")
    assert not again["changed"] and again["commit"] == first["commit"]


def test_a_branch_and_a_pull_request_leave_main_as_it_is(hub: Hub, sparse: Path, cli: Cli) -> None:
    repo = hub.put()
    main = repo.heads["main"]
    packed = sparse.parent / "packed"
    pack(sparse, packed)
    assert "branch of/mine" in cli("push", packed, "org/name", "--revision", "of/mine").stderr
    assert "lpsparse.safetensors.index.json" in (repo.files("of/mine") or {})
    ran = cli("push", sparse, "org/name", "--create-pr")
    assert (ran.rc, ran.stdout) == (0, f"{hub.address}/org/name/discussions/7\n"), ran.stderr
    assert "lpsparse.json" in (repo.files("refs/pr/7") or {}) and repo.heads["main"] == main


def test_hidden_files_metrics_and_marks_stay_and_the_rest_still_verifies(hub: Hub, tmp_path: Path) -> None:
    dense = write_tiny(tmp_path / "dense")
    (dense / ".env").write_text(f"HF_TOKEN={TOKEN}")
    (dense / ".gitattributes").write_text("*.bin filter=lfs\n")
    prune(dense, tmp_path / "out", sparsity=0.5)
    assert not (tmp_path / "out" / ".env").exists()
    (tmp_path / "out" / ".env").write_text(f"HF_TOKEN={TOKEN}")
    for name in (".git/config", ".lpsparse-owner.json", "metrics.jsonl", ".lpsparse-state/step-3/a.json"):
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).touch()
    said: list[str] = []
    from lpsparse.commands.push import push_step
    from lpsparse.steps.push import PushStep

    push_step(PushStep(folder=tmp_path / "out", repo="org/name"), said.append)
    files = hub.repos["org/name"].files() or {}
    assert {name for name in files if name[0] == "."} == {".gitattributes"} and "metrics.jsonl" not in files
    assert files[".gitattributes"] == b"*.bin filter=lfs\n"
    assert any(".env" in line and line.startswith("not sent: ") for line in said)
    for name, data in files.items():
        (tmp_path / "pulled" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pulled" / name).write_bytes(data)
    found = verify(tmp_path / "pulled")
    assert found["ok"] and found["files"] == len(files) - 1  # the manifest is not in itself


def test_a_dry_run_lists_all_and_asks_nobody(hub: Hub, sparse: Path, cli: Cli) -> None:
    ran = cli("push", sparse, "org/name", "--dry-run", "--json")
    files = {each["name"]: each["bytes"] for each in json.loads(ran.stdout)["names"]}
    assert files == {name: len(data) for name, data in contents(sparse).items()}
    assert "lpsparse.json" in cli("push", sparse, "org/name", "--dry-run").stdout and hub.asked == []


# What is there already


def test_weights_that_a_loader_may_take_are_refused_or_deleted_in_the_same_commit(
    hub: Hub, sparse: Path
) -> None:
    repo = hub.put({"model.safetensors": b"old", "onnx/model.onnx": b"old", "plot.png": b"p"})
    head = repo.heads["main"]
    error = refused(sparse, "LPS413", ExitCode.OUTPUT)
    assert "model.safetensors, onnx/model.onnx" in error.what and "plot" not in error.what
    assert repo.heads["main"] == head and hub.writes() == []
    found = push(sparse, "org/name", delete_others=True)
    assert found["deleted"] == ["model.safetensors", "onnx/model.onnx", "plot.png"]
    assert set(repo.files() or {}) == {".gitattributes", *contents(sparse)}
    assert len(repo.told) == 1 and repo.told[0]["parentCommit"] == head


def test_other_files_stay_and_are_named(hub: Hub, sparse: Path, cli: Cli) -> None:
    repo = hub.put({"plot.png": b"p"})
    ran = cli("push", sparse, "org/name")
    assert ran.rc == 0 and "keeps 1 files" in ran.stderr and "plot.png" in ran.stderr
    assert "plot.png" in (repo.files() or {})


def test_a_private_push_to_a_public_repository_is_refused(hub: Hub, sparse: Path) -> None:
    hub.put()
    refused(sparse, "LPS414", ExitCode.OUTPUT, private=True)
    assert hub.writes() == []
    hub.put(private=True)
    assert push(sparse, "org/name", private=True)["private"]


def test_a_commit_of_another_meanwhile_is_not_written_over(hub: Hub, sparse: Path) -> None:
    repo = hub.put()
    hub.on = lambda path: "batch" in path and repo.add("main", {"theirs": b""}) and None
    error = refused(sparse, "LPS807", ExitCode.REMOTE)
    assert "412" in error.what and "no commit was made" in error.what and repo.files() == {"theirs": b""}


@pytest.mark.parametrize("name", ["config.json", "model-00002-of-00003.safetensors"])
def test_a_hub_that_keeps_other_bytes_is_found_out(name: str, hub: Hub, sparse: Path) -> None:
    hub.spoil = name
    assert f": {name}: " in refused(sparse, "LPS810", ExitCode.REMOTE).what


# What goes wrong


def test_a_folder_that_is_not_ours_or_is_damaged_is_refused_before_anything_goes_out(
    hub: Hub, sparse: Path, tmp_path: Path, cli: Cli
) -> None:
    refused(tmp_path / "gone", "LPS327", ExitCode.INPUT)
    refused(tmp_path / "dense", "LPS350", ExitCode.INPUT)
    shutil.copy(sparse / "config.json", sparse / "new.py")
    assert "new.py" in refused(sparse, "LPS102", ExitCode.VERDICT).what
    ran = cli("push", sparse, "org/name", "--dry-run")
    assert ran.rc == ExitCode.VERDICT and ran.stdout == "" and hub.asked == []


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("name", "your user name goes before it"),
        ("org/name@x", "--revision"),
        ("a/b/c", "not org/name"),
        ("org/na--me", "not org/name"),
        ("org/x.git", "not org/name"),
        ("-x/y", "no such option"),
        ("org/n --revision " + "a" * 40, "a commit"),
        ("org/n --revision x --create-pr", "leave --revision"),
        ("org/n --revision ../x", "not the name of a branch"),
        ("https://hf.co/a/b", "not org/name"),
    ],
)
def test_a_bad_name_is_a_usage_error(words: str, named: str, tmp_path: Path, cli: Cli) -> None:
    ran = cli("push", tmp_path, *words.split())
    assert ran.rc == ExitCode.USAGE and named in ran.stderr and ran.stderr.count("\n") == 2


@pytest.mark.parametrize(
    ("words", "how", "hint"),
    [
        ("/api/models/org/name", 401, "hf auth login"),
        ("/api/repos/create", 403, "a name of your own"),
        ("/api/repos/create", 409, "look at it"),
        ("preupload", 403, "a name of your own"),
        ("preupload", 503, "not sent twice"),
        ("batch", 429, "not sent twice"),
        ("/lfs/", 403, "may write"),
        ("/commit/", 413, "limits"),
        ("/commit/", 500, "not sent twice"),
        ("validate-yaml", 502, ""),
        ("/tree/", 500, "not sent twice"),
        ("/api/models/org/name", 403, "a token"),
    ],
)
def test_an_answer_of_the_hub_is_two_lines_with_its_own_hint(
    words: str, how: int, hint: str, hub: Hub, sparse: Path, cli: Cli
) -> None:
    hub.fails[words] = how
    ran = cli("push", sparse, "org/name", "--quiet")
    assert (ran.rc, ran.stdout) == (ExitCode.REMOTE, "") and ran.stderr.count("\n") == 2, ran.stderr
    error, advice = ran.stderr.splitlines()
    assert (str(how) in error or not hint) and hint in advice and TOKEN not in ran.stderr
    assert ("no commit was made" in error) == (
        words != "/tree/" and (words, how) != ("/commit/", 500) and words != "validate-yaml"
    )
    assert words != "/tree/" or "is not verified" in error


@pytest.mark.parametrize("words", ["/api/models/org/name", "/api/repos", "preupload", "/lfs/", "/commit/"])
def test_a_connection_that_is_lost_exits_8(words: str, hub: Hub, sparse: Path) -> None:
    hub.fails[words] = "leaves"
    error = refused(sparse, "LPS808", ExitCode.REMOTE)
    assert ("is not known" in error.what) == (words == "/commit/") and "not sent twice" in error.hint


def test_no_token_a_wrong_one_and_offline_exit_8(
    hub: Hub, sparse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    assert "401" in refused(sparse, "LPS807", ExitCode.REMOTE).what and hub.writes() == []
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    hub.asked.clear()
    unknown = refused(sparse, "LPS805", ExitCode.REMOTE)
    assert "hf auth login" in unknown.hint
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refused(sparse, "LPS804", ExitCode.REMOTE).what and hub.asked == []


def test_a_process_of_its_own_takes_address_and_token_from_the_environment(hub: Hub, sparse: Path) -> None:
    env: dict[str, str | None] = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": None, "HF_TOKEN": TOKEN}
    env |= {"HF_HUB_DISABLE_XET": "1", "HF_HOME": str(sparse.parent / "hf")}
    ran = run_cli(["push", sparse, "org/name"], **env)
    assert ran.rc == 0 and ran.stdout.startswith(hub.address), ran.stderr
    assert "\r" not in ran.stderr and "%" not in ran.stderr  # no bars where there is no terminal
    assert cli_environment()["HF_HUB_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE" in run_cli(["push", sparse, "org/name"]).stderr


@pytest.mark.parametrize(
    ("words", "raised", "rc"), [("/lfs/", KeyboardInterrupt, 130), ("/commit/", TerminatedError, 75)]
)
def test_a_push_that_is_stopped_says_what_is_to_be_seen(
    words: str, raised: type[BaseException], rc: int, hub: Hub, sparse: Path
) -> None:
    def asked(path: str) -> None:
        if words in path:
            signal.raise_signal(signal.SIGINT)

    def stop(*_: Any) -> None:
        raise raised

    before = signal.signal(signal.SIGINT, stop)
    try:
        hub.on = asked
        error = refused(sparse, "LPS755" if rc == 130 else "LPS754", rc)
    finally:
        signal.signal(signal.SIGINT, before)
    assert ("no commit was made" in error.what) == (rc == 130) and "not sent twice" in error.hint


def test_ctrl_c_is_heard_while_the_client_of_xet_waits(hub: Hub, sparse: Path) -> None:
    pytest.importorskip("hf_xet")
    hub.fails["xet-write-token"] = "leaves"
    waits = threading.Event()
    hub.on = lambda path: waits.set() if "xet-write-token" in path else None
    env = cli_environment(
        HF_ENDPOINT=hub.address, HF_HUB_OFFLINE=None, HF_TOKEN=TOKEN, HF_HOME=str(sparse.parent / "hf")
    )
    words = [sys.executable, "-c", LISTENING, "push", str(sparse), "org/name"]
    with subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert waits.wait(60)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    assert process.returncode == ExitCode.INTERRUPT and b"no commit was made" in said
