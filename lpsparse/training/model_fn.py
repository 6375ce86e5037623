"""--model-fn: the module of a bare state dict, built by code that the person at the terminal names."""

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
    where, _, name = model_fn.rpartition(":")
    if not where or not name:
        raise UsageError(
            240, f"--model-fn {model_fn!r}: not MODULE:CALLABLE or FILE.py:CALLABLE", mend="see --help"
        )
    try:
        function: Callable[[], Any] = getattr(_import(where, folder), name)
        module = function()
    except UsageError:
        raise
    except (Exception, SystemExit) as error:  # it is the person's own code: it may do anything
        what = f"--model-fn {model_fn!r}: {type(error).__name__}: {error}"
        raise UsageError(241, what, mend="mend it; it is called without arguments") from error
    if not isinstance(module, nn.Module):
        raise UsageError(
            242, f"--model-fn {model_fn!r}: gave a {type(module).__name__}", mend="return a torch module"
        )
    return module


def _import(where: str, folder: Path | None) -> Any:
    if not where.endswith(".py"):
        sys.path.insert(0, "")
        try:
            return importlib.import_module(where)
        finally:
            sys.path.remove("")
    path = Path(where) if folder is None or Path(where).exists() else folder / where
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise UsageError(241, f"--model-fn: {where}: no such file", mend="check the path")
    code = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(code)
    return code
