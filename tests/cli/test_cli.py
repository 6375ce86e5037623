"""The command line: two lines for an error, an exit code for a script, flags over environment over recipe."""

import json
import os
import re
import shlex
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from support.cli import BROKEN, RECIPE, Cli, Ran, cli_environment, failed, run_cli
from support.files import PRUNABLE, PRUNABLE_WEIGHTS, f32, tree_hash, write_safetensors, write_tiny

import lpsparse
from lpsparse import ExitCode, verify
from lpsparse.cli import main
from lpsparse.commands.results import Verification
from lpsparse.errors import UsageError
from lpsparse.recipes import run
from lpsparse.recipes.outputs import RESOLVED
from lpsparse.steps.base import about, flag, other_names
from lpsparse.steps.finetune import FinetuneStep
from lpsparse.steps.resolve import resolve
from lpsparse.steps.table import COMMANDS, step_of

NAMES = [name for name, command in COMMANDS.items() if command.panel]


# Help and version


def test_no_arguments_shows_the_help_and_exits_2(cli: Cli) -> None:
    ran = cli()
    assert ran.rc == 2
    assert re.search(r"Start with:\n +lpsparse demo\n", ran.stdout + ran.stderr)


def test_help_names_every_command_and_exit_code(cli: Cli) -> None:
    ran = cli("--help")
    assert (ran.rc, ran.stderr) == (0, "")
    assert all(re.search(rf"^  {command} ", ran.stdout, re.M) for command in NAMES)
    codes = " ".join(ran.stdout.split())
    assert all(f"{int(code)} {code.name.lower()}" in codes for code in ExitCode)


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("command", NAMES)
def test_every_command_has_help_with_an_example(command: str, flag: str, cli: Cli) -> None:
    ran = cli(command, flag)
    assert (ran.rc, ran.stderr) == (0, "")
    assert f"  lpsparse {command}" in ran.stdout
    assert "[required] [required]" not in " ".join(ran.stdout.split()) and "Options:" not in ran.stdout


def test_a_command_of_commands_says_each_in_full_and_names_the_nearest(cli: Cli) -> None:
    assert "disk and memory of a recipe, without a GPU." in " ".join(cli("recipe", "--help").stdout.split())
    assert "did you mean check" in failed(cli("recipe", "chek"), 2)


@pytest.mark.parametrize("command", [name for name in NAMES if COMMANDS[name].step])
def test_help_lists_every_setting_of_the_step(command: str, cli: Cli) -> None:
    text, short = (cli(command, flag).stdout for flag in ("--help-all", "--help"))
    for name, known in about(step_of(command)).items():
        word = name.upper() if known.panel == "Arguments" else flag(name)
        assert re.search(rf"(?<!\w){re.escape(word)}\b", text)
        assert known.advanced != bool(re.search(rf"^  (-\w, |\[)?{re.escape(word)}\b(?!-)", short, re.M))


def test_the_help_of_finetune_shows_what_people_use(cli: Cli) -> None:
    shown = re.findall(r"^  (--[a-z-]+)", cli("finetune", "--help").stdout, re.M)
    assert len(shown) < 24 and {"--data", "--target-sparsity", "--lr"} <= {*shown}


@pytest.mark.parametrize(
    "alias", ["learning_rate", "max_grad_norm", "num_processes", "sparsity", "save_steps"]
)
def test_the_fields_names_for_settings_are_accepted(alias: str) -> None:
    value = "0.5" if alias in ("learning_rate", "sparsity", "max_grad_norm") else "2"
    given = {"model": "m", "out": "o", "data": "d", "task": "causal-lm"}
    step = resolve(FinetuneStep, {**given, alias: value})
    assert not step.at_default(other_names(FinetuneStep)[alias])


def test_version_is_the_packages_own(cli: Cli) -> None:
    assert cli("--version") == cli("-V") == (0, f"lpsparse {lpsparse.__version__}\n", "")


# What a person types wrong


def test_an_unknown_flag_names_the_nearest(tiny: Path, cli: Cli) -> None:
    said = failed(cli("prune", tiny, "out", "--sparsty", "0.5"), 2)
    assert "--sparsty" in said and "--sparsity" in said


def test_an_unknown_command_names_the_nearest(cli: Cli) -> None:
    said = failed(cli("prun", "a", "b"), 2)
    assert "prun\n" in said and "did you mean prune or run?" in said


@pytest.mark.parametrize(
    ("words", "missing"),
    [
        ("prune", "MODEL OUT"),
        ("pack", "MODEL OUT"),
        ("report", "MODEL"),
        ("push", "FOLDER REPO"),
        ("run", "RECIPE"),
        ("recipe check", "RECIPE"),
        ("sweep", "RECIPE --sparsity"),
        ("prune m", "OUT"),
        ("finetune", "MODEL OUT --task --data"),
        ("finetune m --data d", "OUT --task"),
        ("finetune m o", "--task --data"),
        ("eval m", "--data"),
    ],
)
def test_two_lines_say_all_that_is_missing(words: str, missing: str, cli: Cli) -> None:
    first, second = failed(cli(*words.split()), 2).strip().splitlines()
    named = re.findall(r"\b[A-Z]{3,}\b(?!\d)|--[a-z]+", first.partition("]: ")[2])
    assert named == missing.split()
    assert f"lpsparse {words.partition(' m')[0]} --help" in second


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("compress", "prune"),
        ("diff", "report"),
        ("version", "--version"),
        ("finetune m o --bf16", "--mixed-precision bf16"),
        ("prune m o --force", "--overwrite"),
    ],
)
def test_what_other_tools_call_it_gets_the_name_of_here(words: str, meant: str, cli: Cli) -> None:
    assert f"did you mean {meant}?" in failed(cli(*words.split()), 2)


def test_a_bare_name_of_a_hub_model_is_told_what_an_id_is(tmp_path: Path, cli: Cli) -> None:
    assert "org/gpt2" in failed(cli("inspect", "gpt2"), 3)


def test_a_fraction_may_be_a_percentage(tiny: Path, tmp_path: Path, cli: Cli) -> None:
    for i, text in enumerate(("0.5", "50%", "50 %")):
        assert cli("prune", tiny, tmp_path / str(i), "--sparsity", text).rc == 0
    hashes = [(tmp_path / str(i) / "model.safetensors").read_bytes() for i in range(3)]
    assert hashes[0] == hashes[1] == hashes[2]
    for text in ("80", "800%", "%", "a%", "nan%", "1e9999999%"):
        assert "--sparsity" in failed(cli("prune", tiny, tmp_path / "x", "--sparsity", text), 2)


@pytest.mark.parametrize("text", ["60", "700", "*.weight=60"])
def test_a_small_number_of_bytes_needs_its_unit(text: str, tiny: Path, cli: Cli) -> None:
    assert "unit" in failed(cli("report", tiny, "--max-bytes", text), 2)
    assert cli("report", tiny, "--max-bytes", f"{text}MB").rc == 0


def test_a_setting_goes_by_the_name_that_others_give_it(cli: Cli) -> None:
    for given in ({"learning_rate": 0.5, "sparsity": "80%"}, {"learning-rate": 0.5, "sparsity": 0.8}):
        step = resolve(FinetuneStep, {"model": "m", "out": "o", "data": "d", "task": "causal-lm", **given})
        assert (step.lr, step.target_sparsity) == (0.5, Decimal("0.8"))
    with pytest.raises(UsageError, match="another name of lr"):
        resolve(FinetuneStep, {"lr": 1, "learning_rate": 2})
    words = "finetune gone o --data d --task causal-lm --learning-rate 1e-3 --sparsity 0.8"
    assert "gone" in failed(cli(*words.split()), 3)


ERRORS: dict[str, tuple[tuple[str, ...], int]] = {
    "missing model": (("inspect", "gone.safetensors"), 3),
    "missing folder": (("verify", "gone"), 3),
    "no manifest": (("verify", "tiny"), 3),
    "empty folder": (("report", "empty"), 3),
    "out exists": (("prune", "tiny", "empty", "--sparsity", "0.5"), 4),
    "no parent": (("pack", "tiny", "a/b"), 4),
    "no band": (("prune", "tiny", "out", "--gap"), 1),
    "offline": (("inspect", "org/name"), 8),
    "missing recipe": (("run", "gone.yaml"), 3),
    "set without value": (("run", "gone.yaml", "--set", "x"), 2),
    "demo into a folder": (("demo", "empty"), 4),
}


@pytest.mark.parametrize(("arguments", "rc"), ERRORS.values(), ids=ERRORS.keys())
def test_every_error_is_two_lines_and_a_code_and_leaves_no_trace(
    arguments: tuple[str, ...], rc: int, tiny: Path
) -> None:
    (tiny.parent / "empty").mkdir()
    before = tree_hash(tiny.parent)
    failed(run_cli(list(arguments), cwd=tiny.parent, HF_HOME=str(tiny.parent.parent / "hf")), rc)
    assert tree_hash(tiny.parent) == before


def test_debug_shows_the_traceback_and_keeps_the_code(tmp_path: Path) -> None:
    ran = run_cli(["inspect", tmp_path / "gone", "--debug"])
    assert ran.rc == 3
    assert "Traceback" in ran.stderr and "LPS327" in ran.stderr


def test_a_bug_shows_its_traceback_and_exits_70(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("lpsparse.commands.inspect.inspect_step", broken)
    with pytest.raises(SystemExit) as left:
        main(["inspect", "anything"])
    assert left.value.code == ExitCode.BUG
    assert "ZeroDivisionError: a bug" in capsys.readouterr().err


# Output


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    arrays = {f"layers.{i}.weight": np.zeros((7, 13), np.float32) for i in range(3000)}
    save_file(arrays, tmp_path / "m.safetensors")
    process = subprocess.Popen(
        [sys.executable, "-m", "lpsparse", "inspect", str(tmp_path / "m.safetensors")],
        env=cli_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    with process.stdout, process.stderr:
        assert process.stdout.readline().startswith(b"tensor ")
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["inspect", "tiny"],
        ["report", "tiny", "--json", "-"],
        ["prune", "tiny", "out", "--sparsity", "0.5", "--quiet"],
    ],
)
def test_a_reader_that_was_never_there_is_no_error_either(arguments: list[str], tiny: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "lpsparse", *arguments],
        cwd=tiny.parent,
        env=cli_environment(),
        stdout=writing,
        stderr=subprocess.PIPE,
        timeout=60,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("words", ["report tiny", "inspect tiny", "prune tiny out --sparsity 0.5"])
def test_a_stdout_that_is_closed_is_no_error_and_one_that_is_full_is_exit_4(words: str, tiny: Path) -> None:
    for redirection, code in ((">&-", 0), (">/dev/full", 4)):
        shell = f"{sys.executable} -m lpsparse {words} --overwrite {redirection}"
        shell = shell if "prune" in words else shell.replace("--overwrite ", "")
        done = subprocess.run(shell, shell=True, cwd=tiny.parent, env=cli_environment(), capture_output=True)
        assert done.returncode == code and b"Traceback" not in done.stderr
    assert b"error[LPS411]: stdout: No space left on device" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (("inspect", "tiny", "--json"), "prunable_weights"),
        (("report", "tiny", "--json", "-"), "prunable"),
        (("prune", "tiny", "out", "--sparsity", "0.5", "--json"), "prunable"),
        (("pack", "tiny", "out", "--json"), "bytes"),
        (("verify", "made", "--json"), "ok"),
        (("unpack", "made", "out", "--json"), "all"),
    ],
)
def test_json_is_one_object_alone_on_stdout(
    arguments: tuple[str, ...], key: str, tiny: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    lpsparse.prune(tiny, tiny.parent / "made", sparsity=0.5)
    monkeypatch.chdir(tiny.parent)
    ran = cli(*arguments)
    assert ran.rc == 0
    assert key in json.loads(ran.stdout)
    assert "{" not in ran.stderr


def test_quiet_says_nothing_but_the_result(tiny: Path, tmp_path: Path, cli: Cli) -> None:
    ran = cli("prune", tiny, tmp_path / "out", "--sparsity", "0.5", "--quiet")
    assert (ran.rc, ran.stderr) == (0, "")
    assert "\nout: 50.00 % of prunable weights are zero (182 of 364)\n" in ran.stdout


def test_every_summary_is_headed_with_the_name_of_out(
    tiny: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny.parent)
    made = (("prune", "tiny", "a", "--sparsity", "0.5"), ("pack", "a", "b"), ("unpack", "b", "tiny/../c"))
    for command, model, out, *flags in made:
        headed = f"\n{Path(out).name}: 50.00 % of prunable weights "
        assert headed in cli(command, model, out, "--dry-run", *flags).stdout
        assert headed in cli(command, model, out, *flags).stdout
    assert "\nb: 50.00 %" in cli("report", "b/report.json").stdout
    monkeypatch.chdir(tiny.parent / "b")
    assert "\nb: 50.00 %" in cli("report", "report.json").stdout


@pytest.mark.parametrize(
    "env",
    [
        {"NO_COLOR": "1"},
        {"TERM": "dumb"},
        {"TERM": None, "COLUMNS": None},
        {"LC_ALL": "C", "LANG": "C"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "ascii"},
        {"HOME": None},
        {"HOME": "/nonexistent"},
        {"TZ": "Asia/Kathmandu"},
    ],
    ids=str,
)
def test_any_environment_gives_plain_text_and_the_same_bytes(
    env: dict[str, str | None], tmp_path: Path
) -> None:
    arrays = {"größe.模型" + "x" * 99 + ".weight": np.arange(91, dtype=np.float32).reshape(7, 13)}
    save_file(arrays, tmp_path / "m.safetensors")
    ran = run_cli(["prune", tmp_path / "m.safetensors", tmp_path / "out", "--sparsity", "0.5"], **env)
    assert ran.rc == 0
    assert "\x1b" not in ran.stdout + ran.stderr
    lpsparse.prune(tmp_path / "m.safetensors", tmp_path / "here", sparsity=0.5)
    assert tree_hash(tmp_path / "out") == tree_hash(tmp_path / "here")
    shown = run_cli(["report", tmp_path / "out"], **env)
    assert shown.rc == 0 and "weight" in shown.stdout


# Precedence


def pruned(cli: Cli, tiny: Path, *flags: str) -> int:
    ran = cli("prune", tiny, tiny.parent / "out", "--dry-run", "--json", *flags)
    assert ran.rc == 0, ran.stderr
    return json.loads(ran.stdout)["prunable"]["zeros"]


def test_a_setting_from_the_environment_is_used_and_a_flag_wins(
    tiny: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LPSPARSE_SPARSITY", "0.25")
    assert pruned(cli, tiny) == PRUNABLE_WEIGHTS // 4
    assert pruned(cli, tiny, "--sparsity", "0.75") == 3 * PRUNABLE_WEIGHTS // 4


def test_a_wrong_setting_in_the_environment_is_refused(
    tiny: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LPSPARSE_SPARSITY", "most")
    assert "--sparsity 'most'" in failed(cli("prune", tiny, "out"), 2)


def test_patterns_from_the_environment_are_separated_by_commas(
    tiny: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LPSPARSE_EXCLUDE", "layers.0.*, layers.1.mlp.weight")
    assert pruned(cli, tiny, "--sparsity", "1") == 91
    assert pruned(cli, tiny, "--sparsity", "1", "--exclude", "layers.0.*") == 182


def test_a_switch_can_be_turned_off_again(tiny: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LPSPARSE_GAP", "1")
    assert cli("prune", tiny, tiny.parent / "out").rc == 1  # no band
    assert "(got none)" in failed(cli("prune", tiny, tiny.parent / "out", "--no-gap"), 2)


@pytest.mark.parametrize(("variable", "value"), [("GAP", "1"), ("SPARSITY", "0.25"), ("BELOW", "9")])
def test_a_rule_that_is_given_takes_away_another_from_the_environment(
    variable: str, value: str, tiny: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"LPSPARSE_{variable}", value)
    assert pruned(cli, tiny, "--n-m", "1:13", "--include", "layers.*.attn.weight") == 2 * 7 * 12
    both = cli("prune", tiny, tiny.parent / "out", "--sparsity", "0.5", "--gap")
    assert "--sparsity, --gap" in failed(both, 2)


# Recipes


@pytest.fixture
def recipe(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tiny.parent)
    (tiny.parent / "r.yaml").write_text(RECIPE)
    return tiny.parent / "r.yaml"


@pytest.mark.parametrize("time", ["first", "again"])
def test_run_names_each_step_with_what_it_made(time: str, recipe: Path, cli: Cli) -> None:
    said = [cli("run", recipe).stdout for _ in ("first", "again")][time == "again"]
    assert "prune: sparse: 79.95 %" in said and "pack: packed: 79.95 %" in said


@pytest.mark.parametrize(("text", "words"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_recipe_is_refused_by_file_and_key_before_any_step(
    text: str | bytes, words: list[str], recipe: Path, cli: Cli
) -> None:
    recipe.write_bytes(text.encode() if isinstance(text, str) else text)
    before = tree_hash(recipe.parent)
    said = failed(cli("run", "r.yaml"), 2)
    assert [word for word in ["r.yaml", *words] if word not in said] == []
    assert tree_hash(recipe.parent) == before


def test_a_recipe_too_large_to_be_one_is_refused(recipe: Path, cli: Cli) -> None:
    recipe.write_text("#" * 1_000_001)
    assert "too large" in failed(cli("run", "r.yaml"), 2)


def test_a_missing_recipe_or_a_folder_in_its_place_exits_3(recipe: Path, cli: Cli) -> None:
    for name in ("gone.yaml", "tiny"):
        assert name in failed(cli("run", name), 3)


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        ("sparsity", ["--set sparsity", "KEY=VALUE"]),
        ("uot=x", ["'uot'", "did you mean out?"]),
        ("prune.sparsty=0.5", ["'sparsty'", "did you mean sparsity?"]),
        ("prune.sparsity=2", ["sparsity", "2"]),
        ("prun.sparsity=0.5", ["prun.sparsity", "prune"]),
        ("eval.batch_size=7", ["eval.batch_size"]),
    ],
)
def test_a_wrong_set_is_refused_not_ignored(pair: str, words: list[str], recipe: Path, cli: Cli) -> None:
    said = failed(cli("run", "r.yaml", "--set", pair), 2)
    assert [word for word in words if word not in said] == []
    assert not (recipe.parent / "made").exists()


def test_a_recipe_runs_each_step_on_the_result_of_the_one_before(recipe: Path) -> None:
    ran = run_cli(["run", "r.yaml", "--set", "prune.sparsity=0.9", "-v"], cwd=recipe.parent)
    assert ran.rc == 0, ran.stderr
    assert "[1/4] lpsparse prune tiny made/sparse --sparsity 0.9" in ran.stderr
    assert "[2/4] lpsparse pack made/sparse made/packed" in ran.stderr
    assert "[4/4] lpsparse report made/packed tiny --min-sparsity 0.7" in ran.stderr
    assert verify(recipe.parent / "made" / "sparse")["ok"]
    manifest = json.loads((recipe.parent / "made" / "packed" / "lpsparse.json").read_text())
    assert (manifest["source"]["name"], manifest["layout"]) == ("sparse", "packed")
    assert sum(t["zeros"] for t in manifest["tensors"] if t["name"] in PRUNABLE) == int(
        0.9 * PRUNABLE_WEIGHTS
    )


def test_a_recipe_says_each_step_in_a_line_that_a_terminal_has_room_for(recipe: Path, cli: Cli) -> None:
    said = [line for line in cli("run", "r.yaml").stderr.splitlines() if line.startswith("[")]
    assert [line.split()[:2] for line in said] == [
        [f"[{i}/4]", name] for i, name in enumerate(("prune", "pack", "verify", "report"), 1)
    ] and max(map(len, said)) <= 80


def test_the_commands_a_recipe_shows_do_what_the_recipe_does(recipe: Path, tmp_path: Path, cli: Cli) -> None:
    (recipe.parent / "made").mkdir()
    shown = [
        line.split("] lpsparse ")[1]
        for line in cli("run", "r.yaml", "--verbose").stderr.splitlines()
        if "] lpsparse " in line
    ]
    for name in (RESOLVED, "report.json"):  # what a run itself leaves beside the folders
        (recipe.parent / "made" / name).unlink()
    before = tree_hash(recipe.parent / "made")
    (recipe.parent / "made").rename(recipe.parent / "first")
    (recipe.parent / "made").mkdir()
    assert [cli(*line.split()).rc for line in shown] == [0, 0, 0, 0]
    assert tree_hash(recipe.parent / "made") == before


def test_a_shown_command_gives_back_the_step_that_it_was_made_of(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[FinetuneStep] = []
    monkeypatch.setattr(
        "lpsparse.commands.finetune.finetune_step",
        lambda step, *_: given.append(step) or Verification(True, 0, 0, ()),
    )
    options: dict[str, Any] = {
        "data": "a b.txt",
        "task": "causal-lm",
        "target_sparsity": "0.80",
        "selective": False,
        "masked_forward": False,
        "cautious": True,
        "freeze": ["*emb*", "head.?"],
        "mean": "0.5,0.25,1",
        "std": "1,1,0.125",
        "lambda_p": 2,
    }
    step = resolve(FinetuneStep, {"model": "m", "out": "o", **options})
    shown = run.command_line(step)
    assert "--no-selective" in shown
    assert cli(*shlex.split(shown)[1:], "--json").rc == 0
    assert given == [step]


def test_json_of_a_run_holds_the_result_of_every_step(recipe: Path, cli: Cli) -> None:
    ran = cli("run", "r.yaml", "--json", "--quiet")
    steps = json.loads(ran.stdout)["steps"]
    assert [each["step"] for each in steps] == ["prune", "pack", "verify", "report"]
    assert steps[2]["result"]["ok"] and steps[3]["result"]["base"]["name"] == "tiny"
    assert ran.stderr == ""


def test_a_budget_that_fails_makes_the_run_exit_1_with_everything_written(recipe: Path, cli: Cli) -> None:
    ran = cli("run", "r.yaml", "--set", "report.min_sparsity=0.95")
    assert ran.rc == 1 and "FAILED" in ran.stdout
    assert verify(recipe.parent / "made" / "packed")["ok"]


def finished(ran: Ran) -> list[str]:
    assert ran.rc == 0, ran.stderr
    return re.findall(r"finished already: (\S+)", ran.stderr)


def test_a_second_run_skips_what_is_finished_and_changes_nothing(recipe: Path, cli: Cli) -> None:
    assert finished(cli("run", "r.yaml")) == []
    before = tree_hash(recipe.parent)
    assert finished(cli("run", "r.yaml")) == ["made/sparse", "made/packed"]
    assert tree_hash(recipe.parent) == before


OVERWRITE = ["--set", "prune.overwrite=true", "--set", "pack.overwrite=true"]


def test_a_changed_setting_makes_its_step_and_the_later_ones_run_again(recipe: Path, cli: Cli) -> None:
    cli("run", "r.yaml")
    first = tree_hash(recipe.parent / "made")
    assert finished(cli("run", "r.yaml", "--set", "prune.sparsity=0.9", *OVERWRITE)) == []
    second = tree_hash(recipe.parent / "made")
    assert first["sparse/model.safetensors"] != second["sparse/model.safetensors"]
    assert first["packed/lpsparse.safetensors"] != second["packed/lpsparse.safetensors"]
    assert finished(cli("run", "r.yaml", "--set", "prune.sparsity=0.9")) == ["made/sparse", "made/packed"]


def test_a_changed_input_makes_every_step_run_again(recipe: Path, cli: Cli) -> None:
    cli("run", "r.yaml")
    first = tree_hash(recipe.parent / "made")
    (recipe.parent / "tiny").rename(recipe.parent / "before")
    write_tiny(recipe.parent / "tiny", seed=1)
    assert finished(cli("run", "r.yaml", *OVERWRITE)) == []
    assert tree_hash(recipe.parent / "made")["sparse/model.safetensors"] != first["sparse/model.safetensors"]


@pytest.mark.parametrize("damage", ["flip", "delete"])
def test_a_damaged_result_is_not_taken_for_finished(damage: str, recipe: Path, cli: Cli) -> None:
    cli("run", "r.yaml")
    file = recipe.parent / "made" / "sparse" / "model.safetensors"
    before = file.read_bytes()
    file.write_bytes(before[:-1] + b"\x01") if damage == "flip" else file.unlink()
    assert finished(cli("run", "r.yaml", *OVERWRITE)) == ["made/packed"]
    assert file.read_bytes() == before


def test_without_overwrite_a_result_of_other_settings_is_kept_and_refused(recipe: Path, cli: Cli) -> None:
    cli("run", "r.yaml")
    before = tree_hash(recipe.parent)
    before["made/report.json.old"] = before.pop("made/report.json")  # it is not this run's
    ran = cli("run", "r.yaml", "--set", "prune.sparsity=0.9")
    assert ran.rc == 4
    assert "LPS401" in ran.stderr.splitlines()[-2]
    assert tree_hash(recipe.parent) == before
    words = ["--set", "prune.sparsity=0.9"]
    for _ in ("prune", "pack"):  # what each error asks for
        words += ran.stderr.partition("replace it: ")[2].split()
        ran = cli("run", "r.yaml", *words)
    assert ran.rc == 0


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname"])
def test_a_manifest_that_points_outside_is_not_taken_for_finished(name: str, recipe: Path, cli: Cli) -> None:
    cli("run", "r.yaml")
    manifest = recipe.parent / "made" / "sparse" / "lpsparse.json"
    table = json.loads(manifest.read_text())
    table["files"][0]["name"] = name
    manifest.write_text(json.dumps(table))
    ran = cli("run", "r.yaml")
    assert ran.rc == 4 and "Traceback" not in ran.stderr


def test_a_step_may_name_a_model_of_its_own(recipe: Path, cli: Cli) -> None:
    write_tiny(recipe.parent / "other", seed=1)
    recipe.write_text(RECIPE.replace("pack: {out: packed}", "pack: {out: packed, model: other}"))
    recipe.write_text(recipe.read_text().replace("min_sparsity: 0.7", ""))
    assert finished(cli("run", "r.yaml")) == []
    manifest = json.loads((recipe.parent / "made" / "packed" / "lpsparse.json").read_text())
    assert manifest["source"]["name"] == "other"
    assert finished(cli("run", "r.yaml")) == ["made/sparse", "made/packed"]


def test_a_step_without_settings_needs_no_braces(recipe: Path, cli: Cli) -> None:
    recipe.write_text(RECIPE.replace("verify: {}", "verify:"))
    assert cli("run", "r.yaml").rc == 0


def test_the_environment_sets_a_recipes_settings_but_set_wins(
    recipe: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LPSPARSE_SPARSITY", "0.5")
    done = run.run("r.yaml")
    assert done[0].step.model_dump(mode="json")["sparsity"] == "0.5"
    done = run.run("r.yaml", {"prune.sparsity": "0.9", "out": "second"})
    assert done[0].step.model_dump(mode="json")["sparsity"] == "0.9"


def test_the_environment_reaches_the_steps_and_not_the_recipes_own_keys(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("STEPS", "VERSION"):
        monkeypatch.setenv(f"LPSPARSE_{name}", "5")
    assert len(run.run("r.yaml")) == 4


def test_an_out_given_by_set_lies_under_the_recipes_out(recipe: Path) -> None:
    run.run("r.yaml", {"sparse.out": "other"})
    assert sorted(path.name for path in (recipe.parent / "made").iterdir() if path.is_dir()) == [
        "other",
        "packed",
    ]


def test_a_model_in_the_environment_starts_the_chain_and_does_not_break_it(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny(recipe.parent / "other", seed=1)
    monkeypatch.setenv("LPSPARSE_MODEL", "other")
    done = run.run("r.yaml")
    assert [getattr(each.step, "model", None) for each in done] == [
        "other",
        "made/sparse",
        "made/packed",
        "made/packed",
    ]


def test_a_rerun_says_of_each_step_what_the_first_run_said(recipe: Path, cli: Cli) -> None:
    first, again = cli("run", "r.yaml"), cli("run", "r.yaml")
    assert (first.rc, first.stdout) == (again.rc, again.stdout) == (0, first.stdout)
    assert "finished already" in again.stderr and "finished already" not in first.stderr


def test_a_variable_that_sets_nothing_is_named(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LPSPARSE_SPARSTY", "0.8")
    said = failed(cli("prune", "m", "out", "--below", "1"), 2)
    assert "LPSPARSE_SPARSTY" in said and "did you mean LPSPARSE_SPARSITY?" in said


def test_a_flag_without_its_value_points_to_its_commands_help(cli: Cli) -> None:
    assert "see `lpsparse report --help`" in failed(cli("report", "m", "--json"), 2)


def test_names_are_whole_in_a_pipe_and_a_remark_gives_way_before_a_name(tiny: Path, cli: Cli) -> None:
    long = "encoder.layer.4.intermediate.attention.output.dense.and.more.of.it.weight"
    write_safetensors(tiny / "model.safetensors", {f"{long}{i}": f32(7, 13) for i in range(3)})
    for command in ("inspect", "report"):
        assert all(f"{long}{i} " in cli(command, tiny).stdout for i in range(3))
    narrow = run_cli(["inspect", str(tiny)], cwd=tiny, COLUMNS="60").stdout.splitlines()[3:]
    assert all(len(line) <= 60 for line in narrow)


def test_importing_shows_the_functions_and_nothing_else() -> None:
    import lpsparse

    assert dir(lpsparse) == sorted(lpsparse.__all__) and "prune" in dir(lpsparse)
