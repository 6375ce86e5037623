"""What a tensor costs each command, in checkpoints of very many small ones, as mixtures of experts are.

    python benchmarks/tensors.py [--counts 10000 20000 40000 80000] [--of-a-shard 500] [--commands pack ...]

Seconds are those of the command; those and the peak memory (of resource.getrusage) of a tensor are what is
more than with ten tensors. The ratio is that of core seconds to the row before, which other programs change
least. `OUT` is what prune wrote, `packed` what pack did. Expected: linear, under 2 ms and 2 kB a tensor.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMMANDS = {
    "inspect": "inspect MODEL",
    "prune": "prune MODEL OUT --sparsity 0.5",
    "pack": "pack OUT packed",
    "unpack": "unpack packed dense",
    "verify": "verify OUT MODEL",
    "report": "report OUT",
    "report BASE": "report OUT MODEL",
}
_FEW = 10


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--counts", type=int, nargs="+", default=[10_000, 20_000, 40_000, 80_000])
    parser.add_argument("--of-a-shard", type=int, default=0, help="Tensors of a file. Default: one file.")
    parser.add_argument("--commands", nargs="+", default=list(COMMANDS), choices=list(COMMANDS))
    arguments = parser.parse_args()
    print("| command | tensors | s | core s | ratio | ms a tensor | kB a tensor |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    found: dict[str, dict[int, tuple[float, float, int]]] = {name: {} for name in COMMANDS}
    for count in (_FEW, *arguments.counts):
        with tempfile.TemporaryDirectory(prefix="lpsparse-tensors-") as folder:
            model = Path(folder, "MODEL")
            write_model(model, count, arguments.of_a_shard or count)
            for name, words in COMMANDS.items():
                if name in {*arguments.commands, "prune", "pack"}:  # whose OUT the others read
                    found[name][count] = measured(Path(folder), words.split())
    for name in arguments.commands:
        seconds, _, kilobytes = found[name].pop(_FEW)
        before = 0.0
        for count, (took, cores, peak) in found[name].items():
            ratio = f"{cores / before:.2f}" if before else ""
            each = f"{1000 * (took - seconds) / count:.2f} | {(peak - kilobytes) / count:.2f}"
            print(f"| {name} | {count:,} | {took:.1f} | {cores:.1f} | {ratio} | {each} |", flush=True)
            before = cores


def write_model(folder: Path, count: int, of_a_shard: int) -> None:
    """Experts of 4 x 4 weights, in bf16, in one file or in shards with an index."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    names = [f"model.layers.{i // 256}.mlp.experts.{i % 256}.down_proj.weight" for i in range(count)]
    parts = [names[i : i + of_a_shard] for i in range(0, count, of_a_shard)]
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        of_several = f"-{number:05d}-of-{len(parts):05d}" if len(parts) > 1 else ""
        file = f"model{of_several}.safetensors"
        header = {
            name: {"dtype": "BF16", "shape": [4, 4], "data_offsets": [32 * i, 32 * i + 32]}
            for i, name in enumerate(part)
        }
        text = json.dumps(header).encode()
        weights = b"".join((15_000 + i % 1_009).to_bytes(2, "little") for i in range(16 * len(part)))
        (folder / file).write_bytes(len(text).to_bytes(8, "little") + text + weights)
        weight_map |= dict.fromkeys(part, file)
    if len(parts) > 1:
        index = {"metadata": {"total_size": 32 * count}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def measured(folder: Path, words: list[str]) -> tuple[float, float, int]:
    """Seconds, core seconds and peak kilobytes of a command."""
    begun = time.monotonic()
    with (folder / "said").open("w") as said:
        child = subprocess.Popen(
            [sys.executable, "-m", "lpsparse", *words], cwd=folder, stdout=said, stderr=said
        )
        _, status, used = os.wait4(child.pid, 0)
    took = time.monotonic() - begun
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"{' '.join(words)}: exit {child.returncode}: {(folder / 'said').read_text()[-2000:]}")
    return took, used.ru_utime + used.ru_stime, used.ru_maxrss


if __name__ == "__main__":
    main()
