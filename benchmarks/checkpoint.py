"""Speed and memory on checkpoints of gigabytes, as ratios to what is measured beside it in the same run.

    python benchmarks/checkpoint.py prune [--gib 1 2 4] [--rounds 3]    against `cp -r` and sync of the folder
    python benchmarks/checkpoint.py rivals [--gib 1]                    against what a user would write
    python benchmarks/checkpoint.py inspect                             700 tensors, 100 GB, sparse files
    python benchmarks/checkpoint.py report [--gib 1 4]                  against `cat`; and of 20,000 tensors

Checkpoints are generated: shards of 256 MiB, bf16, normal weights. Caches are warm. Peak memory is the
largest RssAnon of the process, read every 10 ms.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

SHARD = 256 << 20  # bytes
COLUMNS = 4096
LPSPARSE = [sys.executable, "-m", "lpsparse"]

KTHVALUE = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
source, out = map(Path, sys.argv[1:])
out.mkdir()
for path in sorted(source.glob("*.safetensors")):
    tensors = load_file(path)
    for name, tensor in tensors.items():
        size = tensor.abs().flatten().float()
        edge = size.kthvalue(int(0.8 * size.numel())).values
        tensors[name] = torch.where(tensor.abs() > edge.to(tensor.dtype), tensor, 0)
    save_file(tensors, out / path.name, metadata={"format": "pt"})
"""
GLOBAL = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from torch.nn.utils import prune
source, out = map(Path, sys.argv[1:])
out.mkdir()
files, modules = {}, []
for path in sorted(source.glob("*.safetensors")):
    files[path.name] = {}
    for name, tensor in load_file(path).items():
        module = torch.nn.Module()
        module.weight = torch.nn.Parameter(tensor)
        files[path.name][name] = module
        modules.append((module, "weight"))
prune.global_unstructured(modules, prune.L1Unstructured, amount=0.8)
for name, of in files.items():
    tensors = {}
    for key, module in of.items():
        prune.remove(module, "weight")
        tensors[key] = module.weight.detach()
    save_file(tensors, out / name, metadata={"format": "pt"})
"""


def generate(folder: Path, gib: float, shard: int = SHARD, tensors: int = 4) -> Path:
    """Shards of so many bytes and tensors with an index; the same for the same numbers."""
    folder.mkdir()
    draw, weight_map, shards = np.random.default_rng(0), {}, round(gib * (1 << 30) / shard)
    for i in range(shards):
        name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        with (folder / name).open("wb") as file:
            rows = shard // tensors // 2 // COLUMNS
            entries = {
                f"layers.{i}.{k}.weight": {
                    "dtype": "BF16",
                    "shape": [rows, COLUMNS],
                    "data_offsets": [k * shard // tensors, (k + 1) * shard // tensors],
                }
                for k in range(tensors)
            }
            text = json_of({"__metadata__": {"format": "pt"}, **entries})
            file.write(len(text).to_bytes(8, "little") + text)
            for _ in entries:
                values = draw.standard_normal((rows, COLUMNS), np.float32) * np.float32(0.02)
                file.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
            weight_map |= dict.fromkeys(entries, name)
    (folder / "model.safetensors.index.json").write_bytes(json_of({"weight_map": weight_map}))
    (folder / "config.json").write_text('{"model_type": "llama"}\n')
    return folder


def json_of(value: object) -> bytes:
    import json

    text = json.dumps(value).encode()
    return text + b" " * (-len(text) % 8)


def measured(command: list[str]) -> tuple[float, int]:
    """Wall seconds, and the most anonymous memory in bytes."""
    begun, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while process.poll() is None:
        peak = max(peak, anonymous(process.pid))
        time.sleep(0.01)
    assert process.stderr is not None
    said = process.stderr.read().decode()
    if process.returncode:
        sys.exit(f"{' '.join(command[:4])} ... ended with {process.returncode}:\n{said}")
    return time.perf_counter() - begun, peak


def anonymous(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    return 0


def prune(sizes: list[float], rounds: int, folder: Path) -> None:
    print("| GiB | cp -r; sync | prune --sparsity 0.8 | ratio | s a GiB | peak anonymous memory, largest |")
    print("| --- | --- | --- | --- | --- | --- |")
    middles: list[int] = []
    for gib in sizes:
        source = generate(folder / "model", gib)
        subprocess.run(["sync"], check=True)
        copies, cuts, peaks = [], [], []
        for _ in range(rounds):
            copies.append(measured(["sh", "-c", f"cp -r {source} {folder / 'copy'} && sync"])[0])
            shutil.rmtree(folder / "copy")
            seconds, peak = measured(
                [*LPSPARSE, "prune", str(source), str(folder / "out"), "--sparsity", "0.8"]
            )
            cuts.append(seconds)
            peaks.append(peak)
            shutil.rmtree(folder / "out")
        ratio = sorted(cut / copy for cut, copy in zip(cuts, copies, strict=True))[rounds // 2]
        copy, cut = sorted(copies)[rounds // 2], sorted(cuts)[rounds // 2]
        middles.append(sorted(peaks)[rounds // 2])
        print(
            f"| {gib:g} | {copy:.1f} s | {cut:.1f} s | {ratio:.2f} | {cut / gib:.2f} | "
            f"{middles[-1] / (1 << 20):.0f}, {max(peaks) / (1 << 20):.0f} MiB |",
            flush=True,
        )
        shutil.rmtree(source)
    print(f"memory of the last to the first: {middles[-1] / middles[0]:.3f} times")


def warm(source: Path) -> None:
    """Copy a folder and delete the copy, so that each turn finds the disk idle and the memory that files are
    cached in at hand: a virtual machine gives memory that is idle for seconds back to its host."""
    copy = source.with_name("warm")
    shutil.copytree(source, copy)
    subprocess.run(["sync"], check=True)
    shutil.rmtree(copy)


def rivals(gib: float, rounds: int, folder: Path) -> None:
    """Medians of rounds in which each has its turn; global_unstructured, which takes minutes, has the last
    one only: it has the machine give up its caches."""
    source = generate(folder / "model", gib)
    ways = {
        "lpsparse prune": [*LPSPARSE, "prune", "--sparsity", "0.8"],
        "safetensors + kthvalue": [sys.executable, "-c", KTHVALUE],
        "global_unstructured": [sys.executable, "-c", GLOBAL],
    }
    print(f"| {gib:g} GiB bf16 at 0.8 | seconds | times ours | peak anonymous memory | times ours |")
    print("| --- | --- | --- | --- | --- |")
    turns: dict[str, list[tuple[float, int]]] = {name: [] for name in ways}
    for i in range(rounds):
        for name, command in ways.items():
            if i == rounds - 1 or name != "global_unstructured":
                warm(source)
                turns[name].append(measured([*command, str(source), str(folder / "out")]))
                shutil.rmtree(folder / "out")
    middle = {
        name: (sorted(s for s, _ in of)[len(of) // 2], sorted(b for _, b in of)[len(of) // 2])
        for name, of in turns.items()
    }
    ours = middle["lpsparse prune"]
    for name, found in middle.items():
        print(
            f"| {name} | {found[0]:.1f} | {found[0] / ours[0]:.1f} | {found[1] / (1 << 20):.0f} MiB | "
            f"{found[1] / ours[1]:.1f} |",
            flush=True,
        )


def report(sizes: list[float], rounds: int, folder: Path) -> None:
    """The goal is the larger of 1.5 times `cat` and 1.5 s a GiB, with the time that starting takes."""
    start = sorted(measured([*LPSPARSE, "report", "--help"])[0] for _ in range(rounds))[rounds // 2]
    print(f"starting takes {start:.2f} s (report --help)")
    print("| GiB, zeros | cat | report | s a GiB, without starting | times cat | peak anonymous memory |")
    print("| --- | --- | --- | --- | --- | --- |")
    for gib in sizes:
        source = generate(folder / "model", gib)
        sparse = folder / "sparse"
        measured([*LPSPARSE, "prune", str(source), str(sparse), "--sparsity", "0.8"])
        (sparse / "lpsparse.json").unlink()  # with it the hashes are checked too, 0.65 core seconds a GiB
        for name, model in (("none", source), ("0.8", sparse)):
            cats, ours, peaks = [], [], []
            for _ in range(rounds):
                cats.append(measured(["sh", "-c", f"cat {model}/*.safetensors"])[0])
                seconds, peak = measured([*LPSPARSE, "report", str(model), "--json", str(folder / "r.json")])
                ours.append(seconds)
                peaks.append(peak)
            cat, our = sorted(cats)[rounds // 2], sorted(ours)[rounds // 2]
            print(
                f"| {gib:g}, {name} | {cat:.2f} s | {our:.2f} s | {(our - start) / gib:.2f} | "
                f"{our / cat:.1f} | {max(peaks) / (1 << 20):.0f} MiB |",
                flush=True,
            )
        shutil.rmtree(source)
        shutil.rmtree(sparse)
    many(folder)


def many(folder: Path) -> None:
    """A checkpoint of 20,000 tensors, all views written."""
    source = folder / "many.safetensors"
    draw = np.random.default_rng(0)
    from safetensors.numpy import save_file

    save_file(
        {f"layers.{i}.mlp.up_proj.weight": draw.standard_normal((16, 32), np.float32) for i in range(20_000)},
        source,
    )
    views = ("json", "html", "markdown", "comment", "junit", "csv")
    files = [word for view in views for word in (f"--{view}", str(folder / f"r.{view}"))]
    seconds, peak = measured([*LPSPARSE, "report", str(source), *files])
    sizes = ", ".join(f"{view} {(folder / f'r.{view}').stat().st_size / 1e6:.2f} MB" for view in views)
    print(f"20,000 tensors: {seconds:.1f} s, {peak / (1 << 20):.0f} MiB; {sizes}")


def inspect(folder: Path) -> None:
    """Headers of 100 GB whose weights are holes."""
    (folder / "model").mkdir()
    weight_map, shards, each = {}, 20, 35
    for i in range(shards):
        name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        rows = 10**11 // (shards * each) // 8192
        entries = {
            f"layers.{i}.{k}.weight": {
                "dtype": "BF16",
                "shape": [rows, 4096],
                "data_offsets": [k * rows * 8192, (k + 1) * rows * 8192],
            }
            for k in range(each)
        }
        text = json_of(entries)
        with (folder / "model" / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + each * rows * 8192)
        weight_map |= dict.fromkeys(entries, name)
    (folder / "model" / "model.safetensors.index.json").write_bytes(json_of({"weight_map": weight_map}))
    seconds = sorted(measured([*LPSPARSE, "inspect", str(folder / "model")])[0] for _ in range(5))[2]
    print(f"inspect of {shards * each} tensors, 100 GB: {seconds:.2f} s (median of 5)")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["prune", "rivals", "inspect", "report"])
    parser.add_argument("--gib", type=float, nargs="+")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lpsparse-bench-") as name:
        if arguments.what == "prune":
            prune(arguments.gib or [1, 2, 4], arguments.rounds, Path(name))
        elif arguments.what == "rivals":
            rivals((arguments.gib or [1])[0], arguments.rounds, Path(name))
        elif arguments.what == "report":
            report(arguments.gib or [1, 4], arguments.rounds, Path(name))
        else:
            inspect(Path(name))


if __name__ == "__main__":
    main()
