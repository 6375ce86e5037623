"""Which of the names in a folder, on disk or on the hub, are its weights; old names of tensors."""

from collections.abc import Collection

TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".th", ".tar")
TORCH_FILES = (*TORCH_SUFFIXES, ".ckpt")  # of a file that is named; in folders it is often a spare copy
WEIGHT_SUFFIXES = (".safetensors", *TORCH_SUFFIXES)
FOLDER_ORDER = (
    "lpsparse.safetensors.index.json", "lpsparse.safetensors",
    "model.safetensors.index.json", "model.safetensors",
)  # fmt: skip
LEGACY_NORMS = {".weight": ".gamma", ".bias": ".beta"}  # of LayerNorm in BERT's first checkpoints
_TORCH_ORDER = ("pytorch_model.bin.index.json", "pytorch_model.bin")


def is_hidden(name: str) -> bool:
    """Whether a file is, by its own name or a folder's. `.gitattributes` is the hub's, and no secret."""
    return name != ".gitattributes" and any(
        part.startswith(".") and part not in (".", "..") for part in name.split("/")
    )


def is_report_name(model: str) -> bool:
    """Whether MODEL, if it is a file, is a report.json and no checkpoint."""
    return model.endswith(".json") and not model.endswith(".index.json")


def find_weight_names(names: Collection[str]) -> list[str]:
    """The one index or weight file that is meant; more where the names leave that open."""
    present = [name for name in FOLDER_ORDER if name in names]
    loose = sorted(name for name in names if name.endswith(".safetensors"))
    torch_named = [name for name in _TORCH_ORDER if name in names]
    torch_loose = sorted(name for name in names if name.endswith(TORCH_SUFFIXES))
    return present or (torch_named[:1] if torch_named and not loose else loose + torch_loose)
