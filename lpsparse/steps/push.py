"""Settings of push."""

import re
from pathlib import Path
from typing import Annotated, ClassVar, Self

from pydantic import AfterValidator, model_validator

from lpsparse.steps.base import THREADS, Setting, Step


def _repo(value: str) -> str:
    if not _REPO.fullmatch(value) or "--" in value or ".." in value or value.endswith(".git"):
        at = " (a branch goes into --revision)" if "@" in value else ""
        at = at or (" (your user name goes before it)" if "/" not in value else "")
        raise ValueError(f"REPO {value!r}: not org/name, of letters, digits and -_.{at}")
    return value


def _branch(value: str) -> str:
    if not value or not value[0].isalnum() or any(c.isspace() or c in "~^:?*[\\" for c in value):
        raise ValueError(f"--revision {value!r}: not the name of a branch")
    if re.fullmatch("[0-9a-f]{40}", value):
        raise ValueError(f"--revision {value}: a commit; a branch is needed to add one to")
    return value


_REPO = re.compile(r"\w(?:[\w.-]{0,94}\w)?/\w(?:[\w.-]{0,94}\w)?", re.ASCII)


class PushStep(Step):
    """Upload a folder that lpsparse wrote to the Hugging Face hub: checked, in one commit, compared there."""

    command: ClassVar[str] = "push"

    folder: Path = Setting(help="Folder that lpsparse wrote.", panel="Arguments")
    repo: Annotated[str, AfterValidator(_repo)] = Setting(
        help="Model repository org/name; created if it does not exist.", panel="Arguments"
    )
    private: bool = Setting(
        False, help="Make the repository private; refused if it is public already.", panel="Output"
    )
    revision: Annotated[str, AfterValidator(_branch)] | None = Setting(
        None,
        help="Branch to commit to, created from main if it does not exist. Default: main.",
        panel="Output",
    )
    message: str = Setting("Upload with lpsparse", min_length=1, help="Commit message.", panel="Output")
    create_pr: bool = Setting(
        False, help="Open a pull request instead of committing to main.", panel="Output"
    )
    delete_others: bool = Setting(
        False,
        help="Delete files in REPO that are not in FOLDER, in the same commit (not hidden files; the "
        "history keeps all). Without it, other weight files in REPO are refused.",
        panel="Output",
    )
    threads: int | None = THREADS
    dry_run: bool = Setting(
        False,
        help="Check FOLDER and list the files that would be uploaded; make no requests.",
        panel="Output",
        local=True,
    )

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if self.create_pr and self.revision not in (None, "main"):
            raise ValueError("--create-pr asks for a merge into main: leave --revision out")
        return self
