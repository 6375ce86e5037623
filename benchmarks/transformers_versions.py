"""The tests of the loader and of the callback on other transformers than the installed one: by default the
newest release of each minor version that we support.

    python benchmarks/transformers_versions.py [VERSION ...]

Each is installed beside, without its dependencies: those that are installed serve both.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = ("tests/integrations/test_loader.py", "tests/integrations/test_integrations.py")


def supported() -> list[str]:
    """The newest of each minor version that pyproject.toml allows and the index has, oldest first."""
    wanted = re.search(r'"transformers>=([\d.]+),<(\d+)"', (ROOT / "pyproject.toml").read_text())
    assert wanted is not None
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "index", "versions", "transformers"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found = re.search(r"Available versions: (.*)", listed)
    assert found is not None
    least = tuple(int(part) for part in wanted[1].split("."))
    newest: dict[tuple[int, ...], str] = {}
    for version in found[1].split(", "):  # the newest comes first
        minor = tuple(int(part) for part in version.split(".")[:2])
        if least <= minor < (int(wanted[2]),):
            newest.setdefault(minor, version)
    return [newest[minor] for minor in sorted(newest)]


def main() -> None:
    failed = False
    for version in sys.argv[1:] or supported():
        with tempfile.TemporaryDirectory(prefix="lpsparse-") as folder:
            pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder]
            subprocess.run([*pip, f"transformers=={version}"], check=True, stderr=subprocess.DEVNULL)
            path = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
            ran = subprocess.run(
                [sys.executable, "-m", "pytest", "-q", "-n", "0", *TESTS],
                cwd=ROOT,
                capture_output=True,
                text=True,
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            )
            print(f"transformers {version}: {ran.stdout.strip().splitlines()[-1]}", flush=True)
            failed |= ran.returncode != 0
    sys.exit(failed)


if __name__ == "__main__":
    main()
