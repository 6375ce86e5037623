"""What CI sees: GitHub's summary and annotations, and the examples of the documents, run by a stand-in.

The stand-in does what a runner does with `run:`, `env:`, `with:` and outputs. `pip` is a script that writes
down what it was asked; `lpsparse` is that of this environment."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from junitparser import JUnitXml
from markdown_it import MarkdownIt
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support.cli import Ran, cli_environment
from support.files import ROOT, Given, f32, tree_hash, write_safetensors
from support.models import BUNDLED

from lpsparse import prune, report
from lpsparse.cli import github
from lpsparse.reporting.history import read_report
from lpsparse.reporting.records import Budget

Cli = Callable[..., Ran]
ACTION = yaml.safe_load((ROOT / "action.yml").read_text())
BLOCKS = dict(
    re.findall(r"\n## ([^\n]+)\n.*?\n```\w+\n(.*?)\n```\n", (ROOT / "docs/ci.md").read_text(), re.DOTALL)
)


@pytest.fixture
def sparse(tiny: Path) -> Path:
    prune(tiny, tiny.parent / "sparse", sparsity=0.8)
    tiny.rename(tiny.parent / "dense")
    return tiny.parent / "sparse"


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """GitHub's runner, for commands in this process; the summary's file."""
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    return tmp_path / "summary.md"


def commands(stderr: str) -> list[tuple[str, str, str]]:
    """Kind, title and text of each annotation, decoded as the runner does."""
    found: list[tuple[str, str, str]] = []
    for line in stderr.splitlines():
        if line.lstrip().startswith("::"):
            kind, title, text = re.fullmatch(r"::(\w+) title=([^:,]*)::(.*)", line).groups()  # type: ignore[union-attr]
            for code, char in (("%3A", ":"), ("%2C", ","), ("%0A", "\n"), ("%25", "%")):
                title, text = title.replace(code, char), text.replace(code, char)
            found.append((kind, title, text))
    return found


# The summary


def test_the_summary_is_appended_to_without_being_asked(sparse: Path, runner: Path, cli: Cli) -> None:
    runner.write_text("before\n")
    ran = cli("report", sparse, "--markdown", "-")
    assert ran.rc == 0 and runner.read_text() == f"before\n\n{ran.stdout}"
    assert cli("report", sparse, "--json", "-").rc == 0
    assert runner.read_text().count("## lpsparse") == 2


def test_no_summary_without_a_runner(sparse: Path, cli: Cli) -> None:
    ran = cli("report", sparse, "--max-bytes", "1B")
    assert (ran.rc, ran.stderr) == (1, "")


@pytest.mark.parametrize("where", ["gone/summary.md", "sparse", "full.md", "/dev/full", "a\0b"])
def test_a_summary_that_cannot_be_written_is_a_warning(
    where: str, sparse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    (tmp_path / "full.md").write_bytes(b"x" * 1024 * 1000)
    path = where if where.startswith("/") or "\0" in where else str(tmp_path / where)
    if "\0" not in where:
        monkeypatch.setenv("GITHUB_STEP_SUMMARY", path)
    else:
        monkeypatch.setattr(os, "environ", {**os.environ, "GITHUB_STEP_SUMMARY": path})
    ran = cli("report", sparse)
    assert ran.rc == 0 and ran.stderr.startswith("warning: GITHUB_STEP_SUMMARY: ")
    assert len(ran.stderr.splitlines()) == 1


def test_many_reports_in_one_step_stay_under_its_limit(sparse: Path, runner: Path) -> None:
    found = report(sparse)
    rows = tuple(replace(found.tensors[0], name=f"{i}" * 20) for i in range(20_000))
    found = found.model_copy(update={"tensors": rows})
    assert [github.summarise(found) for _ in range(2)] == [None, None]
    assert 900 * 1024 < runner.stat().st_size <= 1000 * 1024
    assert "bytes are there, no summary was added" in str(github.summarise(found))


# Annotations


def test_failed_budgets_are_errors_and_warnings_warnings(sparse: Path, runner: Path, cli: Cli) -> None:
    flags = ("--max-bytes", "100B", "--min-sparsity", "0.9", "--warn", "min-sparsity", "--json", "-")
    ran = cli("report", sparse, *flags)
    assert ran.rc == 1 and json.loads(ran.stdout)["budgets"]
    assert commands(ran.stderr) == [
        (
            "error",
            "lpsparse: max-bytes failed",
            "sparse: limit 100 B, value 3.08 kB, margin -2.98 kB (31 times the limit)",
        ),
        ("warning", "lpsparse: min-sparsity failed", "sparse: limit 90.00 %, value 79.95 %, margin -10.05 %"),
    ]


def test_at_most_ten_annotations_of_a_kind(sparse: Path) -> None:
    budgets = tuple(
        Budget(name=f"b{i}", limit=1, value=0, margin=-1, passed=False, level="warn" if i % 2 else "error")
        for i in range(40)
    )
    lines = github.annotations(report(sparse).model_copy(update={"budgets": budgets}))
    kinds = [line.split()[0] for line in lines]
    assert (kinds.count("::error"), kinds.count("::warning")) == (10, 10)
    assert lines[9] == "::error title=lpsparse::11 more are not shown here, but in the report"


@pytest.mark.parametrize(
    "name", ["a::b,c=d%0A%", "x\n::error::fake", "a\r\n::stop-commands::x", "\u202e##[error]x"]
)
def test_an_annotation_cannot_be_forged(name: str, sparse: Path) -> None:
    budget = Budget(name="n", pattern=name, limit=1, value=0, margin=-1, passed=False, worst=name)
    found = report(sparse).model_copy(update={"budgets": (budget,), "model": name})
    (line,) = github.annotations(found)
    shown = re.sub(r"[^\x20-\x7e]", "?", name)
    (told,) = commands(line)
    assert told == (
        "error",
        f"lpsparse: n {shown} failed",
        f"{shown}: limit 1, value 0, margin -1, worst {shown}",
    )


@pytest.mark.parametrize(
    "name", ["::error::fake", "  ::stop-commands::x", "a ##[error]fake", "##[add-mask]e"]
)
def test_no_name_is_a_command_to_the_runner(name: str, tmp_path: Path, runner: Path, cli: Cli) -> None:
    given: dict[str, Given] = {name: f32(7, 13), "b.weight": f32(7, 13)}
    write_safetensors(tmp_path / "m.safetensors", given)
    asked = [("report",), ("inspect",), ("inspect", "--json"), ("report", "--exclude", "zzz"), ("verify",)]
    asked += [("report", f"--{view}", "-") for view in ("json", "csv", "junit", "markdown")]
    for command, *flags in asked:
        ran = cli(command, tmp_path / "m.safetensors", *flags)
        assert "##[" not in ran.stdout + ran.stderr.replace("title=", "")
        assert not re.search(r"(?m)^\s*::", ran.stdout)
        assert all(title.startswith("lpsparse") for _, title, _ in commands(ran.stderr))
        if "json" in "".join(flags) and ran.rc == 0:
            assert name in [row["name"] for row in json.loads(ran.stdout)["tensors"]]


@pytest.mark.parametrize("view", ["json", "csv", "junit", "markdown", "comment", "html"])
def test_no_name_in_a_list_of_tensors_begins_a_command(
    view: str, tmp_path: Path, runner: Path, cli: Cli
) -> None:
    nan: Given = ("F32", [2, 2], b"\0\0\xc0\x7f" * 4)
    names = ("a.weight", "::stop-commands::x", "  ::error::x", "b ##[error]x")
    write_safetensors(tmp_path / "m.safetensors", dict.fromkeys(names, nan))
    ran = cli("report", tmp_path / "m.safetensors", f"--{view}", "-")
    assert ran.rc == 0 and len(ran.stdout) > 100
    assert "##[" not in ran.stdout.partition("</style>")[2 if view == "html" else 0]
    assert not re.search(r"(?m)^\s*::(stop|error)", ran.stdout)


def test_an_error_is_one_annotation_of_both_lines(tmp_path: Path, runner: Path, cli: Cli) -> None:
    ran = cli("report", tmp_path / "gone")
    assert ran.rc == 3
    ((kind, title, text),) = commands(ran.stderr)
    assert (kind, title) == ("error", "lpsparse: LPS327")
    assert text.endswith("no such file or folder\nhint: check the path (`run`: --set model=PATH)")
    assert cli("report", "--min-sparsity", "x", tmp_path).rc == 2


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("prune", "gone", "out", "--sparsity", "0.5"), "LPS327"),
        (("run", "gone.yaml"), "LPS"),
        (("report", "--nonsense"), "LPS200"),
        (("sweep", "gone.yaml", "--sparsity", "2"), "LPS284"),
    ],
)
def test_an_error_of_any_command_is_two_lines_in_the_summary(
    words: tuple[str, ...], code: str, runner: Path, cli: Cli
) -> None:
    runner.write_text("before\n")
    ran = cli(*words)
    said = re.search(r"error\[(\w+)\]: (.*)\n  hint: (.*)\n", ran.stderr)
    assert said is not None and said[1].startswith(code)
    *before, heading, line = runner.read_text().splitlines()
    assert before == ["before", ""] and heading == f"## lpsparse: {said[1]}"
    shown = MarkdownIt().parse(line)[1].children or []
    assert [each.content.strip() for each in shown] == [said[2], "hint:", said[3]]


@pytest.mark.parametrize("name", ["a`b", "``", "<script>x</script>", "![x](http://x)", "x\n# head", "|a|"])
def test_an_error_in_the_summary_stays_code(name: str, runner: Path) -> None:
    assert github.summarise_error("LPS327", name, "fix it") is None
    shown = MarkdownIt().parse(runner.read_text())[-2].children or []
    assert [each.type for each in shown] == ["code_inline", "text", "code_inline"]
    assert shown[0].content.strip() == re.sub(r"[^\x20-\x7e]", "?", name)


def test_run_tells_the_runner_of_its_reports_and_keeps_them(
    sparse: Path, runner: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(sparse.parent)
    large, full = "{report: {max_bytes: 1B}}", "{report: {min_sparsity: 0.5}}"
    steps = f"[{large}, {{prune: {{sparsity: 0.5}}}}, {large}, {full}]"
    Path("r.yaml").write_text(f"{{model: dense, out: made, steps: {steps}}}")
    ran = cli("run", "r.yaml")
    assert ran.rc == 1 and runner.read_text().count("## lpsparse: FAILED") == 2
    assert runner.read_text().count("## lpsparse: passed") == 1
    assert [title for _, title, _ in commands(ran.stderr)] == ["lpsparse: max-bytes failed"] * 2
    kept = [Path("made") / name for name in ("report-1.json", "report-3.json", "report.json")]
    assert sorted(Path("made").glob("*.json")) == kept
    assert [[each.name for each in read_report(path).budgets] for path in kept] == [
        ["max-bytes"],
        ["max-bytes"],
        ["min-sparsity"],
    ]


SWEEP = """{model: dense, out: made, steps: [{prune: {sparsity: 0.5}}, {report: {min_sparsity: 0.6,
max_bytes: 1B, warn: [max-bytes]}}]}"""


@pytest.mark.parametrize(("values", "rc", "word"), [("0.25,0.5", 1, "FAILED"), ("0.5,0.75", 0, "passed")])
@pytest.mark.parametrize("flags", [(), ("--json", "--quiet")])
def test_a_sweep_tells_the_runner_its_verdict_and_table(
    values: str,
    rc: int,
    word: str,
    flags: tuple[str, ...],
    sparse: Path,
    runner: Path,
    cli: Cli,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(sparse.parent)
    Path("r.yaml").write_text(SWEEP)
    ran = cli("sweep", "r.yaml", "--sparsity", values, *flags)
    lines = runner.read_text().splitlines()
    assert ran.rc == rc and lines[0] == f"## lpsparse sweep: {word}"
    assert lines[2].endswith("**no model meets the budgets**" if rc else "budgets**: `s0.75/1-prune`")
    verdicts = [line.split("|")[-2].strip() for line in lines[6:9]]
    assert verdicts == ["", "`min-sparsity`", "`min-sparsity`" if rc else "ok"]
    why = ["0.25: min-sparsity: 25.00 %, limit 60.00 %", "0.5: min-sparsity: 50.00 %, limit 60.00 %"]
    assert lines[9:] == (["", *(f"- `{each}`" for each in why)] if rc else ["", f"- `{why[1]}`"])
    assert "--json" in flags or f"failed at {why[1]}\n" in ran.stdout
    text = "\n".join(["r.yaml: no model meets the budgets", *(f"sparsity {each}" for each in why)])
    assert commands(ran.stderr) == ([("error", "lpsparse: sweep", text)] if rc else [])


def test_no_word_of_a_sweep_is_a_command_or_a_column(runner: Path) -> None:
    budget = {"name": "::error::x|y", "limit": 1, "value": 0, "passed": False, "level": "error"}
    row = {
        "sparsity": 0.5,
        "zeros": 1,
        "file_bytes": 1,
        "bitmask_bytes": 1,
        "metric": "##[x]|<b>",
        "before": None,
        "after": None,
        "budgets": [budget],
        "passed": False,
    }
    dense = {"zeros": 0, "file_bytes": 1, "quality": None}
    found = {"recipe": "::r`.yaml", "rows": [row] * 200, "dense": dense, "smallest": None}
    assert github.summarise_sweep(found) is None
    text = runner.read_text()
    assert "##[" not in text and "::error" not in text and "<b>" not in text and "101 more" in text
    assert {line.count(" | ") for line in text.splitlines() if line.startswith("| 0.5")} == {6}
    assert text.count("- <code>0.5&#58; ") == 100
    (line,) = github.sweep_annotations(found)
    told = commands(line)[0][2].splitlines()
    assert told[0] == "::r`.yaml: no model meets the budgets" and told[-1] == "191 more are in the table"


# The examples


def tools(folder: Path) -> Path:
    """`pip`, which only writes down what it was asked, and `lpsparse` of this environment."""
    folder.mkdir()
    (folder / "pip").write_text(f'#!/bin/sh\necho "$@" >> "{folder}/asked"\n')
    (folder / "lpsparse").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m lpsparse "$@"\n')
    (folder / "python3").symlink_to(sys.executable)
    for name in ("pip", "lpsparse"):
        (folder / name).chmod(0o755)
    return folder


LITTLE = f"install --no-deps -r {ROOT}/.ci/report.txt {ROOT}"
ALL = f"install {ROOT}"


def asked(cwd: Path) -> str:
    """What the last job had pip install."""
    return (cwd / "bin" / "asked").read_text().splitlines()[-1]


def bash(script: str, cwd: Path, **env: str) -> Ran:
    """As a runner calls it: bash --noprofile --norc -eo pipefail FILE."""
    path = f"{cwd / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script],
        cwd=cwd,
        timeout=300,
        env=cli_environment(PATH=path, **env),
        capture_output=True,
        stdin=subprocess.DEVNULL,
    )
    return Ran(done.returncode, done.stdout.decode(), done.stderr.decode())


def filled(text: str, known: dict[str, str]) -> str:
    """`${{ ... }}` as a runner puts it in."""
    return re.sub(r"\$\{\{ ([\w.-]+) \}\}", lambda found: known[found[1]], text)


def is_run(condition: str | None, failed: bool, known: dict[str, str]) -> bool:
    if condition is None:
        return not failed
    first, *others = condition.split(" && ")
    assert first == "always()"
    return all(known[each] for each in others)


def steps(
    job: list[dict[str, Any]], cwd: Path, known: dict[str, str], action: dict[str, Any] = ACTION
) -> list[Ran]:
    """Run `run:` steps; after a failure only those that always run. Outputs are in `known` then."""
    done: list[Ran] = []
    for step in job:
        if not is_run(step.get("if"), any(ran.rc for ran in done), known):
            continue
        if step.get("uses") == "./":
            inputs = {name: str(each.get("default", "")) for name, each in action["inputs"].items()}
            inside = {f"inputs.{name}": text for name, text in (inputs | step["with"]).items()}
            inside["github.action_path"] = str(ROOT)
            done += steps(action["runs"]["steps"], cwd, inside)
            for name, each in action["outputs"].items():
                known[f"steps.{step['id']}.outputs.{name}"] = filled(each["value"], inside)
        elif "run" in step:
            assert "${{" not in step["run"]  # what an input holds would be read as a script
            env = {key: filled(text, known) for key, text in step.get("env", {}).items()}
            (cwd / "outputs").write_text("")
            of_runner = {"GITHUB_ACTIONS": "true", "GITHUB_OUTPUT": str(cwd / "outputs")}
            done.append(
                bash(step["run"], cwd, GITHUB_STEP_SUMMARY=str(cwd / "summary.md"), **of_runner, **env)
            )
            for line in (cwd / "outputs").read_text().splitlines():
                key, _, value = line.partition("=")
                known[f"steps.{step.get('id')}.outputs.{key}"] = value
    return done


@pytest.mark.parametrize(("limit", "code", "passed"), [("20MB", 0, "true"), ("7B", 1, "false")])
def test_the_github_example_runs(limit: str, code: int, passed: str, sparse: Path, tmp_path: Path) -> None:
    tools(tmp_path / "bin")
    job = yaml.safe_load(BLOCKS["GitHub Actions"].replace("20MB\n            warn max-bytes", limit))
    done = steps(job["jobs"]["report"]["steps"], tmp_path, {})
    assert [ran.rc for ran in done] == [0, code, 0]
    assert asked(tmp_path) == LITTLE
    assert done[-1].stdout == f"passed: {passed}; zeros: 291\n"
    assert (
        (tmp_path / "summary.md").read_text().startswith("## lpsparse: " + ("FAILED" if code else "passed"))
    )
    assert [kind for kind, *_ in commands(done[1].stderr)] == ["error"] * code
    assert JUnitXml.fromfile(str(tmp_path / "budgets.xml")).failures == code
    assert (tmp_path / "comment.md").read_text().startswith("<!-- lpsparse-report -->")


def test_the_action_hands_out_no_report_of_an_earlier_run(sparse: Path, tmp_path: Path) -> None:
    tools(tmp_path / "bin")
    text = BLOCKS["GitHub Actions"]
    first = steps(yaml.safe_load(text)["jobs"]["report"]["steps"], tmp_path, {})
    (tmp_path / "broken.safetensors").write_text("x")
    known: dict[str, str] = {}
    job = yaml.safe_load(text.replace("model: sparse", "model: broken.safetensors"))["jobs"]["report"][
        "steps"
    ]
    again = steps(job, tmp_path, known)
    assert [ran.rc for ran in first] == [0, 0, 0] and [ran.rc for ran in again] == [0, 3]
    assert known["steps.sparse.outputs.report"] == "" and known["steps.sparse.outputs.passed"] == "false"
    assert not (tmp_path / "report.json").exists() and not (tmp_path / "budgets.xml").exists()


@pytest.mark.parametrize(
    ("inputs", "code"),
    [
        ({"model": "broken.safetensors"}, 3),
        ({"budgets": "min-sparsity lots"}, 2),
        ({"model": "gone"}, 3),
        ({"budgets": "no-such-budget 1"}, 2),
        ({"model": "--help"}, 3),
        ({"model": "$(touch owned)"}, 3),
        ({"budgets": "min-sparsity $(touch owned)\n`touch owned`; touch owned"}, 2),
    ],
)
def test_the_action_fails_as_report_does_and_runs_no_input(
    inputs: dict[str, str], code: int, sparse: Path, tmp_path: Path
) -> None:
    tools(tmp_path / "bin")
    (tmp_path / "broken.safetensors").write_bytes((sparse / "model.safetensors").read_bytes()[:100])
    known: dict[str, str] = {}
    done = steps([{"uses": "./", "id": "x", "with": {"model": "sparse", **inputs}}], tmp_path, known)
    assert [ran.rc for ran in done] == [0, code]
    assert known["steps.x.outputs.passed"] == "false" and not (tmp_path / "owned").exists()
    assert [kind for kind, *_ in commands(done[1].stderr)] == ["error"]


@pytest.mark.parametrize(
    ("inputs", "installed"),
    [
        ({}, LITTLE),
        ({"base": "dense"}, LITTLE),
        ({"model": "report.json"}, LITTLE),
        ({"base": "net.pth"}, ALL),
        ({"base": "org/name"}, ALL),
        ({"model": "dense"}, ALL),
        ({"model": "org/name"}, ALL),
        ({"eval": "data dev.tsv"}, ALL),
        ({"budgets": "min-sparsity 0.1\nexclude *head*"}, ALL),
    ],
)
def test_the_action_installs_torch_only_where_it_may_be_needed(
    inputs: dict[str, str], installed: str, sparse: Path, tmp_path: Path
) -> None:
    tools(tmp_path / "bin")
    (tmp_path / "report.json").write_text(report(sparse).model_dump_json())
    (tmp_path / "net.pth").touch()
    install = {**ACTION, "outputs": {}, "runs": {"steps": ACTION["runs"]["steps"][:1]}}
    steps([{"uses": "./", "id": "x", "with": {"model": "sparse", **inputs}}], tmp_path, {}, install)
    assert asked(tmp_path) == installed


def test_the_short_list_is_of_releases_that_lpsparse_allows_and_complete() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {canonicalize_name(each.name): each for each in map(Requirement, project["dependencies"])}
    lines = [line for line in (ROOT / ".ci" / "report.txt").read_text().splitlines() if line[0] != "#"]
    pins = {canonicalize_name(each.name): each for each in map(Requirement, lines)}
    for name, pin in pins.items():
        (exact,) = pin.specifier
        assert exact.operator == "=="
        assert name not in wanted or wanted[name].specifier.contains(exact.version), name
    heavy = {"torch", "transformers", "accelerate", "safetensors", "huggingface-hub"}
    assert set(wanted) - set(pins) == heavy


IMPORTED = """import contextlib, importlib.metadata as metadata, io, runpy, sys
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
    runpy.run_module("lpsparse", run_name="__main__")
homes = metadata.packages_distributions()
print(*sorted({home for name in sys.modules for home in homes.get(name.partition(".")[0], [])}))"""


@pytest.mark.parametrize(
    "command", ["report sparse dense --html page.html", "verify sparse dense", "inspect sparse"]
)
def test_what_report_verify_and_inspect_import_is_on_the_short_list(
    command: str, sparse: Path, tmp_path: Path
) -> None:
    words = [sys.executable, "-c", IMPORTED, *command.split()]
    ran = subprocess.run(
        words, cwd=tmp_path, env=cli_environment(), capture_output=True, text=True, check=True
    )
    pinned = {line.partition("==")[0] for line in (ROOT / ".ci" / "report.txt").read_text().splitlines()}
    allowed = {canonicalize_name(name) for name in pinned} | {"lpsparse", "setuptools", "pip"}
    assert {canonicalize_name(name) for name in ran.stdout.split()} - allowed == set(), ran.stderr


@pytest.mark.parametrize(("limit", "code"), [("0.79", 0), ("0.8", 0), ("0.9", 1)])
def test_the_gitlab_example_runs(limit: str, code: int, sparse: Path, tmp_path: Path) -> None:
    tools(tmp_path / "bin")
    job = yaml.safe_load(BLOCKS["GitLab CI"])["sparse-model"]
    ran = bash("\n".join(job["script"]).replace("sparsity 0.8", f"sparsity {limit}"), tmp_path)
    assert ran.rc == code and (tmp_path / "bin" / "asked").read_text() == "install .\n"
    for name in (job["artifacts"]["reports"]["junit"], *job["artifacts"]["paths"]):
        assert (tmp_path / name).stat().st_size > 100
    assert JUnitXml.fromfile(str(tmp_path / "budgets.xml")).failures == code


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        (("", ""), 0, "every budget is met"),
        (("0.8", "0.9"), 1, "a budget failed"),
        (("0.8", "8"), 2, "exit code 2"),
        (("report sparse", "report gone"), 3, "exit code 3"),
    ],
)
def test_the_shell_example_runs(
    change: tuple[str, str], code: int, said: str, sparse: Path, tmp_path: Path
) -> None:
    tools(tmp_path / "bin")
    ran = bash(BLOCKS["Any other"].replace(*change), tmp_path)
    assert ran.rc == code and said in ran.stdout.splitlines()[-1]
    assert (tmp_path / "report.json").exists() == (code < 2)


@pytest.fixture
def language_model(tmp_path: Path) -> Path:
    """A dense model and held-out text, by the names that the page has."""
    shutil.copytree(BUNDLED, tmp_path / "dense")
    text = (BUNDLED.parent / "shakespeare" / "validation.txt").read_text()
    (tmp_path / "dev.txt").write_text(text[:6000])
    tools(tmp_path / "bin")
    return tmp_path


@pytest.mark.parametrize(("limit", "code"), [("5%", 0), ("0.001", 1)])
def test_a_job_that_cuts_measures_and_gates_quality(limit: str, code: int, language_model: Path) -> None:
    before = tree_hash(language_model / "dense")
    ran = bash(BLOCKS["Quality after a cut"].replace("5%", limit), language_model)
    assert ran.rc == code and "max-quality-drop" in ran.stdout
    assert ("FAILED" in ran.stdout, "not recorded" in ran.stdout) == (code == 1, False)
    assert tree_hash(language_model / "dense") == before


@pytest.mark.parametrize(
    ("change", "codes"),
    [
        (("", ""), [0, 0]),
        (("5%", "0.001"), [0, 1]),
        (("dev.txt", "gone.txt"), [0, 3]),
        (("task causal-lm", "task x"), [0, 2]),
    ],
)
def test_the_action_measures_before_it_reports(
    change: tuple[str, str], codes: list[int], language_model: Path
) -> None:
    prune(language_model / "dense", language_model / "sparse", sparsity=0.2)
    page = (ROOT / "docs" / "ci.md").read_text().partition("## Quality after a cut")[2]
    (uses,) = yaml.safe_load(page.split("```yaml\n")[1].split("```")[0].replace(*change))
    known: dict[str, str] = {}
    done = steps([{**uses, "id": "x"}], language_model, known)
    assert [ran.rc for ran in done] == codes and asked(language_model) == ALL
    assert known["steps.x.outputs.passed"] == ("true" if codes[-1] == 0 else "false")
    assert bool(known["steps.x.outputs.report"]) == (codes[-1] < 2)


def test_the_whole_job_passes_fails_and_finds_the_broken_file(tmp_path: Path) -> None:
    tools(tmp_path / "bin")
    ran = bash(f'bash "{ROOT}/benchmarks/ci_job.sh" 6', tmp_path, TMPDIR=str(tmp_path))
    assert ran.rc == 0, ran.stderr
    codes = re.findall(r"(?m)^exit code (\d): lpsparse (\w+)", ran.stdout)
    assert [int(code) for code, _ in codes] == [0, 0, 0, 0, 1, 1, 3]
    assert ran.stdout.count("## lpsparse: passed") == 1 and ran.stdout.count("## lpsparse: FAILED") == 2
    assert "| `max-quality-drop` | 0.01 |" in ran.stdout and "error[LPS" in ran.stderr
    assert not list(tmp_path.glob("tmp.*"))  # what it made is gone
