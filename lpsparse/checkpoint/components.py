"""The components of a diffusers pipeline: each a model in a folder of its own, by model_index.json."""

import os
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from lpsparse.checkpoint.header import json_table
from lpsparse.checkpoint.names import find_weight_names
from lpsparse.errors import UsageError

_INDEX = "model_index.json"


def is_pipeline(names: Collection[str]) -> bool:
    """Whether a folder of these names holds a pipeline, and no weights of its own."""
    return _INDEX in names and not find_weight_names(names)


def components_in(folder: Path) -> list[str]:
    """The components that have weights; none where there is no model_index.json."""
    if not (folder / _INDEX).is_file():
        return []
    here = set(os.listdir(folder))  # a name that leads elsewhere is not among them
    named = sorted(name for name in json_table(folder / _INDEX) if name in here and (folder / name).is_dir())
    return [name for name in named if find_weight_names(os.listdir(folder / name))]


def asked_components(folder: Path, patterns: Sequence[str]) -> list[str]:
    """The components whose names one of the globs matches. Raises UsageError where one matches none."""
    if not folder.is_dir() or not is_pipeline(os.listdir(folder)):
        what = f"--component {patterns[0]}: {folder} is not the folder of a diffusers pipeline"
        raise UsageError(262, what, hint="give that folder (a hub id: download it), or no --component")
    there = components_in(folder)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in there):
            what = f"--component {pattern}: no such component with weights in {folder}"
            raise UsageError(262, what, hint=f"one of {', '.join(there) or 'none, as it holds no weights'}")
    return [name for name in there if any(fnmatchcase(name, pattern) for pattern in patterns)]
