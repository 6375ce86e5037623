"""Every command and snippet in README.md and docs/ is run or accounted for, and the pages build."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from support.cli import Ran
from support.files import ROOT, write_tiny
from support.hub import Hub
from support.models import BUNDLED

import lpsparse
from lpsparse.cli.help import read_topics
from lpsparse.errors import MEANINGS
from lpsparse.recipes.file import read_recipe

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LLAMA = "bundled:stories260k"
RECIPE = f"model: {LLAMA}\nsteps: [prune: {{sparsity: 0.5}}, report: {{min_sparsity: 0.5}}]\n"
# Training is cut short: what is checked here is that the words are understood and the files are there.
FEW = {"STEPS": "4", "BATCH_SIZE": "4", "MAX_LENGTH": "16", "THREADS": "1", "EVAL_FRACTION": "0.05"}
FETCHED = re.compile(r"<(?:script|img|link|iframe)[^>]* (?:src|href)=\"?([^\s\">]+)")
SHELL = re.compile(r"(lpsparse|pip|torchrun|accelerate|python|mkdocs|pytest) ")
ELSEWHERE = {  # how a command begins -> why it is not run here
    "pip install": "installs; .ci/run does it in a fresh environment",
    "lpsparse demo": "takes a minute; tests/cli/test_demo.py runs it",
    "lpsparse finetune MODEL OUT --data DATA --task causal-lm --processes 8": "eight GPUs; "
    "tests/parallel/test_distributed.py runs --processes and --shard",
    "accelerate launch": "several machines; tests/parallel/test_distributed.py launches it on one",
    "lpsparse prune PIPELINE": "a folder of diffusers; tests/checkpoint/test_components.py prunes one",
    "torchrun": "several processes; tests/parallel runs it with two",
}
PAGES_ELSEWHERE = {
    "experiments.md": "tells what was run on its dates, for minutes to hours on data that is not here",
    "ci.md": "tests/cli/test_ci.py runs its jobs with a stand-in for the runner",
}
EXITS = {"lpsparse prune decayed cut --gap": 1}  # four steps leave no empty band


class Block(NamedTuple):
    where: str
    language: str
    text: str


def blocks(page: Path) -> Iterator[Block]:
    """Code of a page, fenced or indented; the language of the latter is guessed."""
    lines = page.read_text("utf-8").splitlines()
    i = 0
    while i < len(lines):
        start = i = i + 1
        fence = re.match(r"```(\w*)", lines[i - 1])
        if fence:
            while not lines[i].startswith("```"):
                i += 1
            text = "\n".join(lines[start:i])
            i += 1
        elif lines[i - 1].startswith("    ") and not lines[i - 2].strip():
            while i < len(lines) and (lines[i].startswith("    ") or not lines[i].strip()):
                i += 1
            text = "\n".join(line[4:] for line in lines[start - 1 : i]).rstrip()
        else:
            continue
        yield Block(f"{page.name}:{start}", fence[1] if fence else guessed(text), text)


def guessed(text: str) -> str:
    if SHELL.match(text) or re.match("[A-Z]=", text):
        return "sh"
    if re.search("^steps:", text, re.MULTILINE):
        return "yaml"
    try:
        compile(text, "-", "exec")
    except SyntaxError:
        return "text"
    return "python"


def commands(page: Path) -> Iterator[tuple[str, str, int]]:
    """Where, the words, and the exit code that a comment tells (`# exit 1`)."""
    for block in blocks(page):
        if block.language == "sh":
            for line in block.text.replace("\\\n", " ").splitlines():
                code = re.search(r"# exit (\d+)$", line)
                for part in re.split(r" && | \| ", " ".join(shlex.split(line, comments=True, posix=False))):
                    if part and not re.match("[A-Z]=", part):
                        yield block.where, part, int(code[1]) if code else 0


def reason(command: str) -> str | None:
    return next((start for start in ELSEWHERE if command.startswith(start)), None)


@pytest.fixture
def world(hub: Hub, net: Any, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Any) -> Path:
    """A folder with what the pages name, and a hub that has org/name."""
    monkeypatch.chdir(tmp_path)
    model = write_tiny(tmp_path / "model")
    hub.put({path.name: path.read_bytes() for path in model.iterdir() if path.is_file()})
    for name in ("RECIPE.yaml", "small.yaml"):
        (tmp_path / name).write_text(RECIPE)
    text = (BUNDLED.parent / "shakespeare" / "validation.txt").read_text()
    (tmp_path / "text.txt").write_text(text[:6000])
    (tmp_path / "held-out.txt").write_text(text[6000:9000])
    (tmp_path / "lpsparse-demo").mkdir()
    lpsparse.prune(LLAMA, "lpsparse-demo/dense", sparsity=0)
    for out in ("lpsparse-demo/sparse", "written"):
        lpsparse.prune(LLAMA, out, sparsity=0.8, allow_empty=True)
    for name, value in FEW.items():
        monkeypatch.setenv(f"LPSPARSE_{name}", value)
    return tmp_path


def filled(command: str, number: int) -> list[str]:
    """The words as a person would have them, with real things in the places that the pages leave open."""
    words = shlex.split(re.sub(r"[\[\]](?!\d)", "", command))
    checks = words[1] in ("report", "verify")  # of a folder that lpsparse wrote
    known = {
        "MODEL": LLAMA,
        "BASE": LLAMA,
        "SOURCE": LLAMA,
        "FOLDER": "written",
        "OUT": f"out-{number}",
        "DATA": "text.txt",
        "DIR": ".",
        "TASK": "causal-lm",
        "data=./folder": "data=text.txt",
        "model=./folder": "model=model",
    }
    words = [
        "written" if checks and i == 2 and word == "MODEL" else known.get(word, word)
        for i, word in enumerate(words)
    ]
    for flag in ("--steps", "--epochs"):
        if flag in words:
            del words[words.index(flag) : words.index(flag) + 2]
    return words[1:]


def with_code(language: str) -> list[Path]:
    pages = [page for page in PAGES if page.name not in PAGES_ELSEWHERE]
    return [page for page in pages if any(block.language == language for block in blocks(page))]


@pytest.mark.parametrize("page", with_code("sh"), ids=lambda page: page.name)
def test_every_command_of_a_page_does_what_the_page_says(
    page: Path, world: Path, cli: Callable[..., Ran]
) -> None:
    wrong: list[str] = []
    for number, (where, command, code) in enumerate(commands(page)):
        if reason(command) is None:
            assert command.startswith("lpsparse "), f"{where}: {command}: say in ELSEWHERE why it is not run"
            shutil.rmtree("lpsparse-run", ignore_errors=True)  # recipes begin anew
            ran = cli(*filled(command, number))
            if ran.rc != EXITS.get(command, code) or "was trained on" in ran.stderr:  # measured on new data
                wrong.append(f"{where}: {command}\n  {ran.rc}: {ran.stderr}")
    assert not wrong, "\n".join(wrong)


def written(page: Path) -> Iterator[str]:
    """The folders that a page's commands, recipes and snippets leave behind."""
    for words in (command.split() for _, command, _ in commands(page) if command.startswith("lpsparse ")):
        if words[1] in ("finetune", "prune", "pack", "unpack") and "--dry-run" not in words:
            yield words[3]
        yield from (after for word, after in pairwise(words) if word == "--out")
    for block in blocks(page):
        if block.language == "yaml":
            yield yaml.safe_load(block.text).get("out", "lpsparse-run")
        if block.language == "python":
            calls = r'(?:prune|pack|unpack|finetune)\(\s*"[^"]*",\s*"([^"]*)"|save_pretrained\("([^"]*)"'
            yield from {one or other for one, other in re.findall(calls, block.text)}


def test_pages_followed_one_after_another_in_one_folder_do_not_meet() -> None:
    owners: dict[str, str] = {}
    for page in (page for page in PAGES if page.name not in PAGES_ELSEWHERE):
        for name in written(page):
            assert name == "OUT" or owners.setdefault(name, page.name) == page.name, f"{page.name}: {name}"
    assert len(owners) > 20


def test_what_is_not_run_here_stands_in_a_page() -> None:
    found = [command for page in with_code("sh") for _, command, _ in commands(page)]
    assert {reason(command) for command in found} - {None} == set(ELSEWHERE)
    assert set(EXITS) <= set(found) and len(found) > 50


@pytest.fixture
def names(world: Path) -> dict[str, Any]:
    """What a training script has when it comes to lpsparse."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(BUNDLED)
    rows = [{"input_ids": torch.arange(8) + i, "labels": torch.arange(8) + i} for i in range(20)]
    batches = [{name: value[None] for name, value in row.items()} for row in rows]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    return {
        "torch": torch,
        "lpsparse": lpsparse,
        "model": model,
        "dataset": rows,
        "batches": batches,
        "optimizer": optimizer,
        "params": model.parameters(),
    }


@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")  # the Trainer's, without a GPU
@pytest.mark.parametrize("page", with_code("python"), ids=lambda page: page.name)
def test_the_python_of_a_page_runs_from_top_to_bottom(page: Path, names: dict[str, Any]) -> None:
    for block in blocks(page):
        if block.language == "python":
            text = re.sub(r"steps=\d+", "steps=20", block.text)
            exec(compile(text, block.where, "exec"), names)


def test_every_table_of_settings_is_one(tmp_path: Path) -> None:
    for block in (block for page in PAGES for block in blocks(page)):
        known = block.where.split(":")[0] in PAGES_ELSEWHERE
        assert known or block.language in ("sh", "python", "text", "json", "yaml"), block.where
        if block.language == "json":
            json.loads(block.text)
        if block.language == "yaml" and "steps" in yaml.safe_load(block.text):
            (tmp_path / "recipe.yaml").write_text(block.text)
            read_recipe(tmp_path / "recipe.yaml", {})


def options() -> dict[str, set[str]]:
    from typer.main import get_command

    from lpsparse.cli.main import build_app

    found = {
        " ".join(path[1:]): {
            word for each in command.params for word in (*each.opts, *each.secondary_opts) if word[0] == "-"
        }
        for path, command in hooks().commands(get_command(build_app()), ("lpsparse",))
    }
    return {name: {*words, "--help"} for name, words in found.items()}


def hooks() -> Any:
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import hooks
    finally:
        sys.path.pop(0)
    return hooks


def test_every_option_in_prose_is_one_of_the_command_that_it_is_said_of() -> None:
    known = options()
    every = {"--debug", "--version", *(word for words in known.values() for word in words)}
    for page in (page for page in PAGES if page.name not in PAGES_ELSEWHERE):
        text = re.sub(r"^```.*?^```|^    .*?$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
        for said in re.findall(r"`([^`\n]*)`", text):
            words = [word.strip("()[],;") for word in said.split() if word.startswith("--")]
            command = max(
                (name for name in known if f"{said} ".startswith((f"lpsparse {name} ", f"{name} "))),
                key=len,
                default="",
            )
            allowed = known.get(command, every)
            strange = [word for word in words if re.match("--[a-z]", word) and word not in allowed]
            assert not strange or "mkdocs" in said, f"{page.name}: {said}"
            assert command or not said.startswith("lpsparse ") or "COMMAND" in said, f"{page.name}: {said}"


def test_the_reference_has_every_command_option_and_exit_code() -> None:
    page = hooks().reference()
    for command, words in options().items():
        part = page.partition(f"## {command}\n")[2].partition("\n## ")[0]
        assert [word for word in words - {"--help"} if word not in part] == [], command
    for code in lpsparse.ExitCode:
        assert f"| {int(code)} | {code.name.lower()} | {MEANINGS[code]} |" in page


def test_the_site_shows_the_environment_and_the_promises_that_help_prints() -> None:
    topics = {name: text.partition("\n")[2].strip() for name, text in read_topics().items()}
    assert topics["environment"] in hooks().reference()
    promises = (ROOT / "docs" / "promises.md").read_text("utf-8")
    assert topics["promises"] in hooks().on_page_markdown(promises)


def test_every_link_leads_to_a_file_of_the_checkout_and_a_heading() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
            if target.startswith("https://"):
                continue
            file, _, anchor = target.partition("#")
            there = page.parent / file if file else page
            assert there.is_file(), f"{page.name}: {target}: a page that the site alone has is not linked"
            text = there.read_text("utf-8")
            heads = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
            slugs = {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", head).strip().lower()) for head in heads}
            assert not anchor or anchor in slugs, f"{page.name}: {target}"


def build(to: Path) -> subprocess.CompletedProcess[str]:
    dead = {"HTTP_PROXY": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9"}
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(to)]
    env = {**os.environ, **dead, "PYTHONPATH": str(ROOT)}
    return subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(find_spec("material") is None, reason="needs `pip install '.[docs]'`, as .ci/run does")
def test_the_pages_build_without_a_warning_and_ask_nobody_when_they_are_read(tmp_path: Path) -> None:
    built = build(tmp_path / "site")
    assert built.returncode == 0, built.stderr
    pages = list((tmp_path / "site").glob("*.html"))
    assert {page.stem for page in PAGES[1:]} | {"reference"} <= {page.stem for page in pages}
    for page in pages:
        fetched = FETCHED.findall(page.read_text("utf-8"))
        assert fetched and not [each for each in fetched if re.match("(https?:)?//", each)], page.name
    assert not list((tmp_path / "site").glob("*.py"))
