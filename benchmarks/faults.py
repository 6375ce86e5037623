"""Faults of the disk and of the moment, against `prune`, `pack` and `unpack`: nothing may be half, or lost.

    python benchmarks/faults.py kills [--kills 200] [--mib 512]    SIGKILL at any moment, again and again
    python benchmarks/faults.py kills --processes 3 --kills 20 --mib 64    the same, one of several processes
    python benchmarks/faults.py calls [--command ...] [--fault ...]    each call to the system fails in turn
    python benchmarks/faults.py pages [--times 200]    flipped bits and zeroed pages in what was written

Prints what was found as a table; exit 1 when an artefact was half or differs, an input was touched, an error
was no error of two lines, or a run after the fault did not succeed with the bytes of an untouched one.
"""

import argparse
import builtins
import errno
import fcntl
import gc
import hashlib
import io
import mmap
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
from checkpoint import LPSPARSE, generate

import lpsparse
from lpsparse.checkpoint import transaction
from lpsparse.checkpoint.transaction import partial_of
from lpsparse.cli import main as lpsparse_main

PAGE = 4096  # bytes
_PATIENCE = 40  # seconds


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file but our own marks, which no manifest lists."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if not path.name.startswith(".lpsparse")
    }


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def small_model(folder: Path, mib: float, shards: int) -> Path:
    """Shards with sidecars, one of them in a folder."""
    generate(folder, mib / 1024, shard=round(mib * (1 << 20)) // shards, tensors=2)
    (folder / "README.md").write_text("the base\n")
    (folder / "extra").mkdir()
    (folder / "extra" / "vocab.txt").write_text("a\nb\n")
    return folder


def table(columns: list[str], rows: dict[str, Counter[str]]) -> None:
    print(f"| | {' | '.join(columns)} |\n|{' --- |' * (len(columns) + 1)}")
    for name, counts in rows.items():
        print(f"| {name} | {' | '.join(str(counts[column]) for column in columns)} |")


# Kills

KILLS = [
    "kills",
    "before the first write",
    "between it and the rename",
    "after",
    "OUT absent",
    "OUT whole",
    "corrupted",
    "old OUT lost",
    "inputs lost",
    "finished after a kill",
    "differ or left something",
]


def kills(folder: Path, count: int, mib: int, draw: random.Random, processes: int) -> dict[str, Counter[str]]:
    """Half of the kills with a new OUT, half with --overwrite. Each run cuts to one of two sparsities, so
    that what a killed run left behind is not always of use."""
    model = generate(folder / "model", mib / 1024, shard=(mib << 20) // 8)
    before, known, spans, wholes = digests(model), {}, [], []
    for sparsity in ("0.5", "0.8"):
        out = folder / "untouched" / sparsity
        out.parent.mkdir(exist_ok=True)
        run = Run(model, out, sparsity, overwrite=False, processes=processes)
        run.until_first_write()
        first = time.monotonic()
        while run.process.poll() is None and not out.exists():
            time.sleep(0.001)
        spans.append(time.monotonic() - first)
        wholes.append((time.time_ns() - run.begun) / 1e9)
        assert run.end() == 0
        known[(out / "lpsparse.json").read_bytes()] = sparsity
        assert lpsparse.verify(out)["ok"]
        shutil.rmtree(out)
    rows = {"new OUT": Counter(), "--overwrite": Counter()}
    for (name, found), half in zip(rows.items(), (count // 2, count - count // 2), strict=True):
        out = folder / ("over" if name == "--overwrite" else "new") / "out"
        out.parent.mkdir()
        if name == "--overwrite":
            Run(model, out, "0.5", overwrite=False).end()
        while found["kills"] < half:
            for _ in range(min(draw.randint(2, 4), half - found["kills"])):
                overwrites = name == "--overwrite"
                run = Run(
                    model,
                    out,
                    draw.choice(("0.5", "0.8")),
                    overwrite=overwrites,
                    processes=processes,
                    lost=draw.randrange(processes),
                )
                aimed = found["between it and the rename"] <= 0.6 * found["kills"]
                moment = run.killed(draw.uniform(0, max(spans if aimed else wholes)), aimed=aimed)
                if moment:
                    found["kills"] += 1
                    found[moment] += 1
                    found.update(left(out, known, overwrite=name == "--overwrite"))
                    found["inputs lost"] += digests(model) != before
                if name == "new OUT" and out.exists():
                    shutil.rmtree(out)
            run = Run(model, out, draw.choice(("0.5", "0.8")), overwrite=name == "--overwrite")
            found["finished after a kill"] += run.end() == 0
            same = artefact(out, known) == run.sparsity and os.listdir(out.parent) == ["out"]
            found["differ or left something"] += not same
            if name == "new OUT":
                shutil.rmtree(out)
    return rows


def artefact(path: Path, known: dict[bytes, str]) -> str:
    """What is at `path`: "absent", one of the `known` artefacts, by its manifest, or "corrupted"."""
    if not os.path.lexists(path):
        return "absent"
    manifest = path / "lpsparse.json"
    found = known.get(manifest.read_bytes()) if manifest.is_file() else None
    return found if found is not None and lpsparse.verify(path)["ok"] else "corrupted"


def left(out: Path, known: dict[bytes, str], *, overwrite: bool) -> list[str]:
    """What a killed run left at OUT, in words of the table."""
    found = artefact(out, known)
    if found == "absent" and overwrite:
        found = artefact(out.with_name("out.old"), known)
        if found == "absent":
            return ["old OUT lost"]
    return {"absent": ["OUT absent"], "corrupted": ["corrupted"]}.get(found, ["OUT whole"])


class Run:
    """One `lpsparse prune` in a process of its own."""

    def __init__(
        self, model: Path, out: Path, sparsity: str, *, overwrite: bool, processes: int = 1, lost: int = 0
    ) -> None:
        """The process that may be killed is the one with number `lost`."""
        self.out, self.sparsity, self.begun = out, sparsity, time.time_ns()
        self.manifest = self._manifest()
        words = ["prune", str(model), str(out), "--sparsity", sparsity, "--quiet"]
        words += ["--overwrite"] if overwrite else []
        ranks: list[subprocess.Popen[bytes]] = []
        port = str(20000 + time.time_ns() // 1_000_000 % 20000)
        for rank in range(processes):
            told = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            told |= {"LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "localhost", "MASTER_PORT": port}
            environment = os.environ | (told if processes > 1 else {})
            quiet = subprocess.DEVNULL if processes > 1 else None  # the others say that one is gone
            ranks.append(
                subprocess.Popen(
                    [*LPSPARSE, *words], stdout=subprocess.DEVNULL, stderr=quiet, env=environment
                )
            )
        self.process = ranks.pop(lost)
        self.others = ranks

    def end(self) -> int:
        return max([self.process.wait(), *(other.wait() for other in self.others)])

    def killed(self, delay: float, *, aimed: bool) -> str:
        """Kill it so many seconds after it began, or where `aimed` after its first write; the moment in words
        of the table, nothing where it had ended."""
        if aimed:
            self.until_first_write()
        try:
            self.process.wait(delay)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGKILL)
        for other in self.others:
            try:  # they end by themselves; before they have met only a launcher ends them
                other.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                other.kill()
                other.wait()
        if self.process.wait() != -signal.SIGKILL:
            return ""
        if self.has_written():
            return "between it and the rename"
        return "after" if self._manifest() != self.manifest else "before the first write"

    def until_first_write(self) -> None:
        while self.process.poll() is None and not self.has_written():
            time.sleep(0.001)

    def has_written(self) -> bool:
        """Whether OUT.partial has a file of this run beside its mark; those of a killed one are older."""
        try:
            with os.scandir(partial_of(self.out)) as entries:
                found = [entry for entry in entries if not entry.name.startswith(".lpsparse")]
                return any(entry.stat().st_mtime_ns >= self.begun for entry in found)
        except FileNotFoundError:
            return False

    def _manifest(self) -> int | None:
        """Which file the manifest at OUT is."""
        path = self.out / "lpsparse.json"
        return path.stat().st_ino if path.is_file() else None


# Calls

WRITES = (
    "write",
    "writev",
    "pwrite",
    "pwritev",
    "sendfile",
    "copy_file_range",
    "posix_fallocate",
    "truncate",
    "ftruncate",
)
KINDS = {
    **dict.fromkeys(WRITES, "write"),
    "fsync": "fsync",
    "fdatasync": "fsync",
    "rename": "rename",
    "replace": "rename",
    "mkdir": "mkdir",
    "unlink": "unlink",
    "remove": "unlink",
    "rmdir": "unlink",
    "link": "link",
    "symlink": "link",
}
CHANGES = frozenset({"create", "mkdir", "rename", "unlink", "link"})  # what a read-only disk refuses
FAULTS = {
    "ENOSPC:write": frozenset({"write"}),
    "EDQUOT:write": frozenset({"write"}),
    "EIO:write": frozenset({"write"}),
    "EIO:fsync": frozenset({"fsync"}),
    "EIO:close": frozenset({"close"}),
    "EIO:rename": frozenset({"rename"}),
    "EIO:mkdir": frozenset({"mkdir"}),
    "EROFS:change": CHANGES,
    "EMFILE:open": frozenset({"open"}),
    "EXDEV:rename": frozenset({"rename"}),
    "EOPNOTSUPP:rename": frozenset({"rename"}),
    "SIGKILL:any": CHANGES | {"write", "fsync", "close"},
    "POWER:any": CHANGES | {"write", "fsync", "close"},
}


class Disk:
    """Calls to the system beneath `root`, of which the `at`-th of some kinds fails, and all later ones if it
    is `lasting`: as on a real disk, with half of what was to be written on it; or the process is killed, or
    POWER is cut, which also takes what was not synced: the bytes of files, the names of new ones, and
    renames."""

    def __init__(self, root: Path, fault: str, at: int, *, lasting: bool) -> None:
        self.root, self.at, self.lasting, self.kinds = str(root), at, lasting, FAULTS[fault]
        self.error = fault.partition(":")[0]
        self.kills = self.error in ("SIGKILL", "POWER")
        self.unsynced: set[int] = set()  # files by their numbers
        self.unnamed: set[tuple[int, str]] = set()  # the number of a folder, and a name in it
        self.renamed: list[tuple[int, Callable[[], object]]] = []  # the number of a folder, and the way back
        self.lock = threading.Lock()
        self.count = mmap.mmap(-1, 8)  # the process that forks the run reads it, too

    @property
    def met(self) -> bool:
        return int.from_bytes(self.count[:8], "little") >= self.at

    def install(self) -> None:
        for name, kind in KINDS.items():
            setattr(os, name, self._call(getattr(os, name), name, kind))
        os.open = self._open_descriptor(os.open)
        os.close = self._close_descriptor(os.close)
        builtins.open = io.open = self._open(io.open)
        transaction.exchange_names = self._exchange(transaction.exchange_names)

    def fails(self, path: str, *kinds: str) -> bool:
        """Count a call; whether it fails. One that is killed does not return."""
        if self.kinds.isdisjoint(kinds) or not (path + "/").startswith(self.root + "/"):
            return False
        with self.lock:
            count = int.from_bytes(self.count[:8], "little") + 1
            self.count[:8] = count.to_bytes(8, "little")
        return count == self.at or (self.lasting and count > self.at)

    def fail(self, *names: object) -> None:
        """Raise the error, with the names that the system's would have."""
        if self.error == "POWER":
            self._lose()
        if self.kills:
            os.kill(os.getpid(), signal.SIGKILL)
        number = getattr(errno, self.error)
        raise OSError(number, os.strerror(number), *names)

    def wrote(self, descriptor: int) -> None:
        self.unsynced.add(os.fstat(descriptor).st_ino)

    def named(self, path: str) -> None:
        self.unnamed.add((os.stat(os.path.dirname(path)).st_ino, os.path.basename(path)))

    def moved(self, path: str, back: Callable[[], object]) -> None:
        self.renamed.append((os.stat(os.path.dirname(path)).st_ino, back))

    def synced(self, descriptor: int) -> None:
        number = os.fstat(descriptor).st_ino
        self.unsynced.discard(number)
        self.unnamed = {name for name in self.unnamed if name[0] != number}
        self.renamed = [each for each in self.renamed if each[0] != number]

    def _lose(self) -> None:
        self.kinds = frozenset()
        for _, back in reversed(self.renamed):
            with suppress(FileNotFoundError):  # deleted since
                back()
        for path in sorted(Path(self.root).rglob("*"), reverse=True):
            if (path.parent.stat().st_ino, path.name) in self.unnamed:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            elif path.stat().st_ino in self.unsynced:
                os.truncate(path, 0)

    def _call(self, real: Callable[..., Any], name: str, kind: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            target = args[1] if name == "copy_file_range" else args[0]
            if self.fails(path_of(target, options.get("dir_fd") or options.get("src_dir_fd")), kind):
                two = (args[0], None, args[1]) if kind == "rename" else (args[0],)
                self.fail(*(() if isinstance(target, int) else two))
            replaces = kind == "rename" and os.path.lexists(args[1])
            found = real(*args, **options)
            if isinstance(target, int) and kind in ("write", "fsync"):
                (self.wrote if kind == "write" else self.synced)(target)
            elif kind == "rename" and not replaces:
                self.moved(path_of(args[1]), lambda: real(args[1], args[0]))
            elif kind == "mkdir":
                self.named(path_of(target))
            return found

        return call

    def _open_descriptor(self, real: Callable[..., int]) -> Callable[..., int]:
        def opened(path: Any, flags: int, *args: Any, **options: Any) -> int:
            kinds = ("open", "create") if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) else ("open",)
            if self.fails(path_of(path, options.get("dir_fd")), *kinds):
                self.fail(path)
            return real(path, flags, *args, **options)

        return opened

    def _close_descriptor(self, real: Callable[[int], None]) -> Callable[[int], None]:
        def close(descriptor: int) -> None:
            written = fcntl.fcntl(descriptor, fcntl.F_GETFL) & (os.O_WRONLY | os.O_RDWR)
            path = path_of(descriptor)
            real(descriptor)
            if written and self.fails(path, "close"):
                self.fail()

        return close

    def _open(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def opened(
            file: Any,
            mode: str = "r",
            buffering: int = -1,
            encoding: str | None = None,
            errors: str | None = None,
            newline: str | None = None,
            *args: Any,
        ) -> Any:
            path, writes = path_of(file), bool(set(mode) & set("wax+"))
            if self.fails(path, *(("open", "create") if writes else ("open",))):
                self.fail(file)
            if not writes or not path.startswith(self.root):
                return real(file, mode, buffering, encoding, errors, newline, *args)
            raw = _File(self, path, file, mode.replace("b", "").replace("t", ""))
            if buffering == 0:
                return raw
            buffered = (io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

        return opened

    def _exchange(self, real: Callable[[Path, Path], bool]) -> Callable[[Path, Path], bool]:
        def exchange(a: Path, b: Path) -> bool:
            if self.fails(path_of(a), "rename"):
                if self.error in ("EXDEV", "EOPNOTSUPP"):
                    return False  # a disk that cannot
                self.fail(a, None, b)
            self.moved(path_of(b), lambda: real(a, b))
            return real(a, b)

        return exchange


class _File(io.FileIO):
    """A file opened for writing on such a disk."""

    def __init__(self, disk: Disk, path: str, file: Any, mode: str) -> None:
        self.disk, self.path = disk, path
        super().__init__(file, mode)
        disk.named(path)

    def write(self, data: Any) -> int:
        if self.disk.fails(self.path, "write"):
            view = memoryview(data).cast("B")
            self.disk.wrote(self.fileno())
            super().write(view[: len(view) // 2])
            self.disk.fail()
        self.disk.wrote(self.fileno())
        return super().write(data)

    def truncate(self, size: int | None = None) -> int:
        if self.disk.fails(self.path, "write"):
            self.disk.fail()
        return super().truncate(size)

    def close(self) -> None:
        if not self.closed:
            super().close()
            if self.disk.fails(self.path, "close"):
                self.disk.fail()


def path_of(target: Any, folder: int | None = None) -> str:
    """The path of a path, a descriptor, or a name in the folder of a descriptor."""
    if isinstance(target, int):
        return os.readlink(f"/proc/self/fd/{target}")
    within = os.readlink(f"/proc/self/fd/{folder}") if folder is not None else os.getcwd()
    return os.path.normpath(os.path.join(within, os.fspath(target)))


class Ran(NamedTuple):
    code: int
    said: str


def forked(words: list[str], said: Path, disk: Disk | None = None) -> Ran:
    """A command in a copy of this process, which has everything imported already, on `disk`."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code: Any = 70
        try:
            signal.alarm(60)  # where it hangs
            descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            if disk is not None:
                disk.install()
            lpsparse_main(words)
        except SystemExit as left:
            code = left.code
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code or 0)
    return Ran(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said.read_text())


CALLS = [
    "calls",
    "runs",
    "errors",
    "passed",
    "killed",
    "OUT absent",
    "OUT whole",
    "corrupted",
    "old OUT lost",
    "inputs lost",
    "wrong",
]


class Case:
    """A command on small checkpoints, what an untouched run of it gives, and trials of it."""

    def __init__(self, folder: Path, command: str, threads: int) -> None:
        self.disk, self.said = folder / "disk", folder / "said"
        self.out, self.model = self.disk / "out", self.disk / "model"
        shutil.rmtree(self.disk, ignore_errors=True)
        self.disk.mkdir()
        dense, self.old = folder / "dense", folder / "old"
        if not dense.exists():
            lpsparse.prune(small_model(dense, 1 / 8, 2), self.old, sparsity=0.5)
            lpsparse.pack(self.old, folder / "packed")
        verb, _, rest = command.partition(" ")
        shutil.copytree({"pack": self.old, "unpack": folder / "packed"}.get(verb, dense), self.model)
        self.overwrites = rest == "--overwrite"
        self.words = [verb, str(self.model), str(self.out), "--threads", str(threads)]
        self.words += ["--sparsity", "0.8"] if verb == "prune" else []
        self.input = digests(self.model)
        self.problems: list[str] = []
        self.run([])
        self.new = digests(self.out)
        gc.freeze()  # a copy of this process then copies little of its memory

    def run(self, options: list[str], disk: Disk | None = None) -> Ran:
        return forked([*self.words, *options], self.said, disk)

    def trial(self, disk: Disk, found: Counter[str]) -> None:
        """One run on `disk`, and one after it."""
        for name in os.listdir(self.disk):
            if name != "model":
                shutil.rmtree(self.disk / name)
        if self.overwrites:
            shutil.copytree(self.old, self.out)
        before = names(self.disk)
        ran = self.run(["--overwrite"] if self.overwrites else [], disk)
        if not disk.met:
            found["wrong"] += (ran.code, digests(self.out)) != (0, self.new)
            return
        wrong = list(self.wrong_words(ran, disk))
        state = self.state()
        found.update(["runs", state])
        found["calls"] = max(found["calls"], disk.at)
        found["killed" if ran.code == -signal.SIGKILL else "passed" if ran.code == 0 else "errors"] += 1
        if ran.code == 0 and state != "OUT whole":
            wrong.append(f"ends with 0, {state}")
        found["inputs lost"] += digests(self.model) != self.input
        if names(self.disk) != before or state != ("OUT whole" if self.overwrites else "OUT absent"):
            wrong += self.wrong_afterwards()  # else it would be an untouched run
        found["wrong"] += len(wrong) > 0
        where = f"{disk.error} {'from' if disk.lasting else 'at'} call {disk.at} of {sorted(disk.kinds)}"
        self.problems += [f"{where}: {words}" for words in wrong]

    def wrong_afterwards(self) -> Iterator[str]:
        """What is wrong with a run on what the first one left."""
        ran = self.run(["--overwrite"] if self.overwrites or self.out.exists() else [])
        if (ran.code, digests(self.out), sorted(os.listdir(self.disk))) != (0, self.new, ["model", "out"]):
            yield f"then: {ran.code}, {os.listdir(self.disk)}, {ran.said}"

    def state(self) -> str:
        """What is at OUT, or was put aside from it."""
        for path in (self.out, self.disk / "out.old"):
            if path.exists():
                return "OUT whole" if digests(path) in (self.new, digests(self.old)) else "corrupted"
            if not self.overwrites:
                return "OUT absent"
        return "old OUT lost"

    def wrong_words(self, ran: Ran, disk: Disk) -> Iterator[str]:
        """What is wrong with how a run ended that met a fault. A failed fsync is never got over."""
        if disk.kills:
            if ran.code != -signal.SIGKILL:
                yield f"ends with {ran.code}"
            return
        if ran.code not in (4, 6, *(() if "fsync" in disk.kinds else (0,))):
            yield f"ends with {ran.code}: {ran.said}"
        if ran.code == 0:
            return
        errors = ran.said.splitlines()[-2:]
        if not re.match(rf"error\[LPS\d+\]: .*{re.escape(str(self.disk))}", errors[0]):
            yield f"names no file: {ran.said}"
        if len(errors) != 2 or not errors[1].startswith("  hint: ") or "Traceback" in ran.said:
            yield f"not two lines: {ran.said}"


def calls(
    folder: Path, commands: list[str], faults: list[str], modes: list[str]
) -> tuple[dict[str, Counter[str]], list[str]]:
    """Each fault at each call that a command makes: that one alone ("at"), and all "from" it on. And what is
    wrong, in words."""
    rows: dict[str, Counter[str]] = {}
    problems: list[str] = []
    for command in commands:
        command, _, threads = command.partition(" on ")
        case = Case(folder, command, int(threads or 1))
        for fault in faults:
            found = rows[f"{command} {f'on {threads} ' if threads else ''}{fault}"] = Counter()
            for lasting in [mode == "from" for mode in (modes if not fault.endswith(":any") else ["at"])]:
                for at in range(1, 10**6):
                    disk = Disk(case.disk, fault, at, lasting=lasting)
                    case.trial(disk, found)
                    if not disk.met:
                        break
        problems += [f"{command}: {problem}" for problem in case.problems]
    return rows, problems


# Pages

PAGES = ["times", "verify found it", "report refused it", "tensor named", "missed"]


def pages(folder: Path, times: int, draw: random.Random) -> dict[str, Counter[str]]:
    """A bit flipped, or a page of zeros, anywhere in the weight files; put back afterwards."""
    out = folder / "out"
    lpsparse.prune(generate(folder / "model", 4 / 1024, shard=1 << 20), out, sparsity=0.8)
    files = sorted(out.glob("*.safetensors"))
    rows = {"flipped bit": Counter(), "zeroed page": Counter()}
    for i in range(times):
        name, path = list(rows)[i % 2], draw.choice(files)
        whole = path.read_bytes()
        path.write_bytes(damaged(whole, draw, page=name == "zeroed page"))
        verified = forked(["verify", str(out)], folder / "said")
        reported = forked(["report", str(out)], folder / "said")
        path.write_bytes(whole)
        seen = verified.code == 1 and path.name in verified.said
        two_lines = re.match(rf"error\[LPS\d+\]: .*{path.name}.*\n  hint: .*\n$", reported.said)
        refused = reported.code == 3 and two_lines is not None
        rows[name].update(
            {
                "times": 1,
                "verify found it": seen,
                "report refused it": refused,
                "tensor named": "layers." in reported.said,
                "missed": not seen or not refused,
            }
        )
    return rows


def damaged(whole: bytes, draw: random.Random, *, page: bool) -> bytes:
    """The bytes with one bit or one page changed."""
    changed = bytearray(whole)
    while changed == whole:
        at = draw.randrange(len(whole))
        if page:
            at -= at % PAGE
            changed[at : at + PAGE] = bytes(len(changed[at : at + PAGE]))
        else:
            changed[at] ^= 1 << draw.randrange(8)
    return bytes(changed)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["kills", "calls", "pages"])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--times", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--command",
        nargs="+",
        default=["prune", "prune --overwrite", "prune --overwrite on 2", "pack", "unpack --overwrite"],
    )
    parser.add_argument("--fault", nargs="+", choices=list(FAULTS), default=list(FAULTS))
    parser.add_argument("--mode", nargs="+", choices=["at", "from"], default=["at", "from"])
    arguments = parser.parse_args()
    draw, problems = random.Random(arguments.seed), []
    with tempfile.TemporaryDirectory(prefix="lpsparse-faults-") as name:
        folder = Path(name).resolve()
        if arguments.what == "kills":
            found = kills(folder, arguments.kills, arguments.mib, draw, arguments.processes)
            columns, rows = KILLS, found
        elif arguments.what == "calls":
            columns = CALLS
            rows, problems = calls(folder, arguments.command, arguments.fault, arguments.mode)
        else:
            columns, rows = PAGES, pages(folder, arguments.times, draw)
    table(columns, rows)
    for problem in problems:
        print(f"\nWRONG: {problem}")
    bad = ("corrupted", "old OUT lost", "inputs lost", "differ or left something", "wrong", "missed")
    sys.exit(any(counts[column] for counts in rows.values() for column in bad))


if __name__ == "__main__":
    main()
