"""Push a folder that lpsparse wrote to the Hugging Face hub, in one commit that is read back and compared.

What goes out is what the manifest lists and is a part of a model (`names.is_part`), and the manifest itself:
no metrics, no marks, no hidden files but .gitattributes. huggingface_hub's own upload_folder makes several
commits of a large folder, so loaders could see a part of it; here all is sent first, and committed once.
"""

import hashlib
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

from lpsparse import __version__
from lpsparse.checkpoint.files import FOREIGN_WEIGHTS, MANIFEST
from lpsparse.checkpoint.hub import setting
from lpsparse.checkpoint.manifest import FileRecord, digest, read_manifest
from lpsparse.checkpoint.names import WEIGHT_SUFFIXES, as_left, is_part
from lpsparse.errors import OutputError, RemoteError
from lpsparse.hub.errors import LOG_IN, UNSEEN, UNSURE, asking, calm

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, ModelInfo


@dataclass(frozen=True, slots=True)
class Target:
    """The repository and how to push to it."""

    repo: str
    revision: str | None  # a branch; None: main
    private: bool
    message: str
    create_pr: bool
    delete_others: bool


def choose_files(folder: Path) -> tuple[tuple[FileRecord, ...], tuple[str, ...]]:
    """What of `folder` is sent, as it is described there: the parts of a model; and what is not, by name."""
    records = (*read_manifest(folder).files, digest(folder / MANIFEST, folder))
    sent = tuple(sorted((r for r in records if is_part(r.name)), key=lambda record: record.name))
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    others = present - {record.name for record in sent}
    return sent, tuple(sorted({as_left(name) for name in others}))


def check_access() -> None:
    """Raises RemoteError where nothing can be sent: offline, or without a token."""
    from huggingface_hub import get_token

    if setting("HF_HUB_OFFLINE"):
        raise RemoteError(
            804, "HF_HUB_OFFLINE is set: nothing can be sent", hint="unset it, or use --dry-run"
        )
    if get_token() is None:
        raise RemoteError(805, "not logged in to the hub: there is no token", hint=LOG_IN)


def push_files(
    folder: Path, files: tuple[FileRecord, ...], to: Target, say: Callable[[str], None], *, bars: bool
) -> dict[str, Any]:
    """Send `files` of `folder`, make the commit and compare it: {"url", "commit", "files", "bytes", ...}.

    `bars` has huggingface_hub draw its own. Raises RemoteError, and OutputError where the repository holds
    weights that are not to be mixed with these, or is public and should not be.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(token=True, library_name="lpsparse", library_version=__version__)
    with calm(bars, say):
        with asking(to.repo, UNSEEN):
            info, new, others = _prepare(api, to, [record.name for record in files], say)
            adds = [CommitOperationAdd(record.name, str(folder / record.name)) for record in files]
            _send(api, to, adds, say, bars=bars)
        with asking(to.repo, UNSURE):
            made = api.create_commit(
                to.repo,
                [*(CommitOperationDelete(name) for name in others), *adds],
                revision=to.revision,
                commit_message=to.message,
                create_pr=to.create_pr,
                parent_commit=info.sha,
            )
        with asking(to.repo, f"the commit {made.commit_url} was made, and is not verified"):
            _compare(api, to.repo, made, folder, files, others)
    if made.oid == info.sha:
        say("nothing has changed: no new commit")
    return {
        "url": made.commit_url,
        "commit": made.oid,
        "files": len(files),
        "bytes": sum(record.size for record in files),
        "repo": to.repo,
        "revision": to.revision or "main",
        "private": info.private,
        "new": new,
        "changed": made.oid != info.sha,
        "deleted": others,
        "pull_request": made.pr_url,
    }


def _send(
    api: "HfApi", to: Target, adds: "list[CommitOperationAdd]", say: Callable[[str], None], *, bars: bool
) -> None:
    """The bytes of all large files, weights one after another; what they belong to is the commit's to say."""

    def send(some: "list[CommitOperationAdd]") -> None:
        api.preupload_lfs_files(to.repo, some, revision=to.revision, create_pr=to.create_pr)

    weights = [add for add in adds if add.path_in_repo.endswith(WEIGHT_SUFFIXES)]
    for i, add in enumerate(weights):
        if not bars:
            say(f"sending {i + 1} of {len(weights)} weight files: {add.path_in_repo}")
        _wait_for(partial(send, [add]))
    _wait_for(partial(send, [add for add in adds if add not in weights]))


def _wait_for(call: Callable[[], None]) -> None:
    """Do it on a thread: where Xet's client, which is no Python, has the main one, that hears no Ctrl-C."""
    result: Future[None] = Future()

    def run() -> None:
        try:
            result.set_result(call())
        except Exception as error:
            result.set_exception(error)

    Thread(target=run, daemon=True).start()
    result.result()


def _prepare(
    api: "HfApi", to: Target, ours: Collection[str], say: Callable[[str], None]
) -> tuple["ModelInfo", bool, list[str]]:
    """The repository as it is, whether it is new, and the files in it that are to go. Refusals come first;
    then it is made, or its branch."""
    info, has_branch = _find(api, to)
    new = info is None
    if info is None:
        if to.create_pr:
            hint = "leave --create-pr out, and it is created"
            raise RemoteError(806, f"{to.repo}: no such repository to open a pull request in", hint=hint)
        say(f"creating {to.repo}")
        api.create_repo(to.repo, private=to.private or None)  # None: an organisation's own default
        info = api.model_info(to.repo, timeout=_timeout())
        say(f"{to.repo} is created, {'private' if info.private else 'public'}")
    elif to.private and not info.private:
        hint = "leave --private out, or make it private on the hub, or push to another name"
        raise OutputError(414, f"{to.repo}: exists and is public", hint=hint)
    there = [file.rfilename for file in info.siblings or ()]
    others = sorted(name for name in there if name not in ours and name[0] != ".")
    if not to.delete_others:
        _check_others(to.repo, others, say)
        others = []
    for name in others:
        say(f"{to.repo}: deleting {name}, which is not in FOLDER")
    if not has_branch:
        say(f"{to.repo}: creating branch {to.revision} from main")
        api.create_branch(to.repo, branch=to.revision or "main")
    return info, new, others


def _find(api: "HfApi", to: Target) -> "tuple[ModelInfo | None, bool]":
    """The repository at its branch, if it is there, and whether there is the branch (else it is at main)."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        return api.model_info(to.repo, revision=to.revision, timeout=_timeout()), True
    except RevisionNotFoundError:
        return api.model_info(to.repo, timeout=_timeout()), False
    except RepositoryNotFoundError as error:
        if error.response.status_code != 404:  # 401: the token is none; 403: gated
            raise
        return None, to.revision in (None, "main")


def _timeout() -> float:
    return setting("HF_HUB_DOWNLOAD_TIMEOUT")


def _check_others(repo: str, others: list[str], say: Callable[[str], None]) -> None:
    """Refuse weights beside ours, of which a loader may take the wrong ones; tell of other files."""
    weights = [name for name in others if name.endswith((*FOREIGN_WEIGHTS, ".index.json"))]
    if weights:
        named = ", ".join(weights[:4]) + (f" and {len(weights) - 4} more" if len(weights) > 4 else "")
        what = f"{repo}: holds other weights, which a loader may pick up: {named}"
        hint = "--delete-others removes them in the same commit (the history keeps them); or push elsewhere"
        raise OutputError(413, what, hint=hint)
    if others:
        say(f"{repo}: keeps {len(others)} files that are not in FOLDER: {', '.join(others[:4])}")


def _compare(
    api: "HfApi",
    repo: str,
    made: "CommitInfo",
    folder: Path,
    files: tuple[FileRecord, ...],
    deleted: list[str],
) -> None:
    """Raises RemoteError where a file of the commit is not the one described, by its size and hash."""
    from huggingface_hub.hf_api import RepoFile

    tree = api.list_repo_tree(repo, recursive=True, revision=made.pr_revision or made.oid)
    there = {item.path: item for item in tree if isinstance(item, RepoFile)}
    problems = [f"{name}: still there" for name in deleted if name in there]
    for record in files:
        found = there.get(record.name)
        if found is None:
            problems.append(f"{record.name}: missing")
        elif found.lfs is not None:
            if (found.lfs.size, found.lfs.sha256) != (record.size, record.sha256):
                problems.append(f"{record.name}: {found.lfs.size} bytes, sha256 {found.lfs.sha256[:12]}")
        elif not _is_blob(found.blob_id, folder / record.name, record):
            problems.append(f"{record.name}: {found.size} bytes, git's hash {found.blob_id[:12]}")
    if problems:
        what = f"{made.commit_url}: {len(problems)} differences from FOLDER: {'; '.join(problems[:3])}"
        raise RemoteError(810, what, hint="do not use that commit; push again")


def _is_blob(blob_id: str, path: Path, record: FileRecord) -> bool:
    """Whether git's hash is that of the described bytes. A small file: large ones are not git's."""
    data = path.read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    return blob == blob_id and hashlib.sha256(data).hexdigest() == record.sha256
