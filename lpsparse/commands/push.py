"""Upload a folder that lpsparse wrote to the hub."""

from typing import Any

from lpsparse.checkpoint.files import MANIFEST
from lpsparse.checkpoint.manifest import read_manifest
from lpsparse.commands.artefact import Say
from lpsparse.commands.base import silent
from lpsparse.commands.verify import verify_step
from lpsparse.errors import VerdictError
from lpsparse.reporting import text
from lpsparse.steps.push import PushStep
from lpsparse.steps.report import VerifyStep


def push_step(step: PushStep, say: Say = silent, *, bars: bool = False) -> dict[str, Any]:
    """With dry_run: {"files", "bytes", "names", ...}, and nobody is asked. `bars` lets huggingface_hub draw.

    Raises VerdictError where the folder is not what its manifest says.
    """
    from lpsparse.hub.push import Target, check_access, choose_files, push_files

    folder = step.folder
    if folder.is_dir() and not step.dry_run:
        read_manifest(folder)
        check_access()  # both at once, the hashes take their time
    found = verify_step(VerifyStep(model=str(folder), source=None, key=None, threads=step.threads), say)
    if not found["ok"]:
        what = f"{folder}: is not what {MANIFEST} says: {found['problems'][0]}"
        raise VerdictError(102, what, hint="write it again; nothing was sent")
    files, stay = choose_files(folder)
    size = sum(record.size for record in files)
    if stay:
        say(f"not sent: {', '.join(stay)}")
    say(f"{len(files)} files, {text.size(size)}, to {step.repo}")
    if step.dry_run:
        names = [{"name": record.name, "bytes": record.size} for record in files]
        return {"repo": step.repo, "files": len(files), "bytes": size, "names": names, "not_sent": stay}
    to = Target(step.repo, step.revision, step.private, step.message, step.create_pr, step.delete_others)
    return push_files(folder, files, to, say, bars=bars)
