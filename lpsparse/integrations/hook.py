"""Make transformers open packed folders, whichever of the two is imported first. Standard library only.

The hook waits for the module of transformers that defines PreTrainedModel, by that public name: `import
transformers` alone does not import it, and code that does import it needs torch anyway.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_CLASS = "PreTrainedModel"


class _Hook:
    """An import finder that looks at each module of transformers once it has run."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name.startswith("transformers.") else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_and_look(module: ModuleType) -> None:
            execute(module)
            if _register(module):
                sys.meta_path.remove(_HOOK)

        spec.loader.exec_module = exec_and_look
        return spec


_HOOK = _Hook()


def install() -> None:
    """Register now if transformers has the class already, else when it comes."""
    loaded = [module for name, module in sys.modules.items() if name.startswith("transformers.")]
    if not any(_register(module) for module in loaded) and _HOOK not in sys.meta_path:
        sys.meta_path.insert(0, _HOOK)


def _register(module: ModuleType) -> bool:
    """Whether the module defines the class, which then knows packed folders."""
    found = vars(module).get(_CLASS)
    if not isinstance(found, type) or found.__module__ != module.__name__:
        return False
    import_module("lpsparse.integrations.loader").register(found)
    return True
