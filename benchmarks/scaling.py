"""Examples a second of `finetune` with 1 and more processes, and what lpsparse's part of the step costs.

    python benchmarks/scaling.py [--model bundled:stories260k] [--data bundled:shakespeare] [--processes 1,2]
        [--batch-size 32] [--max-length 64] [--steps 60] [--shard]

Each figure is the difference of a run of three times the steps and one of the steps, so that starting up,
loading and measuring do not count; ratios are side by side in one call. `plain` is `--method dense`.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="bundled:stories260k")
    parser.add_argument("--data", default="bundled:shakespeare")
    parser.add_argument("--processes", default="1,2")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--shard", action="store_true")
    arguments = parser.parse_args()
    methods = {"plain": ["--method", "dense"], "lpsparse": ["--target-sparsity", "0.8"]}
    first: dict[str, float] = {}
    print("| processes | method | examples a second | to plain | to one process |")
    print("| --- | --- | --- | --- | --- |")
    for processes in (int(text) for text in arguments.processes.split(",")):
        rates = {name: rate(arguments, processes, words) for name, words in methods.items()}
        for name, value in rates.items():
            first.setdefault(name, value)
            ratios = f"{value / rates['plain']:.2f} | {value / first[name]:.2f}"
            print(f"| {processes} | {name} | {value:.1f} | {ratios} |", flush=True)


def rate(arguments: argparse.Namespace, processes: int, words: list[str]) -> float:
    seconds = [timed(arguments, processes, words, times * arguments.steps) for times in (1, 3)]
    return 2 * arguments.steps * arguments.batch_size / (seconds[1] - seconds[0])


def timed(arguments: argparse.Namespace, processes: int, words: list[str], steps: int) -> float:
    folder = Path(tempfile.mkdtemp(prefix="lpsparse-scaling-"))
    command = [
        sys.executable,
        "-m",
        "lpsparse",
        "finetune",
        arguments.model,
        str(folder / "out"),
        "--data",
        arguments.data,
        "--task",
        "causal-lm",
        "--steps",
        str(steps),
        "--batch-size",
        str(arguments.batch_size),
        "--max-length",
        str(arguments.max_length),
        "--threads",
        "1",
        "--processes",
        str(processes),
        *(["--shard"] if arguments.shard and processes > 1 else []),
        "--eval-split",
        "validation[:4000]",
        "--quiet",
        "--json",
        *words,
    ]
    begun = time.monotonic()
    try:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return time.monotonic() - begun
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
