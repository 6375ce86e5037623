"""Ask the model's own modules what its tensors are, where names and shapes leave that open.

transformers builds the model without values in a process of its own. That takes a few seconds the first time;
what it finds is kept by the hash of config.json.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lpsparse.pruning.roles import ROLES, bare

_SECONDS = 120  # a config of a billion layers is not waited for
_MEMORY = 16 << 30  # bytes of addresses that the process may have: torch alone takes a few


def look(config: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, dict[str, str]] | None:
    """What was asked, and the role of each of these tensors that the model has in the same shape. None where
    there is no transformers, or it knows no model of this config or cannot build it."""
    if not isinstance(config.get("model_type"), str):
        return None
    try:
        release = version("transformers")
    except PackageNotFoundError:
        return None
    found = _kept(json.dumps(config, sort_keys=True), release)
    if not found.get("class"):
        return None
    told = {name: _role(name, shape, found["roles"], f"{found['prefix']}.") for name, shape in shapes.items()}
    roles = {name: role for name, role in told.items() if role in ROLES}
    return f"{found['class']} of transformers {release}", roles


def _role(name: str, shape: tuple[int, ...], told: dict[str, Any], prefix: str) -> str:
    """By the name as it is or without wrappers, with or without the base model's prefix; empty where there is
    none of this shape."""
    near = (name, bare(name), prefix + name, prefix + bare(name), name.removeprefix(prefix))
    role, own = next((told[each] for each in near if each in told), ("", []))
    return role if tuple(own) == shape else ""


def _kept(config: str, release: str) -> dict[str, Any]:
    """The answer of an earlier look at the same config by the same code, or a new one. One that failed is not
    kept."""
    code = Path(__file__).parents[1]
    files = ("integrations/look.py", "training/modules.py", "pruning/roles.py")
    asked = [config, release, *((code / name).read_text("utf-8") for name in files)]
    key = hashlib.sha256("\0".join(asked).encode()).hexdigest()
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    path = Path(home, "lpsparse", "looks", f"{key}.json")
    with suppress(OSError, ValueError):
        found: Any = json.loads(path.read_text("utf-8"))
        if _is_answer(found):
            return found
    found = _asked(config)
    if not _is_answer(found):
        return {"class": None}
    with suppress(OSError):  # a home that cannot be written to
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f"{path.name}.{os.getpid()}")
        fresh.write_text(json.dumps(found), "utf-8")
        fresh.replace(path)
    return found


def _asked(config: str) -> Any:
    """What the process wrote; None where it wrote nothing. It starts in a folder of its own, as Python would
    import from the one that it starts in."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with TemporaryDirectory() as folder, suppress(OSError, ValueError, subprocess.SubprocessError):
        given, answer = Path(folder, "config.json"), Path(folder, "answer.json")
        given.write_text(config, "utf-8")
        subprocess.run(
            [sys.executable, "-P", "-c", _CHILD, given, answer],
            env=environment,
            timeout=_SECONDS,
            check=False,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        return json.loads(answer.read_text("utf-8"))
    return None


def _is_answer(found: Any) -> bool:
    return isinstance(found, dict) and isinstance(found.get("roles"), dict) and "prefix" in found


# The limit is set in the process itself: what is set between fork and exec may hang where there are threads.
_CHILD = f"""
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, ({_MEMORY}, {_MEMORY}))
except (ImportError, ValueError, OSError):
    pass
from lpsparse.integrations.look import answer
answer(Path(sys.argv[1]), Path(sys.argv[2]))
"""
