"""Rows from files: texts and tables, each row with the place that an error can name."""

import csv
import hashlib
import io
import json
import os
import re
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lpsparse.checkpoint.hub import fetch, is_hub_id
from lpsparse.checkpoint.manifest import Trained
from lpsparse.errors import InputError, UsageError
from lpsparse.steps.finetune import FinetuneStep
from lpsparse.training.labels import label_of

_TABLES = (".jsonl", ".csv", ".tsv", ".parquet")
_SUFFIXES = (".txt", ".npz", *_TABLES)
_SPLIT = re.compile(r"([^\[\]]+)(?:\[(\d{0,18}):(\d{0,18})\])?")
_ALSO = {"validation": ("validation", "valid", "val", "dev", "eval"), "train": ("train", "training")}
_TEXTS = ("text", "sentence", "Text", "content")
LABELS = ("label", "labels", "Label")
_FIELDS = ("--text-field", "--label-field")
_NAME_WORDS = 3  # the most that a column's name has


@dataclass(frozen=True, slots=True)
class Row:
    where: str  # file:line
    text: str
    label: str  # empty where none is read


def find(data: str, split: str) -> tuple[list[Path], slice, str]:
    """The files of a split, the part that is asked for, and in words what is read: split or file, and part.

    DATA is a file (then it is its only split), a folder with a file a split, `bundled:NAME` or a hub data
    set id.
    """
    name, part = _parts(split)
    path = _locate(data)
    if path.is_file():
        _check_suffix(path)
        return [path], part, path.name + split[len(name) :]
    if not path.is_dir():
        raise InputError(371, f"{data}: neither a file nor a folder", hint="write the data to a file first")
    return _in_folder(path, name), part, split


def _parts(split: str) -> tuple[str, slice]:
    match = _SPLIT.fullmatch(split)
    if match is None:
        raise UsageError(230, f"split {split!r}: not NAME or NAME[from:to]", hint="such as test[1000:]")
    part = slice(int(match[2]) if match[2] else None, int(match[3]) if match[3] else None)
    if part.stop is not None and part.stop <= (part.start or 0):
        raise UsageError(
            230, f"split {split!r}: from {part.start or 0} to {part.stop} is nothing", hint="give from < to"
        )
    return match[1], part


def check_apart(data: str, split: str, held_data: str, held_split: str) -> None:
    """Raises UsageError when what is held out would be read from the rows that train."""
    (files, part, _), (held, held_part, _) = find(data, split), find(held_data, held_split)
    if [path.resolve() for path in files] != [path.resolve() for path in held]:
        return
    if _meet(part, held_part):
        what = f"{held[0]}: {held_split!r} holds rows that {split!r} trains on"
        raise UsageError(231, what, hint="give another --eval-split or --eval-data, or neither")


def _meet(one: slice, other: slice) -> bool:
    ends = [float("inf") if each.stop is None else each.stop for each in (one, other)]
    return max(one.start or 0, other.start or 0) < min(ends)


def trained_on(data: str, split: str, trained: Sequence[Trained]) -> dict[str, float | None]:
    """Names of the files of a split of which a fine-tune has read rows, by their bytes, each with the share
    that it had set aside. Of ranges only those of the same files can be told apart."""
    files, (_, part) = digests(data, split), _parts(split)
    found: dict[str, float | None] = {}
    for each in trained:
        known = set(each.data.values())
        if set(files.values()) != known or _meet(part, _parts(each.split)[1]):
            found |= {name: each.set_aside for name, sha256 in files.items() if sha256 in known}
    return found


def copies(data: str, split: str, held_data: str, held_split: str) -> list[str]:
    """Names of held-out files that are other files than those that train, and hold the same bytes."""
    files, held = find(data, split)[0], find(held_data, held_split)[0]
    if [path.resolve() for path in files] == [path.resolve() for path in held]:  # whose ranges are apart
        return []
    known = set(digests(data, split).values())
    return [name for name, sha256 in digests(held_data, held_split).items() if sha256 in known]


def digests(data: str, split: str) -> dict[str, str]:
    """File name -> sha256 of what a split reads, so that a result says which data made it."""
    found: dict[str, str] = {}
    for path in find(data, split)[0]:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                with file.open("rb") as stream:
                    name = file.relative_to(path.parent).as_posix()
                    found[name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


def held_out_of(step: FinetuneStep) -> tuple[str, str] | None:
    """Data and split that a fine-tune selects on: what is asked for, else a validation split that lies beside
    the one that trains. None where a share of the training rows is to be set aside."""
    if step.eval_data or step.eval_split:
        return step.eval_data or step.data, step.eval_split or "validation"
    path = _locate(step.data)
    if not path.is_dir() or not step.at_default("eval_fraction"):
        return None
    train, held = _named(path, _parts(step.split)[0]), _named(path, "validation")
    return (step.data, "validation") if train and held and train != held else None


def recorded_data(step: FinetuneStep) -> dict[str, Any]:
    """The data that a fine-tune reads, as a manifest records it: by its hashes."""
    held = held_out_of(step)
    found: dict[str, Any] = {"data": digests(step.data, step.split)}
    if held is not None:
        split = step.eval_split or (None if step.eval_data else held[1])
        found |= {"eval_data": digests(*held), "eval_split": split}
    return found


def _locate(data: str) -> Path:
    if data.startswith("bundled:"):
        folder = Path(__file__).parents[1] / "bundled"
        if data.removeprefix("bundled:") in os.listdir(folder):
            return folder / data.removeprefix("bundled:")
        raise InputError(370, f"{data}: nothing of that name is bundled", hint="try bundled:shakespeare")
    path = Path(data)
    if path.exists():
        return path
    if is_hub_id(data) and path.suffix not in _SUFFIXES:
        hint = "a local folder in its place (--data FOLDER; with `run`: --set data=FOLDER)"
        return fetch(data, kind="dataset", replace_with=hint)[0]
    raise InputError(371, f"{data}: no such data", hint="check the path")


def _check_suffix(path: Path) -> None:
    if path.suffix not in _SUFFIXES:
        hint = (
            "rename or convert it: text is .txt, rows .jsonl, .csv, .tsv or .parquet, images .npz or .parquet"
        )
        raise InputError(372, f"{path}: not one of {', '.join(_SUFFIXES)}", hint=hint)


def _in_folder(folder: Path, name: str) -> list[Path]:
    named, found = _named(folder, name), _files(folder)
    if named:
        return named
    if len(found) == 1:
        return found
    if not found and any(path.is_dir() for path in folder.iterdir()):
        return [folder]  # a folder of images, one folder a class
    names = ", ".join(sorted({path.stem for path in found})[:8]) or "none"
    raise InputError(373, f"{folder}: no split {name!r} (there are: {names})", hint="choose with --split")


def split_folders(data: str, chosen: Path) -> list[Path]:
    """`chosen`, a folder of class folders in DATA, and those of DATA's other splits beside it."""
    root = _locate(data)
    names = dict.fromkeys(name for names in (*_ALSO.values(), ("test", "testing")) for name in names)
    beside = [] if chosen == root else [root / name for name in names if (root / name).is_dir()]
    return [chosen, *(folder for folder in beside if folder != chosen)]


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix in _SUFFIXES and path.is_file())


def _named(folder: Path, name: str) -> list[Path]:
    """The files of a split, or its folder of images, by its name or another that is usual for it."""
    found = _files(folder)
    for alias in _ALSO.get(name, (name,)):
        files = [path for path in found if path.stem == alias or path.stem.startswith(f"{alias}-")]
        files = [path for path in files if path.suffix == files[0].suffix]
        if files:
            return files
        if (folder / alias).is_dir():
            return [folder / alias]
    return []


def read_text(files: list[Path], part: slice, text_field: str | None) -> str:
    """All text of a split as one string; `part` counts characters of a .txt, rows of a table."""
    if files[0].suffix == ".txt":
        text = "".join(_decode(path) for path in files)[part]
        if not text.strip():
            raise InputError(374, f"{files[0]}: no text in it", hint="give a file with text")
        return text
    return "\n".join(row.text for row in read_rows(files, part, text_field, None, labelled=False))


def _decode(path: Path) -> str:
    """The text of a file; its line ends are \n."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            375, f"{path}: not UTF-8 at byte {error.start}", hint="convert it to UTF-8"
        ) from None


def read_rows(
    files: list[Path],
    part: slice,
    text_field: str | None,
    label_field: str | None,
    *,
    labelled: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """The rows of a table. Raises InputError naming file:line for a bad row, and for a table without rows.
    `say` hears of a heading whose names are not known."""
    asked = tuple(name for name in (text_field, label_field) if name is not None)
    hears = say if labelled else None
    rows = [row for path in files for row in _table(path, text_field, label_field, asked, hears)][part]
    if not rows:
        raise InputError(376, f"{files[0]}: no rows in it", hint="give a file with rows")
    return rows


def _table(
    path: Path,
    text_field: str | None,
    label_field: str | None,
    asked: tuple[str, ...],
    say: Callable[[str], None] | None,
) -> Iterator[Row]:
    """`say` is None where no label is read."""
    readers = {
        ".jsonl": _jsonl,
        ".parquet": parquet_rows,
        ".csv": lambda path: _separated(path, asked, say),
        ".tsv": lambda path: _separated(path, asked, say),
    }
    if path.suffix not in readers:
        raise InputError(
            372, f"{path}: not a table ({', '.join(_TABLES)})", hint="give rows with text and label"
        )
    for line, fields in readers[path.suffix](path):
        where = f"{path.name}:{line}"
        text = field_of(where, fields, text_field, _TEXTS, "--text-field")
        label = "" if say is None else field_of(where, fields, label_field, LABELS, "--label-field")
        if not isinstance(text, str):
            raise InputError(377, f"{where}: the text is empty or no text", hint="fix or drop the row")
        yield Row(where, text, "" if say is None else label_of(where, label))


def field_of(where: str, fields: dict[str, Any], asked: str | None, usual: tuple[str, ...], flag: str) -> Any:
    names = (asked,) if asked is not None else usual
    for name in names:
        if name in fields:
            return fields[name]
    found = ", ".join(fields) or "none"
    raise InputError(378, f"{where}: no field {names[0]!r} (found: {found})", hint=f"name it with {flag}")


def _jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(_decode(path).split("\n"), 1):
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                raise InputError(
                    379, f"{path.name}:{number}: not valid JSON", hint="fix or drop the row"
                ) from None
            if not isinstance(value, dict):
                raise InputError(379, f"{path.name}:{number}: not a JSON object", hint="fix or drop the row")
            yield number, value


def _separated(
    path: Path, asked: tuple[str, ...], say: Callable[[str], None] | None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of .csv or .tsv. The first is a heading when it holds a name that was `asked` for or a usual one;
    a table of two columns without a heading is text and label."""
    lines = _cells(path, several=say is not None)
    heading = [cell.strip() for cell in lines[0][1]] if lines else []
    named = any(name in heading for name in (*asked, *_TEXTS, *LABELS)) or len(heading) != 2
    if not named:
        if say is not None and _is_heading(path, [row for _, row in lines]):
            say(f"{path.name}: its columns {heading[0]!r} and {heading[1]!r} are read as text and label")
            lines = lines[1:]
        heading = ["text", "label"]
    lines = lines[1:] if named else lines
    for line, row in lines:
        if len(row) != len(heading):
            what = f"{path.name}:{line}: {len(row)} columns, expected {len(heading)}"
            raise InputError(380, what, hint="fix or drop the row")
    if not named and len({row[1] for _, row in lines}) > max(2, len({row[0] for _, row in lines})):
        what = f"{path.name}: more different labels than texts: are the columns the other way round?"
        raise InputError(380, what, hint="name the columns in a first line: text and label")
    for line, row in lines:
        yield line, dict(zip(heading, row, strict=True))


def _is_heading(path: Path, rows: list[list[str]]) -> bool:
    """Return whether the first row names the columns: its label comes once, all others again.
    Raises InputError where that cannot be told."""
    first = [cell.strip() for cell in rows[0]]
    counts = Counter(row[-1].strip() for row in rows)
    looks = all(0 < len(cell.split()) <= _NAME_WORDS and not _is_real(cell) for cell in first)
    if len(rows) == 1 or not looks or counts[first[1]] > 1:
        return False
    if min(count for label, count in counts.items() if label != first[1]) > 1:
        return True
    what = f"{path.name}:1: {first[0]!r}, {first[1]!r}: is it a heading, or a text with its label?"
    fields = " ".join(shlex.join([flag, cell]) for flag, cell in zip(_FIELDS, first, strict=True))
    raise InputError(
        380, what, hint=f"a heading: {fields}; a row: put a first line with text and label above it"
    )


def _is_real(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


_Lines = list[tuple[int, list[str]]]  # number of a row's last line, cells


def _cells(path: Path, *, several: bool) -> _Lines:
    """The cells of each row that is not empty. A .tsv is read as spreadsheets write one, with quotes around
    cells, where that is a table; as plain lines where it is none, or has fewer rows than lines."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    text = _decode(path)
    first = text.lstrip("\r\n").partition("\n")[0]
    cut = "," if path.suffix == ".csv" else "\t"
    if several and first.strip() and cut not in first and '"' not in first:
        what = f"{path.name}: one column ({first[:60]!r}), expected a text and a label"
        raise InputError(380, what, hint="put a comma (.csv) or a tab (.tsv) between the columns")
    if path.suffix == ".csv":
        return _parsed(path, text)
    plain = _parsed(path, text, delimiter="\t", quoting=csv.QUOTE_NONE)
    if '"' not in text:
        return plain
    try:
        quoted = _parsed(path, text, delimiter="\t")
    except InputError:
        return plain
    same = len(quoted) == len(plain) or not _is_table(plain)
    return quoted if _is_table(quoted) and same else plain


def _parsed(path: Path, text: str, **options: Any) -> _Lines:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, **options)
    try:
        return [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        raise InputError(380, f"{path.name}:{reader.line_num}: {error}", hint="fix or drop the row") from None


def _is_table(lines: _Lines) -> bool:
    return len({len(row) for _, row in lines}) == 1


def class_names(files: list[Path], label_field: str | None) -> tuple[str, ...]:
    """The names that a data set of the hub gives to the numbers in its column of labels; none where it gives
    none. Raises InputError where its files do not agree."""
    if files[0].suffix != ".parquet":
        return ()
    from pyarrow import parquet  # by which its rows were read

    found: set[tuple[str, ...]] = set()
    for path in files:
        try:
            told: Any = json.loads((parquet.read_schema(path).metadata or {}).get(b"huggingface", b"{}"))
            features = told.get("info", {}).get("features", {})
            label = next(features[key] for key in (label_field, *LABELS) if key in features)
            found.add(tuple(label["names"]) if label.get("_type") == "ClassLabel" else ())
        except (ValueError, StopIteration, AttributeError, TypeError, KeyError):
            found.add(())  # nothing is told
    if len(found) > 1:
        what = f"{files[0].name} and the files beside it give other names to the numbers of their labels"
        raise InputError(349, what, hint="write the labels as names")
    return found.pop()


def parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise InputError(
            381, f"{path.name}: parquet needs pyarrow", hint="pip install 'lpsparse[data]'"
        ) from None
    try:
        table = parquet.read_table(path)
    except (OSError, ValueError) as error:
        raise InputError(382, f"{path.name}: not a parquet file: {error}", hint="download it again") from None
    yield from enumerate(table.to_pylist(), 1)
