"""The entry of a packed folder's config.json: by it transformers knows the folder as ours, and the loader
knows what it must have read.

The digest is the sum, modulo 2**64, of a hash of each stored part with its name, those of dense tensors too:
whatever the order they are read in, one that is missing, there twice, changed or exchanged with another gives
another sum.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from lpsparse.checkpoint.dtypes import DTYPES
from lpsparse.checkpoint.files import fsync
from lpsparse.checkpoint.header import Entry, read_header, unique_json
from lpsparse.checkpoint.layouts.base import read_exactly, stored_names
from lpsparse.checkpoint.open import open_checkpoint
from lpsparse.checkpoint.tensors import BLOCK_BYTES, Checkpoint
from lpsparse.errors import InputError
from lpsparse.families import LAYOUTS
from lpsparse.parallel.threads import parallel

KEY = "quantization_config"
_METHOD = "lpsparse"


def _encodes(layout: str) -> str:
    if layout not in LAYOUTS or LAYOUTS[layout].is_plain:
        raise ValueError(f"{layout!r} is not a layout of this version")
    return layout


class LoaderEntry(BaseModel):
    """The value of KEY in config.json."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    quant_method: Literal["lpsparse"] = _METHOD
    format_version: Literal[1] = 1
    layout: Annotated[str, AfterValidator(_encodes)]
    sharded: bool  # whether there is an index to be opened, or the one file
    dtype: Literal["F64", "F32", "F16", "BF16"] | None  # what `dtype="auto"` finds in the dense model
    tensors: Annotated[int, Field(ge=0)]
    digest: Annotated[str, Field(pattern="^[0-9a-f]{16}$")]


def tell_loaders(folder: Path, written: Checkpoint) -> tuple[str, ...]:
    """Give the config.json in `folder` the entry of what was written there, or take an old one out. What is
    to be said where it cannot be given."""
    path = folder / "config.json"
    if not path.is_file():
        return ()
    dense = LAYOUTS[written.layout].is_plain
    try:
        text = path.read_bytes().decode()
        changed = without_entry(text) if dense else with_entry(text, quantization_entry(written))
    except (InputError, UnicodeDecodeError) as error:
        why = error.what if isinstance(error, InputError) else "config.json is not UTF-8"
        return () if dense else (f"{why}: transformers cannot open OUT, lpsparse can",)
    if changed != text:
        path.write_bytes(changed.encode())
        fsync(path)
    return ()


def parse_entry(given: dict[str, Any]) -> LoaderEntry:
    """Raises InputError for anything that this version would not write."""
    try:
        return LoaderEntry.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        what = f"config.json: {KEY}: {'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise InputError(361, what, hint="upgrade lpsparse, or pack the model again") from None


def quantization_entry(checkpoint: Checkpoint) -> dict[str, Any]:
    """The entry for a packed checkpoint that has been written; reads its bytes."""
    floats = (t.dtype for t in checkpoint.tensors if DTYPES[t.dtype].is_float and DTYPES[t.dtype].bits > 8)
    return LoaderEntry(
        layout=checkpoint.layout,
        sharded=len(checkpoint.files) > 1,
        dtype=next(floats, None),  # pyright: ignore[reportArgumentType]  # pydantic checks it
        tensors=len(checkpoint.tensors),
        digest=digest_of(checkpoint),
    ).model_dump()


def digest_of(checkpoint: Checkpoint) -> str:
    """The digest of an opened checkpoint; reads all that it stores."""
    total = sum(parallel(_hash_file, checkpoint.files))
    return f"{total % 2**64:016x}"


def _hash_file(path: Path) -> int:
    """The sum, over the stored parts, of 64 bits of sha256 of a part's name and bytes."""
    parts = {part for tensor in open_checkpoint(path).tensors for part in stored_names(tensor)}
    total = 0
    with path.open("rb") as file:
        for entry in read_header(path).entries:
            if entry.name in parts:
                found = hashlib.sha256(entry.name.encode() + b"\0")
                for piece in _bytes_of(file, entry):
                    found.update(piece)
                total += int.from_bytes(found.digest()[:8], "little")
    return total


def _bytes_of(file: Any, entry: Entry) -> Iterator[Any]:
    whole = Entry(entry.name, "U8", (entry.nbytes,), entry.offset, entry.nbytes)
    for first in range(0, entry.nbytes, BLOCK_BYTES):
        yield read_exactly(file, whole, first, min(BLOCK_BYTES, entry.nbytes - first)).data


def with_entry(config: str, entry: dict[str, Any]) -> str:
    """A config.json with the entry, as its last line; else the text is as it was. Raises InputError where
    the model is quantised otherwise, of which a loader can be told one thing only."""
    table = _table(config)
    parts = [table, *(part for part in table.values() if isinstance(part, dict))]
    if any(part.get(KEY) and not is_ours(part[KEY]) for part in parts):
        what = f"config.json has another {KEY}: transformers can read only one"
        raise InputError(362, what, hint="keep this model dense")
    config = without_entry(config)
    before, after = config[: config.rindex("}")], config[config.rindex("}") :]
    bare = before.rstrip()
    return bare + _line(entry, first=bare.endswith("{")) + before[len(bare) :] + after


def is_ours(settings: Any) -> bool:
    """Whether a `quantization_config` claims to be ours."""
    return isinstance(settings, dict) and settings.get("quant_method") == _METHOD


def without_entry(config: str) -> str:
    """A config.json as it was before `with_entry`; one that has no entry of ours is left as it is."""
    table = _table(config)
    if not is_ours(table.get(KEY)):
        return config
    entry = table[KEY]
    del table[KEY]
    text = config.replace(_line(entry, first=not table), "", 1)
    return text if _table(text) == table else json.dumps(table, indent=2, ensure_ascii=False) + "\n"


def _line(entry: dict[str, Any], *, first: bool) -> str:
    return ("" if first else ",") + f'\n  "{KEY}": {json.dumps(entry)}'


def _table(config: str) -> dict[str, Any]:
    try:
        table = unique_json(config)
    except ValueError as error:
        raise InputError(363, f"config.json is not JSON: {error}", hint="fix the file") from None
    if not isinstance(table, dict):
        raise InputError(363, "config.json: expected a JSON object", hint="fix the file")
    return table
