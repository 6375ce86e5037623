"""lpsparse: make pretrained checkpoints small with L_p weight decay, and prove that they still work.

Names are imported on first use, so that `import lpsparse` costs nothing and commands that need no torch
import none. transformers' `from_pretrained` opens packed folders from here on.
"""

from importlib import import_module
from typing import Any

from lpsparse.integrations import hook

__version__ = "0.2.0"

_HOMES = {
    "prune": "api",
    "pack": "api",
    "unpack": "api",
    "verify": "api",
    "report": "api",
    "inspect": "api",
    "push": "api",
    "together": "parallel.environment",
    "doctor": "commands.doctor",
    "finetune": "api",
    "evaluate": "api",
    "open": "api",
    "load": "api",
    "run": "recipes.run",
    "sweep": "recipes.sweep",
    "check_recipe": "recipes.check",
    "recipe_schema": "recipes.schema",
    "LpDecay": "training.decay",
    "LpAdamW": "training.fused",
    "Sparsity": "training.sparsity",
    "condition": "training.conditioning",
    "fold": "training.conditioning",
    "ExitCode": "errors",
    "LpsparseError": "errors",
}

__all__ = ["__version__", *sorted(_HOMES)]  # pyright: ignore[reportUnsupportedDunderAll]


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lpsparse' has no attribute {name!r}")
    return getattr(import_module(f"lpsparse.{_HOMES[name]}"), name)


hook.install()
