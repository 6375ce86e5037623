"""Check a folder against its manifest, and what it was cut from."""

import os
from pathlib import Path
from typing import Any

from lpsparse.checkpoint.files import MANIFEST
from lpsparse.checkpoint.names import components_in
from lpsparse.checkpoint.open import open_checkpoint
from lpsparse.commands.artefact import Say
from lpsparse.commands.base import on_threads, opened, silent
from lpsparse.errors import InputError
from lpsparse.reporting.check import check_against, check_folder
from lpsparse.steps.report import VerifyStep


@on_threads
def verify_step(step: VerifyStep, say: Say = silent) -> dict[str, Any]:
    """Of a diffusers pipeline all components that lpsparse wrote."""
    parts = [] if (Path(step.model) / MANIFEST).is_file() else components_in(Path(step.model))
    ours = [name for name in parts if (Path(step.model) / name / MANIFEST).is_file()]
    if not ours:
        return _verify(step, say)
    if others := [name for name in parts if name not in ours]:
        say(f"not checked, as lpsparse did not write them: {', '.join(others)}")
    each: dict[str, dict[str, Any]] = {}
    for name in ours:
        source = None if step.source is None else os.path.join(step.source, name)
        place = {"model": os.path.join(step.model, name), "source": source}
        each[name] = _verify(step.model_copy(update=place), say)
    problems = [f"{name}: {problem}" for name, found in each.items() for problem in found["problems"]]
    sums = {key: sum(found[key] for found in each.values()) for key in ("files", "tensors")}
    return {"ok": not problems, **sums, "problems": problems}


def _verify(step: VerifyStep, say: Say) -> dict[str, Any]:
    folder = Path(step.model)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "no such folder"
        raise InputError(327, f"{folder}: {what}", hint="give a folder that lpsparse wrote")
    found = check_folder(folder)
    if step.source is not None and found["ok"]:
        found["problems"] = list(
            check_against(open_checkpoint(folder), opened(step.source, say, key=step.key))
        )
        found["ok"] = not found["problems"]
    return found
