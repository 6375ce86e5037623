"""Code that the person at the terminal names: --model-fn builds the module of a bare state dict with it."""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from lpsparse.errors import UsageError


def build(model_fn: str, folder: Path | None = None) -> nn.Module:
    """Call MODULE:CALLABLE or FILE.py:CALLABLE, which the person at the terminal named, not a checkpoint."""
    function = load_code(model_fn, "--model-fn", folder)
    try:
        module = function()
    except (Exception, SystemExit) as error:  # it is the person's own code: it may do anything
        what = f"--model-fn {model_fn!r}: {type(error).__name__}: {error}"
        raise UsageError(241, what, hint="fix it; it is called without arguments") from error
    if not isinstance(module, nn.Module):
        raise UsageError(
            242, f"--model-fn {model_fn!r}: gave a {type(module).__name__}", hint="return a torch module"
        )
    return module


def load_code(spec: str, flag: str, folder: Path | None = None) -> Callable[..., Any]:
    """Import MODULE:NAME or FILE.py:NAME. Raises UsageError, naming `flag`."""
    where, _, name = spec.rpartition(":")
    if not where or not name:
        raise UsageError(
            240, f"{flag} {spec!r}: not MODULE:NAME or FILE.py:NAME", hint="such as net.py:build"
        )
    try:
        return getattr(_import(where, folder, flag), name)
    except UsageError:
        raise
    except (Exception, SystemExit) as error:  # it is the person's own code: it may do anything
        what = f"{flag} {spec!r}: {type(error).__name__}: {error}"
        raise UsageError(241, what, hint="fix it, or name another") from error


def _import(where: str, folder: Path | None, flag: str) -> Any:
    if not where.endswith(".py"):
        sys.path.insert(0, "")
        try:
            return importlib.import_module(where)
        finally:
            sys.path.remove("")
    path = Path(where) if folder is None or Path(where).exists() else folder / where
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise UsageError(241, f"{flag}: {where}: no such file", hint="check the path")
    code = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(code)
    return code
