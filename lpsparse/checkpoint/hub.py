"""Files from the Hugging Face hub: the cache first, the network second, never when offline is asked for."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lpsparse.borrowed import borrow
from lpsparse.checkpoint.names import WEIGHT_SUFFIXES, find_weight_names, is_index
from lpsparse.errors import RemoteError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")
_FILE_SUFFIXES = (*WEIGHT_SUFFIXES, ".json", ".yaml", ".yml")
IGNORED = ["*.h5", "*.msgpack", "*.onnx", "*.gguf", "*.ot", "*.tflite", "*.mlmodel", "onnx/*", "openvino/*"]


def is_hub_id(text: str) -> bool:
    """Whether `org/name[@revision]` could be meant; a name that ends like a weight file is a path."""
    return HUB_ID.fullmatch(text) is not None and not text.lower().endswith(_FILE_SUFFIXES)


def is_remote(text: str, kind: str = "model") -> bool:
    """Whether it is the hub id of a model (or dataset) that would have to be downloaded. Asks nobody."""
    if os.path.lexists(text) or not is_hub_id(text):
        return False
    try:
        folder = _snapshot(text, kind, local=True)
        return kind == "model" and not _has_weights(folder)
    except (OSError, ValueError):  # ValueError: no such name can be
        return True


def fetch(text: str, *, kind: str = "model", replace_with: str = "a local folder") -> tuple[Path, str]:
    """The local snapshot of `org/name[@revision]` and the commit it is at.

    `kind` is model or dataset. HF_HUB_OFFLINE is honoured by huggingface_hub. Raises RemoteError (exit 8).
    """
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        try:
            folder = _snapshot(text, kind, local=True)
        except LocalEntryNotFoundError:
            folder = _snapshot(text, kind, local=False)
        if kind == "model" and not _has_weights(folder):  # another program may have fetched the config alone
            folder = _snapshot(text, kind, local=False)
    except (http_error(), OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        what = f"{text}: the {kind} is not in the local cache, and the hub did not return it ({reason[:120]})"
        raise RemoteError(801, what, hint=f"check id and network, or give {replace_with}") from error
    if kind == "model" and not _has_weights(folder):
        what = f"{text}: no weights: the local cache is incomplete, or the repository has none"
        raise RemoteError(802, what, hint=f"go online, check the id, or give {replace_with}")
    return folder, folder.name


def http_error() -> type[Exception]:
    """What the hub's HTTP client raises, of which huggingface_hub's own errors are one kind."""
    from huggingface_hub.errors import HfHubHTTPError

    own = ("builtins", "huggingface_hub")
    return [kind for kind in HfHubHTTPError.__mro__ if kind.__module__.partition(".")[0] not in own][-1]


_SETTINGS: dict[str, Callable[[], Any]] = {  # of huggingface_hub, as its documentation has them
    "ENDPOINT": lambda: os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/"),
    "HF_HUB_CACHE": lambda: str(_cache()),
    "HF_HUB_DISABLE_PROGRESS_BARS": lambda: _switch("HF_HUB_DISABLE_PROGRESS_BARS"),
    "HF_HUB_DOWNLOAD_TIMEOUT": lambda: int(os.environ.get("HF_HUB_DOWNLOAD_TIMEOUT", 10)),
    "HF_HUB_OFFLINE": lambda: bool(_switch("HF_HUB_OFFLINE")),
}


def setting(name: str) -> Any:
    """A setting of huggingface_hub, one of _SETTINGS."""
    found = getattr(borrow("huggingface_hub.constants"), name, _SETTINGS)
    return _SETTINGS[name]() if found is _SETTINGS else found


def _cache() -> Path:
    """Without huggingface_hub, whose import takes 0.2 s that local files need not pay."""
    given = os.environ.get
    home = given("HF_HOME", f"{given('XDG_CACHE_HOME', '~/.cache')}/huggingface")
    cache = given("HF_HUB_CACHE", given("HUGGINGFACE_HUB_CACHE", f"{home}/hub"))
    return Path(os.path.expandvars(cache)).expanduser()


def _switch(name: str) -> bool | None:
    value = os.environ.get(name)
    return None if value is None else value.upper() in ("1", "ON", "YES", "TRUE")


def is_cached(path: Path) -> bool:
    """Whether a resolved path lies inside the hub's cache."""
    try:
        folder = _cache().resolve()
    except RuntimeError:  # there is no home
        return False
    return path == folder or folder in path.parents


def _snapshot(text: str, kind: str, *, local: bool) -> Path:
    from huggingface_hub import snapshot_download

    repo_id, _, revision = text.partition("@")
    return Path(
        snapshot_download(
            repo_id,
            repo_type=kind,
            revision=revision or None,
            ignore_patterns=IGNORED,
            etag_timeout=5,
            local_files_only=local,
        )
    )


def _has_weights(folder: Path) -> bool:
    """Whether what would be opened is there, of an index all that it names: a download may have been broken
    off."""
    return any(_is_whole(folder / name) for name in find_weight_names(os.listdir(folder)))


def _is_whole(path: Path) -> bool:
    if not is_index(path.name):
        return "-of-" not in path.name
    shards = set(re.findall(rb'"([^"/]+\.(?:safetensors|bin))"', path.read_bytes()))
    return bool(shards) and all((path.parent / os.fsdecode(name)).exists() for name in shards)
