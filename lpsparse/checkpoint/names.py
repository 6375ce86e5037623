"""Which names in a folder, on disk or on the hub, are its weights: one file, an index, a set of shards, or
the components of a diffusers pipeline, each a model in its own folder; old names of tensors."""

import os
import re
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from lpsparse.checkpoint.header import json_table
from lpsparse.errors import UsageError

TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".th", ".tar")
TORCH_FILES = (*TORCH_SUFFIXES, ".ckpt")  # of a file that is named; in folders it is often a spare copy
WEIGHT_SUFFIXES = (".safetensors", *TORCH_SUFFIXES)
FOLDER_ORDER = (
    "lpsparse.safetensors.index.json",
    "lpsparse.safetensors",
    "model.safetensors.index.json",
    "model.safetensors",
)
# What loaders read beside weights (configuration, tokenizers, templates, code), and what their pages show.
_READ = (
    ".json",
    ".txt",
    ".model",
    ".jinja",
    ".yaml",
    ".yml",
    ".toml",
    ".tiktoken",
    ".spm",
    ".bpe",
    ".vocab",
    ".codes",
    ".py",
    ".cpp",
    ".cu",
    ".h",
    ".md",
    ".rst",
    ".png",
    ".jpg",
    ".jpeg",
    ".gif",
    ".webp",
    ".svg",
    ".pdf",
    ".gitattributes",
)
_TERMS = ("license", "licence", "notice", "copying", "copyright", "authors", "use_policy", "readme")
_LEFT_BY_TRAINING = re.compile(
    r"wandb|runs|mlruns|logs|lightning_logs|tensorboard|(last-)?checkpoints?([-_].+)?|training_state"
    r"|global_step\d+|optimizer_\d+|.+_fsdp_\d+|__pycache__|.+\.mlpackage"
)
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})((?:\.\w+)+)", re.ASCII)  # model-00001-of-00002.safetensors
_PIPELINE = "model_index.json"
_INDEX = re.compile(r"\.index(\.[\w-]+)?\.json$")
_NO_WEIGHTS = re.compile(  # what trainers put beside a model, in files like those of weights
    r"training_args\.bin|(optimizer|scheduler|scaler|random_states|rng_state)(_\d+)?\.(bin|pt|pth)"
    r"|adapter_model\.(safetensors|bin)"
)
LEGACY_NORMS = {".weight": ".gamma", ".bias": ".beta"}  # of LayerNorm in BERT's first checkpoints
DIFFUSERS = "diffusion_pytorch_model"  # what diffusers calls its weight files
_TORCH_ORDER = ("pytorch_model.bin.index.json", "pytorch_model.bin")


def is_hidden(name: str) -> bool:
    """Whether a file is, by its own name or a folder's. `.gitattributes` is the hub's, and no secret."""
    return name != ".gitattributes" and any(
        part.startswith(".") and part not in (".", "..") for part in name.split("/")
    )


def is_part(name: str) -> bool:
    """Whether a file, by its way in a folder, is a part of a model: what loaders open and what people read of
    it. What a training or another program left there (optimizers, logs, copies, other formats) is none."""
    *folders, last = name.lower().split("/")
    if is_hidden(name) or any(_LEFT_BY_TRAINING.fullmatch(folder) for folder in folders):
        return False
    return last.endswith((*_READ, *WEIGHT_SUFFIXES)) or ("." not in last and last.startswith(_TERMS))


def as_left(name: str) -> str:
    """How a file that is not part of a model is named: by its outermost such folder, or by its own name."""
    parts = name.split("/")
    for i, folder in enumerate(parts[:-1], 1):
        if is_hidden(folder) or _LEFT_BY_TRAINING.fullmatch(folder.lower()):
            return "/".join(parts[:i]) + "/"
    return name


def is_report_name(model: str) -> bool:
    """Whether MODEL, if it is a file, is a report.json and no checkpoint."""
    return model.endswith(".json") and not model.endswith(".index.json")


def is_index(name: str) -> bool:
    """Whether a file is the index of shards; a variant's has the variant in its name (.index.fp16.json)."""
    return _INDEX.search(name) is not None


def find_weight_names(names: Collection[str]) -> list[str]:
    """The one index or weight file that is meant; more where the names leave that open. Whatever a library
    calls its files, an index comes before the files that it lists, and no variant before the model itself."""
    names = [name for name in names if not is_hidden(name) and not _NO_WEIGHTS.fullmatch(name)]
    present = [name for name in FOLDER_ORDER if name in names]
    others = sorted(name for name in names if is_index(name) and ".safetensors.index." in name)
    present = present or [name for name in others if name.endswith(".index.json")]
    present = present or [name for name in names if name == f"{DIFFUSERS}.safetensors"] or others
    loose = sorted(name for name in names if name.endswith(".safetensors"))
    torch_named = [name for name in _TORCH_ORDER if name in names]
    torch_loose = sorted(name for name in names if name.endswith(TORCH_SUFFIXES))
    return present or (torch_named[:1] if torch_named and not loose else loose + torch_loose)


def is_pipeline(names: Collection[str]) -> bool:
    """Whether a folder of these names holds a pipeline, and no weights of its own."""
    return _PIPELINE in names and not find_weight_names(names)


def components_in(folder: Path) -> list[str]:
    """The components that have weights; none where there is no model_index.json."""
    if not (folder / _PIPELINE).is_file():
        return []
    here = set(os.listdir(folder))  # a name that leads elsewhere is not among them
    named = sorted(
        name for name in json_table(folder / _PIPELINE) if name in here and (folder / name).is_dir()
    )
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


def whole_sets(names: Collection[str]) -> list[list[str]]:
    """The shards of each set of several, by its name, of which none is missing."""
    sets = (set_of(name) for name in sorted(names) if "-00001-of-" in name)
    return [shards for shards in sets if len(shards) > 1 and set(shards) <= set(names)]


def set_of(name: str) -> list[str]:
    """All shards of the set that a file is one of, by its name; else its name alone."""
    shard = _SHARD.fullmatch(name)
    if shard is None or not 1 <= int(shard[2]) <= int(shard[3]):
        return [name]
    return [f"{shard[1]}-{i:05d}-of-{shard[3]}{shard[4]}" for i in range(1, int(shard[3]) + 1)]
