"""The files beside the code (forms, workflows, hooks, citation, changelog) are valid and name what exists."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.files import ROOT

import lpsparse
from lpsparse.cli.main import build_app

GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
FORMS = sorted(path for path in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")
RUNNERS = {"cd", "edges=(borrowed", "mapfile", "mkdocs", "pip", "pyright", "pytest", "python", "ruff", "test"}


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text("utf-8"))


@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.stem)
def test_an_issue_form_has_what_the_host_requires(form: Path) -> None:
    found = read(form)
    assert {"name", "description", "body"} <= set(found)
    for each in found["body"]:
        attributes = each["attributes"]
        assert "value" in attributes if each["type"] == "markdown" else {"label"} <= set(attributes)
    ids = [each["id"] for each in found["body"] if each["type"] != "markdown"]
    assert len(ids) == len(set(ids)) and any(each.get("validations") for each in found["body"])


def test_a_bug_report_asks_for_what_doctor_prints() -> None:
    (asked,) = (
        each for each in read(GITHUB / "ISSUE_TEMPLATE" / "bug.yml")["body"] if each.get("id") == "doctor"
    )
    assert asked["validations"] == {"required": True} and "lpsparse doctor" in asked["attributes"]["label"]


def steps(path: Path) -> list[dict[str, Any]]:
    return [step for job in read(path)["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_reads_only_and_its_commands_and_files_exist(workflow: Path) -> None:
    from typer.main import get_command

    found = read(workflow)
    assert found["permissions"] == {"contents": "read"} and found[True]  # `on` is true in YAML 1.1
    known: Any = get_command(build_app())
    text = "\n".join(step["run"] for step in steps(workflow) if "run" in step)
    assert "${{" not in text.replace("${{ matrix.python }}", "")
    for command in re.findall(r"lpsparse\"? (\w+)", text):
        assert command in known.commands, command
    for name in re.findall(r"(?<![\w/])(?:\.ci|tests|benchmarks|recipes)/[\w./-]+\w", text):
        assert (ROOT / name).is_file(), name
    for line in filter(str.strip, text.splitlines()):
        first = line.strip().split()[0].rpartition("/")[2].strip('"')
        assert first in RUNNERS | {"lpsparse"}, line
    assert all(
        "run" in step or re.fullmatch(r"\./|[\w-]+/[\w-]+@v\d+", step["uses"]) for step in steps(workflow)
    )


def test_the_workflow_of_the_oldest_releases_runs_the_edges_of_the_ci_script() -> None:
    edges = re.compile(r"edges=\(([\w ]+)\)")
    (ours,) = edges.findall((ROOT / ".ci" / "run").read_text())
    (theirs,) = edges.findall((GITHUB / "workflows" / "tests.yml").read_text())
    assert ours == theirs
    assert all(list((ROOT / "tests").rglob(f"test_{name}.py")) for name in ours.split())


def test_the_workflow_of_the_action_gives_inputs_that_it_has() -> None:
    action = read(ROOT / "action.yml")
    used = [step for step in steps(GITHUB / "workflows" / "action.yml") if step.get("uses") == "./"]
    assert len(used) == 2 and all(set(step["with"]) <= set(action["inputs"]) for step in used)


def test_pre_commit_runs_ruff_and_pyright() -> None:
    hooks = [hook for repo in read(ROOT / ".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    assert [hook["entry"].split()[0] for hook in hooks] == ["ruff", "ruff", "pyright"]
    assert all({"id", "name", "entry", "language"} <= set(hook) for hook in hooks)


def test_the_citation_has_the_required_keys_and_both_papers() -> None:
    found = read(ROOT / "CITATION.cff")
    assert found["cff-version"] == "1.2.0" and {"message", "title", "authors"} <= set(found)
    assert [each["identifiers"][0]["value"] for each in found["references"]] == [
        "arXiv:2404.10824",
        "arXiv:2409.03424",
    ]
    assert all({"type", "title", "authors"} <= set(each) for each in found["references"])


def test_the_changelog_begins_with_the_version_that_is_cited_and_has_short_lines() -> None:
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    versions = re.findall(r"^## (\d+\.\d+\.\d+)", text, flags=re.MULTILINE)
    assert versions[0] == read(ROOT / "CITATION.cff")["version"] and lpsparse.__version__ in versions
    long = [
        line for line in re.findall(r"^- (.*(?:\n  .*)*)", text, flags=re.MULTILINE) if len(line.split()) > 25
    ]
    assert long == []
