"""Open a checkpoint on the hub from its headers alone: no weights are fetched.

Nothing from the network is trusted. An answer is capped in bytes and seconds, a server that sends a complete
file for a range is left after that range (HfApi.get_safetensors_metadata would read all of it), and headers
and index go through the checks of files on disk.
"""

from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Annotated
from urllib.parse import quote

from pydantic import BaseModel, Field, ValidationError

from lpsparse.checkpoint.foreign import refuse_hollow
from lpsparse.checkpoint.header import MAX_HEADER_BYTES, Header, check_header
from lpsparse.checkpoint.hub import IGNORED, http_error, setting
from lpsparse.checkpoint.layouts.retired import find_packed
from lpsparse.checkpoint.names import TORCH_SUFFIXES, WEIGHT_SUFFIXES, find_weight_names, is_index
from lpsparse.checkpoint.open import Checkpoint, check_index, check_name, parse_index
from lpsparse.checkpoint.tensors import Blocks, Tensor
from lpsparse.errors import InputError, RemoteError
from lpsparse.parallel.threads import parallel

_PATIENCE = 6  # an answer may take so many times what huggingface_hub waits for its next byte (10 s)
_WAITING = 4  # headers are fetched by so many threads more than there are cores: they wait for the network
_DOWNLOAD = "`hf download {}` first: then the dry run reads the weights themselves"


@dataclass(frozen=True, slots=True)
class Remote:
    checkpoint: Checkpoint  # its tensors cannot be read
    files: dict[str, int]  # bytes of each weight file
    download_bytes: int  # what fetching all of it takes
    sidecar_bytes: int  # what of that are no weights


class _File(BaseModel):
    rfilename: str
    size: Annotated[int, Field(ge=0, lt=2**60)]


class _Listing(BaseModel):
    sha: Annotated[str, Field(pattern="^[0-9a-f]{40}$")]
    siblings: tuple[_File, ...]


def read_remote(text: str, weights: str | None = None) -> Remote:
    """The checkpoint `org/name[@revision]` as its headers tell it; of several the one that `weights` names.

    Raises RemoteError when the hub does not give them, InputError for what is missing, broken or hostile.
    """
    from huggingface_hub.utils import filter_repo_objects

    name = text.partition("@")[0]
    commit, sizes = _list(text)
    root, file = Path(name), _find_weights(text, sizes, weights)
    try:
        headers = _read_headers(root, commit, file, sizes)
    except InputError as error:
        error.hint = "choose another revision, or tell its owner"
        raise
    legacy = find_packed(entry.name for header in headers.values() for entry in header.entries)
    for path, header in headers.items():
        if legacy or any(key.startswith("lpsparse.") for key in header.metadata):
            by = "compressed-tensors" if legacy else "lpsparse"
            what = f"{path}: packed by {by}: the shapes of its tensors are not in its header"
            raise InputError(346, what, hint=_DOWNLOAD.format(text.replace("@", " --revision ")))
    tensors = [
        Tensor(entry.name, entry.dtype, entry.shape, path.name, "dense", entry.nbytes, _no_weights)
        for path, header in headers.items()
        for entry in header.entries
    ]
    refuse_hollow(name, tensors)
    metadata = {path.name: header.metadata for path, header in headers.items()}
    fetched = {each: sizes[each] for each in filter_repo_objects(sizes, ignore_patterns=IGNORED)}
    return Remote(
        Checkpoint(name, None, (), tuple(tensors), metadata, commit),
        {path.name: sizes[path.name] for path in headers},
        sum(fetched.values()),
        sum(size for each, size in fetched.items() if not each.endswith(WEIGHT_SUFFIXES)),
    )


def _list(text: str) -> tuple[str, dict[str, int]]:
    """The commit of a revision, and the bytes of its files by name."""
    from huggingface_hub.utils import validate_repo_id

    name, _, revision = text.partition("@")
    try:
        validate_repo_id(name)
        url = f"{setting('ENDPOINT')}/api/models/{name}/revision/{quote(revision or 'main', safe='')}"
        answer = _get(text, f"{url}?blobs=true", MAX_HEADER_BYTES, None)
        found = _Listing.model_validate_json(answer, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        what = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise _refusal(text, f"cannot parse its list of files: {what}") from None
    except ValueError as error:  # a name that the hub's client refuses
        raise _refusal(text, str(error)) from None
    return found.sha, {file.rfilename: file.size for file in found.siblings}


def _find_weights(text: str, sizes: dict[str, int], weights: str | None) -> str:
    """The one index or weight file, as in a folder, where it has headers."""
    check_name(weights)
    if weights is not None and weights not in sizes:
        raise InputError(329, f"{text}: no {weights} there", hint="see the names of its files on the hub")
    present = find_weight_names([name for name in sizes if "/" not in name]) if weights is None else [weights]
    if len(present) > 1:
        hint = "name the one that is meant with --weights"
        raise InputError(328, f"{text}: several checkpoints there: {', '.join(present[:4])}", hint=hint)
    if not present or present[0].endswith((*TORCH_SUFFIXES, ".bin.index.json")):
        others = [name for name in sorted(sizes) if name.endswith(WEIGHT_SUFFIXES)][:4]
        what = f"{text}: no safetensors there, only {', '.join(others) or 'other files'}: no headers to read"
        raise InputError(345, what, hint=_DOWNLOAD.format(text.replace("@", " --revision ")))
    return present[0]


def _read_headers(root: Path, commit: str, weights: str, sizes: dict[str, int]) -> dict[Path, Header]:
    """The checked header of each weight file, by the name that errors give it."""
    from huggingface_hub import hf_hub_url

    def part(path: Path, first: int, count: int) -> bytes:
        url = hf_hub_url(root.as_posix(), path.name, revision=commit)
        found = _get(str(path), url, count, first) if count else b""
        if len(found) < count:
            raise _refusal(str(path), f"{len(found)} of {count} bytes came")
        return found

    def header(path: Path) -> Header:
        return check_header(path, sizes[path.name], lambda first, count: part(path, first, count))

    index: dict[Path, set[str]] | None = None
    if is_index(weights):
        if sizes[weights] > MAX_HEADER_BYTES:
            raise InputError(330, f"{root / weights}: larger than {MAX_HEADER_BYTES} bytes", hint="")
        index = parse_index(root / weights, part(root / weights, 0, sizes[weights]))
        missing = [path.name for path in index if path.name not in sizes]
        if missing:
            raise InputError(330, f"{root / weights}: shard {missing[0]!r} is missing", hint="")
    paths = [root / weights] if index is None else list(index)
    headers = dict(zip(paths, parallel(header, paths, waiting=_WAITING), strict=True))
    for path, tensors in (index or {}).items():
        check_index(path, tensors, {entry.name for entry in headers[path].entries})
    return headers


def _get(where: str, url: str, cap: int, first: int | None) -> bytes:
    """At most `cap` bytes of an answer; from byte `first` of the file on, where it is not None."""
    from huggingface_hub.utils import build_hf_headers, get_session

    seconds = setting("HF_HUB_DOWNLOAD_TIMEOUT")
    until = monotonic() + _PATIENCE * seconds
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if first is not None:
        headers["Range"] = f"bytes={first}-{first + cap - 1}"
    found = bytearray()
    try:
        with get_session().stream("GET", url, headers=headers, timeout=seconds) as answer:
            if answer.status_code not in (200, 206):
                said = answer.headers.get("X-Error-Message") or answer.reason_phrase
                raise _refusal(where, f"{answer.status_code} {said}")
            skip = (first or 0) if answer.status_code == 200 else 0  # a server that knows no parts
            for chunk in answer.iter_raw():
                found += chunk
                if len(found) >= skip + cap:
                    break
                if monotonic() > until:
                    raise _refusal(where, f"{len(found)} bytes in {_PATIENCE * seconds} s")
    except (http_error(), OSError) as error:
        raise _refusal(where, str(error).strip() or type(error).__name__) from error
    return bytes(found[skip : skip + cap])


def _refusal(where: str, reason: str) -> RemoteError:
    what = f"{where}: not in the local cache, and the hub did not return it ({reason.splitlines()[0][:160]})"
    return RemoteError(803, what, hint="check id, revision, token and network, or give a local folder")


def _no_weights(first: int = 0, last: int | None = None) -> Blocks:
    raise AssertionError("these tensors are known by their headers only")
