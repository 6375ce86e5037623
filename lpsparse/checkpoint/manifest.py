"""The manifest `lpsparse.json`: what OUT should be, so that anyone can check that it is. Written last."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from lpsparse import __version__
from lpsparse.checkpoint.files import MANIFEST, METRICS, OWNER, REPLACED, STATE, write_text
from lpsparse.checkpoint.header import unique_json
from lpsparse.checkpoint.tensors import Checkpoint
from lpsparse.errors import InputError
from lpsparse.parallel.progress import HASHED, advance
from lpsparse.parallel.threads import check_going_on, parallel

_READ_BYTES = 1 << 20  # that are hashed at a time
# Of records of which there is one a tensor: with slots they take a sixth of a BaseModel's memory.
OF_EACH = ConfigDict(extra="forbid", allow_inf_nan=False)


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class FileRecord(_Record):
    name: str  # relative to the folder, with forward slashes
    size: int  # bytes
    sha256: str


@dataclass(frozen=True, slots=True, config=OF_EACH)
class TensorRecord:
    name: str
    dtype: str
    shape: tuple[int, ...]
    layout: str
    prunable: bool
    reason: str  # why it is, or is not, prunable
    zeros: int  # exact zeros of either sign
    finite: bool | None  # None: the dtype has no Inf or NaN that we know


class Quality(_Record):
    """One figure of the weights: by `finetune`, before (as loaded) and after (as written), or by
    `eval --save`, before being that of the model that `--against` names."""

    metric: str
    before: float | None  # None: the checkpoint had no head for the task yet
    after: float
    higher_is_better: bool
    rows: int
    split: str
    before_error: float | None = None  # standard error of the mean; examples (tokens) taken as independent
    after_error: float | None = None
    data_sha256: str | None = None  # of the held-out data, and of the settings that decide what is measured
    of_cut: bool = False  # before is of a model that was cut already, and tells nothing of what that cost
    task: str | None = None
    data: str | None = None  # names of the files that were read
    before_of: str | None = None  # the model that --against named
    of_base: str | None = None  # BASE of a report, where before is what was recorded of it, on the same data


class Trained(_Record):
    """The data that one fine-tune trained on."""

    data: dict[str, str]  # file name -> sha256
    split: str = Field(pattern=r"^[^\[\]]+(\[\d{0,18}:\d{0,18}\])?$")
    set_aside: float | None  # the share of it that was held out; None: what was held out is other data


class EarlierStep(_Record):
    """A step that led to the source."""

    source: str  # the name of what it took
    recipe: dict[str, Any]


class Source(_Record):
    name: str
    revision: str | None
    files: tuple[FileRecord, ...]
    base: str  # the model that the chain of steps began with
    base_sha256: str | None = None  # of the hashes of its weight files


class Manifest(_Record):
    format_version: Literal[1] = 1
    lpsparse: str
    source: Source
    recipe: dict[str, Any]  # the resolved step, without paths of a machine
    layout: str
    files: tuple[FileRecord, ...]
    tensors: tuple[TensorRecord, ...]
    quality: tuple[Quality, ...] = ()
    notes: tuple[str, ...] = ()
    trained: tuple[Trained, ...] = ()  # by the steps that led here
    earlier: tuple[EarlierStep, ...] = ()  # first to last

    def as_earlier(self) -> EarlierStep:
        return EarlierStep(source=self.source.name, recipe=self.recipe)

    @property
    def training(self) -> dict[str, Any]:
        """Settings of the last fine-tune that led here; empty where none did."""
        last = last_training((*self.earlier, self.as_earlier()))
        return {} if last is None else last.recipe["finetune"]


def last_training(steps: Sequence[EarlierStep]) -> EarlierStep | None:
    return next((each for each in reversed(steps) if isinstance(each.recipe.get("finetune"), dict)), None)


def digest(path: Path, root: Path) -> FileRecord:
    sha256, held = hashlib.sha256(), memoryview(bytearray(_READ_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(held):
            check_going_on()
            sha256.update(held[:count])
            advance(count, HASHED)
    name = path.relative_to(root).as_posix()
    return FileRecord(name=name, size=path.stat().st_size, sha256=sha256.hexdigest())


def file_record(name: str, text: str) -> FileRecord:
    """`digest` of a file of this text, before it is written."""
    data = text.encode("utf-8")
    return FileRecord(name=name, size=len(data), sha256=hashlib.sha256(data).hexdigest())


def source_of(checkpoint: Checkpoint) -> Source:
    """Raises InputError where lpsparse wrote the checkpoint and a weight file has changed since."""
    files = tuple(parallel(lambda path: digest(path, path.parent), checkpoint.files))
    earlier = own_manifest(checkpoint)
    known = {} if earlier is None else {record.name: record for record in earlier.files}
    for record in files:
        if earlier is not None and record != known.get(record.name):
            what = f"{checkpoint.name}: {record.name} is not what {MANIFEST} describes"
            hint = f"write it again, or delete {MANIFEST} if you changed the weights on purpose"
            raise InputError(352, what, hint=hint)
    base = checkpoint.name if earlier is None else earlier.source.base
    known_base = hash_of(files) if earlier is None else earlier.source.base_sha256
    return Source(
        name=checkpoint.name, revision=checkpoint.revision, files=files, base=base, base_sha256=known_base
    )


def hash_of(files: tuple[FileRecord, ...]) -> str:
    """One hash for the contents of some files, whatever their names."""
    return hashlib.sha256("".join(sorted(each.sha256 for each in files)).encode()).hexdigest()


def own_manifest(checkpoint: Checkpoint) -> "Manifest | None":
    """The manifest of a folder that lpsparse wrote; None elsewhere."""
    folder = checkpoint.root
    return read_manifest(folder) if folder is not None and (folder / MANIFEST).is_file() else None


def list_files(folder: Path) -> list[Path]:
    """The files of OUT that are hashed: all but manifest, metrics, training states and our own mark."""
    unhashed = {MANIFEST, METRICS, OWNER, REPLACED, STATE}
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [path for path in found if path.relative_to(folder).parts[0] not in unhashed]


def write_manifest(
    folder: Path,
    source: Source,
    recipe: dict[str, Any],
    tensors: tuple[TensorRecord, ...],
    layout: str,
    quality: tuple[Quality, ...] = (),
    notes: tuple[str, ...] = (),
    known: tuple[FileRecord, ...] = (),
    trained: tuple[Trained, ...] = (),
    earlier: tuple[EarlierStep, ...] = (),
) -> Manifest:
    """`known` are files that were hashed already, as they were read back."""
    records = {record.name: record for record in known}
    rest = [path for path in list_files(folder) if path.relative_to(folder).as_posix() not in records]
    records |= {record.name: record for record in parallel(lambda path: digest(path, folder), rest)}
    files = tuple(records[path.relative_to(folder).as_posix()] for path in list_files(folder))
    manifest = Manifest(
        lpsparse=__version__,
        source=source,
        recipe=recipe,
        layout=layout,
        files=files,
        tensors=tensors,
        quality=quality,
        notes=notes,
        trained=trained,
        earlier=earlier,
    )
    write_text(folder / MANIFEST, as_text(manifest))
    return manifest


def as_text(record: BaseModel) -> str:
    """JSON with a fixed form, of a manifest or a report; what may be of many tensors is not made into tables
    first."""
    return record.model_dump_json(indent=1) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder that lpsparse wrote.
    Raises InputError when absent, broken or of another version."""
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(
            350, f"{folder}: no {MANIFEST} here: lpsparse did not write it", hint="lpsparse report it"
        )
    try:
        return Manifest.model_validate(unique_json(path.read_bytes()))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(351, f"{path}: {where}: {first['msg']}", hint="write the model again") from None
    except ValueError as error:
        raise InputError(351, f"{path}: not valid JSON: {error}", hint="write the model again") from None
