"""Check this machine: versions, libraries, GPU, disk, launcher, and a toy model packed and opened."""

import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from lpsparse import __version__
from lpsparse.checkpoint.files import fsync
from lpsparse.checkpoint.hub import setting
from lpsparse.checkpoint.transaction import exchange_names
from lpsparse.errors import ExitCode
from lpsparse.parallel.threads import cores
from lpsparse.reporting.text import clean, size

# From which version on each works with us and, where one is known, the first that does not: as in
# pyproject.toml. Older ones lose data or run code: torch before 2.10 in its restricted loader, transformers
# before 5.3 by a key of config.json; safetensors 0.8.0rc0 filled a file with zeros.
FLOORS: dict[str, tuple[str, str]] = {
    "torch": ("2.10", "2.14"),
    "transformers": ("5.21", "6"),
    "accelerate": ("1.15", ""),
    "safetensors": ("0.8", ""),
    "huggingface_hub": ("1.31", ""),
    "numpy": ("2", ""),
    "zstandard": ("0.22", ""),
}


_SECONDS = 60  # that torch gets to start, and two processes to meet


_LEAST_BYTES = 1e9  # of free memory or disk, below which there is a warning


_CGROUPS = Path("/sys/fs/cgroup")  # limits of a container


_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")


_DISK = {  # trial -> what to do where it fails, and whether we can do without
    "rename": ("write OUT to a disk that can rename folders, and copy it when it is whole", "fail"),
    "exchange": ("nothing is needed: --overwrite takes two renames here", "warn"),
    "fsync": ("choose another disk: results may be lost when the power fails", "fail"),
    "lock": ("do not start two runs with one OUT at the same moment", "warn"),
}


_DEVICES = """
import json, torch
from lpsparse.training.precision import has_bf16, slowdown
gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
found = {"gpus": gpus, "mps": torch.backends.mps.is_available(), "slowdown": None}
if not has_bf16() and not torch.accelerator.is_available():
    found["slowdown"] = slowdown()
print(json.dumps({**found, "bf16": has_bf16()}))
"""


_MEET = """
import lpsparse
from lpsparse.parallel.threads import parallel
with lpsparse.together():
    assert parallel(float, range(2)) == [0.0, 1.0]
"""


_OPEN = """
import json, tempfile, warnings
from pathlib import Path
import lpsparse
from transformers import BertConfig, BertModel
sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as noted:
    dense, packed = Path(folder, "dense"), Path(folder, "packed")
    BertModel(BertConfig(vocab_size=64, **sizes)).save_pretrained(dense)
    lpsparse.pack(dense, packed)
    found, wanted = (BertModel.from_pretrained(each).state_dict() for each in (packed, dense))
assert found.keys() == wanted.keys() and all(found[name].equal(wanted[name]) for name in wanted)
print(json.dumps(any(each.category.__name__ == "InMemoryWarning" for each in noted)))
"""


Check = dict[str, str]


def doctor(folder: str | Path = ".") -> dict[str, Any]:
    """What was found: {"ok", "exit_code", "checks"}. Each check has area, name, status (ok, warn or fail) and
    found, and a hint unless it is ok. The disk is that of `folder`, in which nothing is left.

    exit_code is 0 where nothing fails, 4 where the disk alone does, else 6.
    """
    checks = [*_versions(), *_machine(), *_torch(), *_disk(Path(folder)), *_hub()]
    failed = {check["area"] for check in checks if check["status"] == "fail"}
    code = ExitCode.OUTPUT if failed == {"disk"} else ExitCode.RESOURCE if failed else ExitCode.OK
    return {"ok": not failed, "exit_code": int(code), "checks": checks}


def _check(area: str, name: str, found: str, hint: str = "", status: str = "fail") -> Check:
    """One line; ok where there is nothing to do."""
    line = {"area": area, "name": name, "status": status if hint else "ok", "found": clean(found)}
    return {**line, "hint": hint} if hint else line


def _versions() -> Iterator[Check]:
    found = platform.python_version()
    yield _check("versions", "python", found, "" if is_good(found, "3.11") else "use Python 3.11 or newer")
    yield _check("versions", "lpsparse", __version__)
    for name, (least, end) in FLOORS.items():
        hint = f"pip install '{name}>={least}{f',<{end}' if end else ''}'"
        try:
            found = version(name)
        except PackageNotFoundError:
            found = "not installed"
        yield _check("versions", name, found, "" if is_good(found, least, end) else hint)


def is_good(found: str, least: str, end: str = "") -> bool:
    """Whether a version is from `least` on and below `end`; a pre-release is below its release."""
    here, floor = _numbers(found), _numbers(least)
    if re.search(r"\d(a|b|rc|\.dev)\d", found) and here == floor:
        return False
    return here >= floor and (not end or here < _numbers(end))


def _numbers(text: str) -> tuple[int, ...]:
    """Of a version, three of them: 2.10.1+cpu is (2, 10, 1)."""
    found = re.match(r"[0-9.]*[0-9]", text)
    parts = [] if found is None else [int(part or 0) for part in found[0].split(".")]
    return tuple([*parts, 0, 0, 0][:3])


def _machine() -> Iterator[Check]:
    yield _check("machine", "system", f"{platform.system()} {platform.release()} {platform.machine()}")
    memory, limit = psutil.virtual_memory(), _limit("memory.max", "memory/memory.limit_in_bytes")
    used = _limit("memory.current", "memory/memory.usage_in_bytes")
    free, total, where = memory.available, memory.total, ""
    if limit is not None and used is not None and limit < total:
        free, total, where = min(free, limit - used), limit, ", a container's limit"
    hint = "close other programs, or raise the limit" if free < _LEAST_BYTES else ""
    yield _check("machine", "memory", f"{size(free)} free of {size(total)}{where}", hint, "warn")
    yield _check("machine", "cores", f"{cores()} to use{_quota()}")


def _limit(*names: str) -> int | None:
    """What a container's control group says, of version 2 or 1."""
    for name in names:
        with suppress(OSError, ValueError):
            return int((_CGROUPS / name).read_text())
    return None


def _quota() -> str:
    """The share of the cores that a container gets, of which affinity knows nothing."""
    with suppress(OSError, ValueError):
        quota, period = (_CGROUPS / "cpu.max").read_text().split()
        share = int(quota) / int(period)
        return f", a container's limit is the time of {share:.1f}" if share < cores() else ""
    return ""


def _torch() -> Iterator[Check]:
    started = time.monotonic()
    out, failure = _ended(_start(_DEVICES))
    if failure:
        yield _check("devices", "torch", failure, "install torch for this machine: pytorch.org")
        return
    yield _check("devices", "torch", f"starts in {time.monotonic() - started:.1f} s")
    found = json.loads(out)
    gpus = ", ".join(f"{found['gpus'].count(name)} {name}" for name in dict.fromkeys(found["gpus"]))
    yield _check("devices", "gpu", gpus or ("MPS" if found["mps"] else "none: CPU only"))
    slower = found["slowdown"]
    emulated = f"emulated: a linear layer takes {slower or 0:.1f} times as long as in fp32"
    hint = "nothing is needed: --mixed-precision auto trains in fp32 here" if slower else ""
    known = "this device has it" if found["bf16"] else "this device does not have it"
    yield _check("devices", "bf16", emulated if slower else known, hint, "warn")
    yield _opens()
    started = time.monotonic()
    failure = _meet()
    hint = "check that localhost can connect to itself (firewall, /etc/hosts); one process works without it"
    if failure:
        yield _check("devices", "gloo", f"two processes did not meet: {failure}", hint)
    else:
        seconds = time.monotonic() - started
        yield _check("devices", "gloo", f"two processes met and shared work in {seconds:.1f} s")


def _opens() -> Check:
    """Whether transformers opens a toy model that is packed here, and how."""
    started = time.monotonic()
    out, failure = _ended(_start(_OPEN))
    if failure:
        hint = "`lpsparse unpack` makes an ordinary folder; report this with the versions above"
        return _check("formats", "packed", f"transformers does not open a packed model: {failure}", hint)
    seconds = f"{time.monotonic() - started:.1f} s"
    if json.loads(out):
        hint = "nothing to do if the unpacked model fits into memory"
        found = f"transformers opens a packed model, unpacked into memory first ({seconds})"
        return _check("formats", "packed", found, hint, "warn")
    return _check("formats", "packed", f"transformers opens a packed model, tensor by tensor ({seconds})")


def _start(code: str, **env: str) -> subprocess.Popen[str]:
    here = str(Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    launched = ("RANK", "WORLD_SIZE", "LOCAL_RANK")  # by others
    plain = {key: value for key, value in os.environ.items() if key not in launched}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**plain, "PYTHONPATH": path, **env},
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def _ended(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What it printed, and what went wrong: the last line that it said."""
    try:
        out, said = process.communicate(timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        return "", f"no answer in {_SECONDS} s"
    finally:
        process.kill()
        process.wait()
    said = (said.strip().splitlines() or [f"ended with {process.returncode}"])[-1]
    return out, "" if process.returncode == 0 else said[:200]


def _meet() -> str:
    """What went wrong when two processes were to meet over gloo and share work, as those of a job do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    job = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    processes = [_start(_MEET, RANK=rank, LOCAL_RANK=rank, **job) for rank in "01"]
    failures = [failure for _, failure in map(_ended, processes) if failure]
    return failures[0] if failures else ""


def _disk(folder: Path) -> Iterator[Check]:
    shown = _without_home(folder.absolute())
    try:
        trials = list(try_disk(folder))
        free = shutil.disk_usage(folder).free
    except OSError as error:
        yield _check("disk", "folder", f"{shown}: {error.strerror}", "choose another folder for OUT")
        return
    hint = "free some space, or choose another disk" if free < _LEAST_BYTES else ""
    yield _check("disk", "folder", f"{shown}: {size(free)} free", hint, "warn")
    for name, seconds, why in trials:
        hint, status = _DISK[name]
        yield _check("disk", name, why or f"works ({1000 * seconds:.1f} ms)", hint if why else "", status)


def _hub() -> Iterator[Check]:
    try:
        from huggingface_hub import get_token
    except Exception as error:  # what it imports may be broken
        yield _check("hub", "client", type(error).__name__, "pip install --upgrade huggingface_hub")
        return
    cache = Path(setting("HF_HUB_CACHE"))
    place = next(each for each in (cache, *cache.parents) if each.exists())
    hint = "" if os.access(place, os.W_OK) else "set HF_HOME to a folder that can be written"
    new = "" if cache.exists() else ", not there yet"
    yield _check("hub", "cache", f"{_without_home(cache)}{new}", hint, "warn")
    yield _check("hub", "token", "present" if get_token() else "none: public models only")
    said = [f"{name}={os.environ[name]}" for name in _OFFLINE if os.environ.get(name)]
    yield _check("hub", "offline", ", ".join(said) or "no")


def _without_home(path: Path) -> str:
    """A path as others may read it: without the person's name."""
    home, text = os.path.expanduser("~").rstrip("/"), str(path)
    inside = home not in ("", "~") and f"{text}/".startswith(f"{home}/")
    return f"~{text.removeprefix(home)}" if inside else text


def try_disk(folder: Path) -> Iterator[tuple[str, float, str]]:
    """Name of each trial, seconds that it took, and why it failed ("" where it did not). Nothing is left.

    Raises OSError where `folder` cannot be written at all.
    """
    probe = Path(tempfile.mkdtemp(prefix=".lpsparse-doctor-", dir=folder))
    try:
        for name, trial in _TRIALS.items():
            started, why = time.perf_counter(), ""
            try:
                trial(probe)
            except OSError as error:
                why = error.strerror or str(error)
            except ImportError:
                why = "this system has none"
            yield name, time.perf_counter() - started, why
    finally:
        shutil.rmtree(probe, ignore_errors=True)


def _rename(probe: Path) -> None:
    (probe / "a").mkdir()
    (probe / "a").rename(probe / "b")


def _exchange(probe: Path) -> None:
    for name in ("c", "d"):
        (probe / name).mkdir()
    if not exchange_names(probe / "c", probe / "d"):
        raise OSError("two names cannot be exchanged in one call")


def _fsync(probe: Path) -> None:
    (probe / "file").write_bytes(bytes(1 << 20))
    fsync(probe / "file")
    fsync(probe)


def _lock(probe: Path) -> None:
    import fcntl

    descriptor = os.open(probe, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(descriptor)


_TRIALS: dict[str, Callable[[Path], None]] = {
    "rename": _rename,
    "exchange": _exchange,
    "fsync": _fsync,
    "lock": _lock,
}
