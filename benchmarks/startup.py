"""Seconds that the shortest commands take, beside Python's own start and typer's import in the same run.

    python benchmarks/startup.py [--rounds 21]

Each has its turn in every round. Install lpsparse as users do (`pip install .`): of an editable install with
PYTHONDONTWRITEBYTECODE set every module is compiled anew.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

GOAL = 0.25  # s, of --help
LPSPARSE = [sys.executable, "-m", "lpsparse"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=21)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as made:
        report = _report(Path(made))
        commands = {
            "python -c pass": [sys.executable, "-c", "pass"],
            "import typer.main": [sys.executable, "-c", "import typer.main"],
            "lpsparse --help": [*LPSPARSE, "--help"],
            "lpsparse prune --help": [*LPSPARSE, "prune", "--help"],
            "lpsparse report report.json": [*LPSPARSE, "report", str(report)],
        }
        took: dict[str, list[float]] = {name: [] for name in commands}
        for i in range(rounds + 1):  # the first one fills the caches
            for name, words in commands.items():
                begun = time.perf_counter()
                subprocess.run(words, cwd=made, stdout=subprocess.DEVNULL, check=True)
                took[name] += [time.perf_counter() - begun] if i else []
    print("| | median, s | fastest, s |\n| --- | --- | --- |")
    for name, each in took.items():
        print(f"| {name} | {median(each):.3f} | {min(each):.3f} |")
    found = median(took["lpsparse --help"])
    print(f"\n--help: {'met' if found <= GOAL else 'missed'}: {found:.3f} of {GOAL} s")


def _report(folder: Path) -> Path:
    """A report.json of one small tensor."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    (folder / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    out = folder / "report.json"
    words = [*LPSPARSE, "report", str(folder / "w.safetensors"), "--json", str(out), "--quiet"]
    subprocess.run(words, stdout=subprocess.DEVNULL, check=True)
    return out


if __name__ == "__main__":
    main()
