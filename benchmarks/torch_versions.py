"""The tests that use torch on other releases of torch: by default the oldest that pyproject.toml allows.

    python benchmarks/torch_versions.py [VERSION ...]

Each gets a virtual environment of its own, with the newest of everything else. pip may choose a build for a
GPU, which takes some gigabytes of disk until its tests have ended.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = (
    "borrowed",
    "conditioning",
    "control",
    "data",
    "decay",
    "distill",
    "distributed",
    "finetune",
    "integrations",
    "loader",
    "loss",
    "model",
    "precision",
    "resume",
    "tasks",
    "together",
)


def main() -> None:
    floor = re.search(r'"torch>=([\d.]+),', (ROOT / "pyproject.toml").read_text())
    assert floor is not None
    failed = False
    for version in sys.argv[1:] or [floor[1]]:
        with tempfile.TemporaryDirectory(prefix="lpsparse-") as folder:
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
            python = str(Path(folder, "bin", "python"))
            for wanted in (f"torch=={version}", ".[test]"):
                subprocess.run([python, "-m", "pip", "install", "-q", wanted], cwd=ROOT, check=True)
            tests = [str(path) for name in TESTS for path in (ROOT / "tests").rglob(f"test_{name}.py")]
            ran = subprocess.run(
                [python, "-m", "pytest", "-q", *tests], cwd=ROOT, capture_output=True, text=True
            )
            lines = ran.stdout.strip().splitlines()
            print("\n".join(line for line in lines if line.startswith("FAILED")))
            print(f"torch {version}: {lines[-1]}", flush=True)
            failed |= ran.returncode != 0
    sys.exit(failed)


if __name__ == "__main__":
    main()
