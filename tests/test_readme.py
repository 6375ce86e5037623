"""README and CONTRIBUTING name what is there, and nothing else."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAP = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_the_map_has_a_line_for_every_folder_of_code_and_no_other() -> None:
    named = re.findall(r"^\| `(lpsparse/[\w/]+)` \|", MAP, re.MULTILINE)
    found = {path.parent.relative_to(ROOT).as_posix() for path in (ROOT / "lpsparse").rglob("*.py")}
    assert set(named) == found - {"lpsparse"} | {"lpsparse/bundled"} and len(named) == len(set(named))


def test_every_recipe_and_document_that_the_readme_names_is_there() -> None:
    named = re.findall(r"`(recipes/[\w.-]+|lpsparse/bundled/[\w.-]+)`|\((docs/[\w.-]+)\)", README)
    assert len(named) >= 6
    assert [name for pair in named for name in pair if name and not (ROOT / name).exists()] == []


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_every_recipe_is_valid_and_fails_early_with_a_hint_when_its_model_is_not_here(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from lpsparse import ExitCode, LpsparseError, check_recipe
    from lpsparse.recipes.file import read_recipe

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    read = read_recipe(recipe, {})
    try:
        assert len(check_recipe(recipe, {"out": str(tmp_path / "out")})["steps"]) == len(read.steps)
    except LpsparseError as error:
        assert error.exit_code in (ExitCode.REMOTE, ExitCode.INPUT) and error.hint
