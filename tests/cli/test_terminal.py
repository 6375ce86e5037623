"""The person at the terminal: explain, help, doctor, panels, Ctrl-C, and terminals of all kinds."""

import ast
import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.cli import LISTENING, Ran, cli_environment, run_cli
from support.files import ROOT, tree_hash
from support.models import SMALL
from support.reports import bare, tensors

import lpsparse
from lpsparse import ExitCode, errors
from lpsparse.cli.help import exits_of, read_texts, read_topics
from lpsparse.commands import doctor
from lpsparse.errors import LpsparseError
from lpsparse.parallel import launcher
from lpsparse.reporting.records import Budget
from lpsparse.reporting.table import render
from lpsparse.reporting.text import columns, fitted
from lpsparse.steps.base import about
from lpsparse.steps.table import COMMANDS, PANELS, step_of

Cli = Callable[..., Ran]


# explain


def raised() -> Iterator[tuple[int, str]]:
    """Number and class of every error of ours in the package, and of what the command line says itself."""
    for path in (ROOT / "lpsparse").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            kinds = re.findall(r"\b\w+Error\b|\b_say_error\b|super\(\).__init__", ast.unparse(node.func))
            first = ast.unparse(node.args[0])
            named = re.search(rf"^{re.escape(first)} = ([0-9]{{3}})\b", text, re.M)  # a constant beside it
            number = re.fullmatch("(?:'LPS)?([0-9]{3})'?", first) or named
            if number is not None:
                yield from ((int(number[1]), kind) for kind in kinds)


def test_every_code_that_can_be_raised_is_explained_and_no_other() -> None:
    numbers = {number for number, _ in raised()}
    assert len(numbers) > 150
    assert numbers == set(read_texts())


def test_an_error_ends_with_the_exit_code_that_explain_says() -> None:
    for number, kind in raised():
        error = getattr(errors, kind, None)
        if error is not None:
            assert issubclass(error, LpsparseError) and error.exit_code in exits_of(number), number


def test_an_explanation_is_a_title_and_a_few_sentences() -> None:
    for number, text in read_texts().items():
        title, *rest = re.split(r"\.(?: |$)", text)
        assert len(title) <= 80 and text.endswith(".") and len(rest) <= 6, number


@pytest.mark.parametrize("code", ["LPS312", "lps312", "312"])
def test_explain_takes_a_code_as_it_is_typed(code: str, cli: Cli) -> None:
    ran = cli("explain", code)
    assert ran.rc == 0 and ran.stdout.startswith("LPS312: Tensors overlap") and "exit code 3" in ran.stdout
    found = json.loads(cli("explain", code, "--json").stdout)
    assert (found["code"], found["exits"]) == ("LPS312", [{"exit_code": 3, "name": "input"}])


def test_explain_alone_lists_them_all(cli: Cli) -> None:
    listed = re.findall(r"^  LPS([0-9]{3})  \S", cli("explain").stdout, re.M)
    assert sorted(map(int, listed)) == sorted(read_texts())
    assert len(json.loads(cli("explain", "--json").stdout)["codes"]) == len(listed)


@pytest.mark.parametrize(("code", "words"), [("LPS999", "LPS810"), ("31x", "LPS312"), ("\x1b[2J", "LPS312")])
def test_what_is_no_code_is_refused_with_the_nearest(code: str, words: str, cli: Cli) -> None:
    ran = cli("explain", code)
    assert (ran.rc, ran.stdout) == (2, "") and words in ran.stderr and "\x1b" not in ran.stderr


# help


def test_help_lists_its_topics_and_shows_each(cli: Cli) -> None:
    listed = cli("help").stdout
    for topic, text in read_topics().items():
        assert f"lpsparse help {topic}" in listed
        assert " ".join(cli("help", topic).stdout.split()) == " ".join(text.split())


@pytest.mark.parametrize("command", ["prune", "report", "doctor"])
def test_help_of_a_command_is_that_commands_help(command: str, cli: Cli) -> None:
    assert cli("help", command) == cli(command, "--help")


def test_an_unknown_topic_names_the_nearest(cli: Cli) -> None:
    ran = cli("help", "exitcodes")
    assert ran.rc == 2 and "LPS219" in ran.stderr and "did you mean exit-codes?" in ran.stderr


def test_every_variable_of_ours_that_help_names_is_one(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    named = set(re.findall(r"LPSPARSE_[A-Z_]+", read_topics()["environment"])) - {"LPSPARSE_NAME"}
    for name in named:
        monkeypatch.setenv(name, "1")
    assert len(named) > 3 and cli("--version").rc == 0


def test_options_are_shown_in_panels(cli: Cli) -> None:
    text = cli("finetune", "--help").stdout
    headings = re.findall(r"^(\w+):$", text, re.M)
    assert headings[1:] == [
        "Input",
        "Method",
        "Selection",
        "Training",
        "Hardware",
        "Output",
        "Reporting",
        "Other",
    ]
    method = text.partition("\nMethod:")[2].partition("\nTraining:")[0]
    assert "--distill NUMBER" in method and "--workers" not in method
    assert not re.search(r"--[a-z]+-\n", text)  # a flag in two pieces


@pytest.mark.parametrize("name", [name for name, command in COMMANDS.items() if command.step])
def test_every_setting_has_a_panel(name: str) -> None:
    assert {known.panel for known in about(step_of(name)).values()} <= {*PANELS}


# What was meant


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("prune tiny out --layout paked", "did you mean packed?"),
        ("pack tiny out --level mx", "did you mean max?"),
        ("inspect tinny", "did you mean tiny?"),
        ("inspect tiny/model.safetensor", "did you mean tiny/model.safetensors?"),
        ("inspect tny/extra", "did you mean tiny/extra?"),
        ("prune tiny out --bogus 1", "see `lpsparse prune --help`"),
        ("prune tiny out --block 3", "see `lpsparse prune --help`"),
        ("Prune tiny out", "did you mean prune"),
        ("report tiny --json --quiet", "--json report.json --quiet"),
    ],
)
def test_an_error_says_what_could_be_meant(
    words: str, meant: str, tiny: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny.parent)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    ran = cli(*words.split())
    assert ran.rc in (2, 3, 8) and meant in ran.stderr.splitlines()[1]
    assert sorted(os.listdir()) == ["tiny"]


def test_what_is_no_weights_is_never_suggested(tiny: Path, cli: Cli) -> None:
    (tiny / "model.safetensors").unlink()
    (tiny / "lpsparse.json").write_text("{}")
    said = cli("inspect", tiny / "lpsparse.safetensors").stderr
    assert "LPS327" in said and "lpsparse.json" not in said


@pytest.mark.parametrize("command", ["inspect", "report", "verify", "run"])
def test_json_and_quiet_can_be_set_for_all(
    command: str, tiny: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    lpsparse.prune(tiny, tiny.parent / "made", sparsity=0.5)
    (tiny.parent / "r.yaml").write_text(f"model: {tiny.parent / 'made'}\nsteps: [verify: {{}}]")
    monkeypatch.setenv("LPSPARSE_JSON", "1")
    monkeypatch.setenv("LPSPARSE_QUIET", "yes")
    ran = cli(command, tiny.parent / ("r.yaml" if command == "run" else "made"))
    assert isinstance(json.loads(ran.stdout), dict) and ran.stderr == ""
    monkeypatch.setenv("LPSPARSE_JSON", "maybe")
    assert "LPSPARSE_JSON 'maybe'" in cli(command, "x").stderr


# doctor


@pytest.mark.parametrize(
    ("found", "least", "end", "good"),
    [
        ("2.10", "2.10", "2.14", True),
        ("2.9.1", "2.10", "2.14", False),
        ("2.13.1+cpu", "2.10", "2.14", True),
        ("2.14.0.dev20261001", "2.10", "2.14", False),
        ("0.8.0rc0", "0.8", "", False),
        ("0.8.1", "0.8", "", True),
        ("0.8.0-rc.1", "0.8.1", "", False),
        ("6.0", "5.21", "6", False),
        ("not installed", "2", "", False),
        ("2.0.0", "2", "", True),
    ],
)
def test_a_version_is_good_from_its_floor_on(found: str, least: str, end: str, good: bool) -> None:
    assert doctor.is_good(found, least, end) is good


def test_doctor_wants_the_versions_that_pip_does() -> None:
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    ours = {f"{name}>={least}{f',<{end}' if end else ''}" for name, (least, end) in doctor.FLOORS.items()}
    assert ours <= set(wanted)


@pytest.mark.slow
def test_doctor_finds_this_machine_fit_and_leaves_nothing(tmp_path: Path) -> None:
    env = {"HF_TOKEN": "hf_secretsecret", "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    ran = run_cli(["doctor", tmp_path], **env)
    assert not re.search("^fail .* (gloo|rename|fsync|torch|gpu) ", ran.stdout, re.M), ran.stdout
    assert re.search(r"^ok +gloo +two processes met", ran.stdout, re.M) and "token" in ran.stdout
    assert re.search(r"^ok +packed +transformers opens .* tensor by tensor", ran.stdout, re.M), ran.stdout
    assert re.search(r"^(ok|warn) +bf16 ", ran.stdout, re.M)
    assert "secret" not in ran.stdout + ran.stderr and str(tmp_path) not in ran.stdout
    assert list(tmp_path.iterdir()) == []


def test_doctor_says_what_fails_with_a_hint_and_a_code(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcuda is broken')")  # found before the real one
    ran = run_cli(["doctor", tmp_path / "gone", "--json"], PYTHONPATH=f"{ROOT}{os.pathsep}{tmp_path}")
    found = json.loads(ran.stdout)
    failed = {check["name"]: check for check in found["checks"] if check["status"] == "fail"}
    assert (ran.rc, found["exit_code"], found["ok"]) == (6, 6, False)
    assert "libcuda is broken" in failed["torch"]["found"] and "No such file" in failed["folder"]["found"]
    assert all(check["hint"] for check in failed.values())


UNREAD = "import lpsparse.integrations.loader as loader\ndel loader.LazyTensor.__getitem__\n"


@pytest.mark.parametrize(
    ("before", "status", "found"),
    [(UNREAD, "warn", "into memory"), ("raise ImportError('broken')\n", "fail", "broken")],
)
def test_doctor_says_how_a_packed_model_opens(
    before: str, status: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_OPEN", before + doctor._OPEN)
    check = doctor._opens()
    assert check["status"] == status and found in check["found"] and check["hint"]


def test_the_disk_is_tried_in_a_folder_that_goes_again(tmp_path: Path) -> None:
    checks = {check["name"]: check for check in doctor._disk(tmp_path)}
    assert set(checks) == {"folder", "rename", "exchange", "fsync", "lock"}
    assert checks["rename"]["status"] == checks["fsync"]["status"] == "ok"
    assert list(tmp_path.iterdir()) == []


def test_doctor_is_a_function_too() -> None:
    assert lpsparse.doctor is doctor.doctor


# Ctrl-C


STOPPED = """
import os, signal, sys, threading

import lpsparse
signal.signal(signal.SIGINT, signal.default_int_handler)  # a runner in the background has it switched off
threading.Timer(float(sys.argv.pop(1)), os.kill, (os.getpid(), signal.SIGINT)).start()
from lpsparse.cli import main
main()
"""


@pytest.mark.parametrize("command", ["report tiny", "prune tiny out --sparsity 0.5", "--help"])
def test_ctrl_c_at_any_moment_is_one_line(command: str, tiny: Path) -> None:
    said: list[bytes] = []
    for delay in (0.05, 0.1, 0.15, 0.2, 0.3, 0.4):
        words = [sys.executable, "-c", STOPPED, str(delay), *command.split(), "--overwrite", "--quiet"]
        words = words if "prune" in command else words[:-2]
        done = subprocess.run(words, cwd=tiny.parent, env=cli_environment(), capture_output=True, timeout=60)
        said += [line for line in done.stderr.splitlines() if line]
        # It may be over by then; one that is leaving already is ended by the signal itself.
        assert done.returncode in (0, 130, -signal.SIGINT), done.stderr
    assert command == "--help" or said  # which may be over before
    assert all(line.startswith(b"interrupted: ") for line in said)
    assert set(os.listdir(tiny.parent)) <= {"tiny", "out"}


SLOW = """
import signal, time
from lpsparse.checkpoint import transaction
from lpsparse.cli import main
remove = transaction.remove_ours
def slowly(*given):
    print("cleaning", flush=True)
    time.sleep(60)
    remove(*given)
transaction.remove_ours = slowly
def stops(*given, **options):
    signal.raise_signal(signal.SIGINT)
transaction._exchange = stops
main(["prune", "tiny", "out", "--sparsity", "0.5"])
"""


def test_a_second_ctrl_c_does_not_wait_for_the_clean_up(tiny: Path) -> None:
    before = tree_hash(tiny)
    with subprocess.Popen(
        [sys.executable, "-c", SLOW],
        cwd=tiny.parent,
        env=cli_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"cleaning\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and b"OUT.partial may be left" in err and b"Traceback" not in err
    assert tree_hash(tiny) == before and sorted(os.listdir(tiny.parent)) == ["out.partial", "tiny"]
    assert run_cli(["prune", "tiny", "out", "--sparsity", "0.5"], cwd=tiny.parent).rc == 0
    assert sorted(os.listdir(tiny.parent)) == ["out", "tiny"]


# Terminals of all kinds

COMMANDS = ["--help", "inspect tiny", "report tiny", "prune tiny o --below 1 --dry-run", "explain", "help"]
POOR = {
    "one column": {"COLUMNS": "1", "TERM": "dumb", "HOME": None, "LC_ALL": "C", "PYTHONUTF8": "0"},
    "a home of others": {"COLUMNS": "20", "NO_COLOR": "1", "TERM": None, "HOME": "/proc"},
}


@pytest.mark.parametrize("env", POOR.values(), ids=POOR.keys())
@pytest.mark.parametrize("command", COMMANDS)
def test_a_poor_terminal_gets_plain_text(command: str, env: dict[str, str | None], tiny: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lpsparse", *command.split()],
        cwd=tiny.parent,
        env=cli_environment(**env),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        start_new_session=True,
        timeout=60,
    )
    assert done.returncode == 0 and done.stdout and b"Traceback" not in done.stderr
    assert not re.search(rb"[\x00-\x09\x0b-\x1f]", done.stdout + done.stderr)


@pytest.mark.parametrize("closed", ["| head -1", ">&-", "2>&-", ">&- 2>&-", "<&-"])
@pytest.mark.parametrize("command", ["--help", "explain", "prune tiny out --sparsity 0.5 --dry-run"])
def test_a_stream_that_is_closed_is_no_error(command: str, closed: str, tiny: Path) -> None:
    shell = f"set -o pipefail; {sys.executable} -m lpsparse {command} {closed}"
    done = subprocess.run(["bash", "-c", shell], cwd=tiny.parent, env=cli_environment(), capture_output=True)
    assert done.returncode == 0 and b"Traceback" not in done.stderr and b"error[" not in done.stderr


@pytest.mark.parametrize("width", [1, 20, 40, 80])
@pytest.mark.parametrize("command", ["inspect", "report", "verify"])
def test_no_word_is_broken_and_no_line_too_long(
    command: str, width: int, tiny: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    lpsparse.prune(tiny, tiny.parent / "made", sparsity=0.5)
    monkeypatch.chdir(tiny.parent)
    monkeypatch.setenv("COLUMNS", "200")
    wide = cli(command, "made").stdout
    monkeypatch.setenv("COLUMNS", str(width))
    narrow = cli(command, "made").stdout
    words = {word for word in narrow.split() if "\u2026" not in word}
    assert {word.removesuffix(":") for word in words} <= {word.removesuffix(":") for word in wide.split()}
    longest = max(map(len, words), default=0)
    assert all(len(line) <= max(width, longest + 4) for line in narrow.splitlines())


@pytest.mark.parametrize("width", [20, 40, 60])
@pytest.mark.parametrize(
    "command", ["", "finetune", "prune", "pack", "report", "push", "run", "sweep", "recipe check"]
)
def test_help_fits_the_terminal(command: str, width: int, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    lines = cli(*command.split(), "--help").stdout.splitlines()
    long = [line for line in lines if len(line) > width and " " in line.strip().removesuffix(" \\")]
    assert len(lines) > 10 and not long  # a word that is longer than the line stays whole


def test_an_example_in_a_narrow_terminal_is_what_a_shell_makes_one_command_of(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = cli("push", "--help").stdout
    monkeypatch.setenv("COLUMNS", "40")
    narrow = cli("push", "--help").stdout
    assert "\\\n" in narrow and max(map(len, narrow.splitlines())) <= 40
    joined = re.sub(r" \\\n +", " ", narrow)
    commands = re.findall("^    lpsparse .*$", wide, re.M)
    assert len(commands) == 4 and all(f"\n{command}\n" in joined for command in commands)


def test_columns_are_left_out_before_names_are_cut_beyond_telling() -> None:
    name = "encoder.layer.11.attention.output.dense.weight"
    head, body = ("tensor", "dtype", "weights", "zero", ""), [(name, "F32", "1,000", "50.0 %", "prunable")]
    found = {width: columns(head, body, width) for width in (80, 60, 40, 20)}
    assert found[80][1].split() == [name, *body[0][1:3], "50.0", "%", "prunable"]
    assert "F32" not in found[60][1] and found[60][1].startswith("encoder.layer.1")
    assert found[40][0].split() == ["tensor", "zero"] and len(found[40][1].split()[0]) == 32
    assert found[20][0] == "tensor:" and found[20][2:] == [
        "  dtype    F32",
        "  weights  1,000",
        "  zero     50.0 %",
        "  prunable",
    ]
    assert all(len(line) <= width for width, lines in found.items() for line in lines)


def test_a_line_is_broken_between_words_and_goes_on_indented() -> None:
    assert fitted("  a bb --long-flag c", 8) == "  a bb\n    --long-flag\n    c"
    assert fitted("as it is\n\n  and here", 10) == "as it is\n\n  and here"


# Completion


@pytest.mark.parametrize(
    ("words", "at", "wanted"),
    [
        ("lpsparse pru", 1, "prune"),
        ("lpsparse prune a b --spar", 4, "--sparsity"),
        ("lpsparse prune a b --layout p", 5, "packed"),
        ("lpsparse expl", 1, "explain"),
    ],
)
def test_a_shell_completes_commands_flags_and_choices(words: str, at: int, wanted: str) -> None:
    ran = run_cli([], _LPSPARSE_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=str(at))
    assert (ran.rc, ran.stdout.split(), ran.stderr) == (0, [wanted], "")


def test_the_script_for_a_shell_is_shown_and_installed_by_nobody_unasked(tmp_path: Path) -> None:
    shell = f"{sys.executable} -m lpsparse --show-completion; true"  # the shell is found by its process
    done = subprocess.run(
        ["bash", "-c", shell], env=cli_environment(HOME=str(tmp_path)), capture_output=True, text=True
    )
    assert "_LPSPARSE_COMPLETE=complete_bash" in done.stdout and list(tmp_path.iterdir()) == []


# Several processes


def test_the_launcher_leaves_no_handler_behind_that_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.elastic.multiprocessing import SignalException

    def elastic(*_: object) -> Callable[..., None]:
        def interrupted(*_: str) -> None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            raise SignalException("got a signal", signal.SIGINT)

        return interrupted

    monkeypatch.setattr(launcher, "borrow", lambda _: elastic)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(errors.LaunchError) as raised:
        launcher.launch(2, ["finetune"])
    assert raised.value.exit_code == ExitCode.INTERRUPT and signal.getsignal(signal.SIGINT) == before


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_in_several_processes_ends_all_of_them(times: int, tmp_path: Path) -> None:
    words = ["finetune", "bundled:stories260k", str(tmp_path / "out"), "--processes", "2", "--epochs", "50"]
    words += [f"{flag}={SMALL[name]}" for flag, name in (("--task", "task"), ("--data", "data"))]
    with subprocess.Popen(
        [sys.executable, "-c", LISTENING, *words],
        env=cli_environment(),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        metrics = tmp_path / "out.partial" / "metrics.jsonl"
        while not metrics.exists() and process.poll() is None:
            time.sleep(0.1)
        for _ in range(times):
            os.killpg(process.pid, signal.SIGINT)
            time.sleep(0.05)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and b"Traceback" not in err
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


# How much is said


def test_verbose_says_in_full_what_else_is_folded_to_a_line(tiny: Path, cli: Cli, tmp_path: Path) -> None:
    short = cli("prune", tiny, tmp_path / "a", "--sparsity", "0.5").stderr
    assert "4 tensors can be pruned. Kept dense: " in short and "embed_tokens.weight" not in short
    assert "embed_tokens.weight" in cli("prune", tiny, tmp_path / "b", "--sparsity", "0.5", "-v").stderr


def test_the_next_commands_can_be_pasted(minilm: Path, tmp_path: Path, cli: Cli) -> None:
    said = cli("prune", minilm, tmp_path / "out", "--sparsity", "0.7").stderr.splitlines()[-2:]
    lines = [line[6:].split() for line in said]
    assert [line[1] for line in lines] == ["report", "pack"]
    assert [cli(*line[1:]).rc for line in lines] == [0, 0]


def test_prune_tells_the_packed_size_without_reading_every_exponent(minilm: Path, tmp_path: Path) -> None:
    told = lpsparse.prune(minilm, tmp_path / "out", sparsity=0.7).bytes.packed_bytes
    real = lpsparse.pack(tmp_path / "out", tmp_path / "packed").bytes.file_bytes
    assert told is not None and abs(told - real) < 0.03 * real


def test_only_a_terminal_gets_colours() -> None:
    row = {"limit": 1.0, "value": 2.0, "margin": -1.0, "passed": False}
    found = bare(tensors(7), budgets=(Budget(name="max-bytes", **row),))
    assert "\x1b" not in render(found)
    colored = render(found, color=True)
    assert colored.splitlines()[-1].startswith("\x1b[31mFAILED\x1b[0m: 1 of 1")
    assert re.sub(r"\x1b\[\d*m", "", colored) == render(found)
