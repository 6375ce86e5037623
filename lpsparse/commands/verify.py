"""Check a folder against its manifest, and what it was cut from."""

import os
from pathlib import Path

from lpsparse.checkpoint.files import MANIFEST
from lpsparse.checkpoint.manifest import read_manifest
from lpsparse.checkpoint.names import components_in
from lpsparse.checkpoint.open import open_checkpoint
from lpsparse.commands.artefact import Say
from lpsparse.commands.base import on_threads, opened, silent
from lpsparse.commands.checks import Checked, Held
from lpsparse.commands.results import Verification
from lpsparse.errors import InputError
from lpsparse.reporting.check import check_against, check_folder
from lpsparse.steps.report import VerifyStep


@on_threads
def verify_step(step: VerifyStep, say: Say = silent) -> Verification:
    """Of a diffusers pipeline all components that lpsparse wrote."""
    parts = [] if (Path(step.model) / MANIFEST).is_file() else components_in(Path(step.model))
    ours = [name for name in parts if (Path(step.model) / name / MANIFEST).is_file()]
    if not ours:
        return _verify(step, say)
    if others := [name for name in parts if name not in ours]:
        say(f"not checked (not written by lpsparse): {', '.join(others)}")
    each: dict[str, Verification] = {}
    for name in ours:
        source = None if step.source is None else os.path.join(step.source, name)
        place = {"model": os.path.join(step.model, name), "source": source}
        each[name] = _verify(step.model_copy(update=place), say)
    problems = tuple(f"{name}: {problem}" for name, found in each.items() for problem in found.problems)
    files, tensors = (sum(getattr(found, key) for found in each.values()) for key in ("files", "tensors"))
    return Verification(not problems, files, tensors, problems)


def check(step: VerifyStep, held: Held) -> Checked:
    """Raises InputError where there is no manifest, and no earlier step makes one."""
    if not held.made:
        read_manifest(Path(step.model))
    return Checked(renamed=held.renamed)


def _verify(step: VerifyStep, say: Say) -> Verification:
    folder = Path(step.model)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "no such folder"
        raise InputError(327, f"{folder}: {what}", hint="give a folder that lpsparse wrote")
    found = check_folder(folder)
    if step.source is not None and found["ok"]:
        found["problems"] = list(
            check_against(open_checkpoint(folder), opened(step.source, say, key=step.key))
        )
    problems = tuple(found["problems"])
    return Verification(not problems, found["files"], found["tensors"], problems)
