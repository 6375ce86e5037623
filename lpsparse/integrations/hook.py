"""Has transformers know our folders, whichever of the two is imported first. Standard library only.

What is watched for is the module that holds transformers' table of quantizers: `import transformers` alone
does not import it, and what does import it needs torch anyway.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_WATCHED = "transformers.quantizers.auto"


class _Hook:
    """A finder that finds one module as Python does, and has it registered in once it has been executed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == _WATCHED else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_and_register(module: ModuleType) -> None:
            execute(module)
            sys.meta_path.remove(_HOOK)
            _register()

        spec.loader.exec_module = exec_and_register
        return spec


_HOOK = _Hook()


def install() -> None:
    """Register now if transformers is there already, else when it comes."""
    if _WATCHED in sys.modules:
        _register()
    elif _HOOK not in sys.meta_path:
        sys.meta_path.insert(0, _HOOK)


def _register() -> None:
    import_module("lpsparse.integrations.loader").register()
