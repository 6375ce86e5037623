"""Settings of push."""

import re
from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, Field, model_validator

from lpsparse.steps.base import THREADS, Step


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

    folder: Path = Field(description="Folder that lpsparse wrote.")
    repo: Annotated[str, AfterValidator(_repo)] = Field(
        description="Model repository org/name; it is made if it is not there."
    )
    private: bool = Field(False, description="Make it private; one that is public already is refused.")
    revision: Annotated[str, AfterValidator(_branch)] | None = Field(
        None, description="Branch, made from main if it is not there. Default: main."
    )
    message: str = Field("Upload with lpsparse", min_length=1, description="What the commit says.")
    create_pr: bool = Field(False, description="Open a pull request in place of a commit to main.")
    delete_others: bool = Field(
        False,
        description="Delete in the same commit what is in REPO and not in FOLDER (hidden files stay, and all "
        "stays in the history). Without it, weights there that FOLDER has not are refused.",
    )
    threads: int | None = THREADS
    dry_run: bool = Field(False, description="Check FOLDER and list what would be sent; ask nobody.")

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if self.create_pr and self.revision not in (None, "main"):
            raise ValueError("--create-pr asks for a merge into main: leave --revision out")
        return self
