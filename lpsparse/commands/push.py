"""Upload a folder that lpsparse wrote to the hub."""

from lpsparse.checkpoint.files import MANIFEST
from lpsparse.checkpoint.manifest import FileRecord, read_manifest
from lpsparse.commands.artefact import Say
from lpsparse.commands.base import silent
from lpsparse.commands.results import FileSize, Upload, UploadPreview
from lpsparse.commands.verify import verify_step
from lpsparse.errors import VerdictError
from lpsparse.reporting import text
from lpsparse.steps.push import PushStep
from lpsparse.steps.report import VerifyStep


def push_step(step: PushStep, say: Say = silent, *, bars: bool = False) -> Upload:
    """Upload the folder; `bars` lets huggingface_hub draw its progress.

    Raises VerdictError where the folder is not what its manifest says.
    """
    from lpsparse.hub.push import Target, check_access, push_files

    if step.folder.is_dir():
        read_manifest(step.folder)
        check_access()  # both at once, the hashes take their time
    files, _ = _chosen(step, say)
    to = Target(step.repo, step.revision, step.private, step.message, step.create_pr, step.delete_others)
    return Upload(**push_files(step.folder, files, to, say, bars=bars))


def preview(step: PushStep, say: Say = silent) -> UploadPreview:
    """What `push_step` would send. Makes no request."""
    files, stay = _chosen(step, say)
    names = tuple(FileSize(record.name, record.size) for record in files)
    return UploadPreview(step.repo, len(files), sum(record.size for record in files), names, stay)


def _chosen(step: PushStep, say: Say) -> tuple[tuple[FileRecord, ...], tuple[str, ...]]:
    """The files to send, and the names of those that stay, after all were compared with the manifest."""
    from lpsparse.hub.push import choose_files

    folder = step.folder
    found = verify_step(VerifyStep(model=str(folder), source=None, key=None, threads=step.threads), say)
    if not found.ok:
        what = f"{folder}: is not what {MANIFEST} says: {found.problems[0]}"
        raise VerdictError(102, what, hint="write it again; nothing was sent")
    files, stay = choose_files(folder)
    size = sum(record.size for record in files)
    if stay:
        say(f"not sent: {', '.join(stay)}")
    say(f"{len(files)} files, {text.size(size)}, to {step.repo}")
    return files, stay
