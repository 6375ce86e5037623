"""Kill a fine-tune again and again until it has ended, and compare with one that was left alone.

    python benchmarks/kills.py [--kills 200] [--seed 0] [--processes 2] [-- OPTIONS OF finetune]

The long form of the test of twenty kills: the whole command, at any moment, from its imports to its last
rename. Prints each seed's verdict; exit 1 when the two folders differ or OUT was ever there and not whole.
"""

import argparse
import hashlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("options", nargs="*")
    arguments = parser.parse_args()
    folder, draw, kills = Path(tempfile.mkdtemp(prefix="lpsparse-kills-")), random.Random(arguments.seed), 0
    command = [
        sys.executable,
        "-m",
        "lpsparse",
        "finetune",
        "bundled:stories260k",
        "--data",
        "bundled:shakespeare",
        "--task",
        "causal-lm",
        "--target-sparsity",
        "0.7",
        "--threads",
        "1",
        "--max-length",
        "32",
        "--eval-split",
        "validation[:4000]",
        "--steps",
        "400",
        "--save-every",
        "5",
        "--quiet",
        "--processes",
        str(arguments.processes),
        *arguments.options,
    ]
    begun = time.monotonic()
    subprocess.run([*command, str(folder / "whole")], check=True, stdout=subprocess.DEVNULL)
    usual = time.monotonic() - begun
    while kills < arguments.kills and not (folder / "out").exists():
        run = subprocess.Popen([*command, str(folder / "out")], stdout=subprocess.DEVNULL)
        try:
            run.wait(draw.uniform(0.3, 1.0) * usual)
        except subprocess.TimeoutExpired:
            run.send_signal(signal.SIGKILL)
            run.wait()
            kills += 1
        if (folder / "out").exists():
            subprocess.run(
                [sys.executable, "-m", "lpsparse", "verify", str(folder / "out")],
                check=True,
                stdout=subprocess.DEVNULL,
            )
            if digest(folder / "out") != digest(folder / "whole"):
                sys.exit(f"seed {arguments.seed}: differs after {kills} kills: {folder}")
            if kills < arguments.kills:
                shutil.rmtree(folder / "out")
    print(f"seed {arguments.seed}: {kills} kills, every OUT whole and the same bits")
    shutil.rmtree(folder)


def digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


if __name__ == "__main__":
    main()
