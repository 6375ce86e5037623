"""Run a command, and check what every report must be."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from support.files import ROOT


class Ran(NamedTuple):
    rc: int
    stdout: str
    stderr: str


# Training is the same on every CPU, whether it has bf16 or not; tests of --mixed-precision ask for another.
FP32 = {"LPSPARSE_MIXED_PRECISION": "no"}


def cli_environment(**env: str | None) -> dict[str, str]:
    """This process's environment without settings of lpsparse, offline; a value of None removes a name."""
    names = {
        key: value for key, value in os.environ.items() if not key.startswith(("LPSPARSE_", "HF_", "GITHUB_"))
    }
    names |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}
    names |= FP32
    names |= {key: value for key, value in env.items() if value is not None}
    return {key: value for key, value in names.items() if env.get(key, "") is not None}


_VALID: set[bytes] = set()  # hashes of the reports that were looked at


@cache
def validator() -> Any:
    from jsonschema import Draft202012Validator

    schema = json.loads((ROOT / "docs" / "report.schema.json").read_text())
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def check_report(text: bytes) -> None:
    key = hashlib.sha256(text).digest()
    if key not in _VALID:
        validator().validate(json.loads(text))
        _VALID.add(key)


def check_reports(args: list[str], ran: Ran) -> None:
    """What `report --json` wrote is a report, whatever is tested."""
    for flag, where in pairwise(args):
        if args[0] == "report" and flag == "--json" and ran.rc in (0, 1):
            check_report(ran.stdout.encode() if where == "-" else Path(where).read_bytes())


def run_cli(args: list[object], *, cwd: Path | None = None, **env: str | None) -> Ran:
    """A command in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "lpsparse", *map(str, args)],
        cwd=cwd,
        env=cli_environment(**env),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=120,
    )
    ran = Ran(done.returncode, done.stdout.decode(), done.stderr.decode())
    check_reports([str(arg) for arg in args], ran)
    return ran


# A runner in the background has Ctrl-C switched off and its children inherit that, so they switch it on.
LISTENING = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from lpsparse.cli import main
main()
"""


Cli = Callable[..., Ran]


ERROR = re.compile(r"error\[LPS[0-9]{3}\]: \S.*\n  hint: \S.*\n")


def failed(ran: Ran, rc: int) -> str:
    """The two lines of an error, after checking that they are all there is."""
    assert ran.rc == rc, ran.stderr
    assert ran.stdout == ""
    assert ERROR.fullmatch(ran.stderr), ran.stderr
    return ran.stderr


RECIPE = """
version: 1
model: tiny
out: made
steps:
  - prune: {sparsity: 0.8, out: sparse}
  - pack: {out: packed}
  - verify: {}
  - report: {min_sparsity: 0.7}
"""


BROKEN: dict[str, tuple[str | bytes, list[str]]] = {
    "empty": ("", ["not a table of keys"]),
    "a list": ("- prune", ["not a table of keys"]),
    "not yaml": ("model: [", ["not valid YAML"]),
    "binary": (b"\xff\xfe\0\0", ["not valid YAML"]),
    "not utf-8": (b"model: \xff", ["not valid YAML"]),
    "object tag": ("model: !!python/object/apply:os.system ['touch x']", ["not valid YAML", "python/object"]),
    "a date that is none": ("model: 2024-99-99", ["not valid YAML"]),
    "nested": ("model: " + "[" * 500_000, ["nested more than 20 deep"]),
    "alias": ("model: &a x\nout: *a", ["aliases"]),
    "alias bomb": ("a: &a [x,x]\nb: &b [*a,*a]\nc: [*b,*b]", ["aliases"]),
    "a key twice": (f"model: other\n{RECIPE}", ["line 4", "'model' stands twice"]),
    "a setting twice": (RECIPE.replace("0.8", "0.8, sparsity: 0.2"), ["'sparsity' stands twice"]),
    "no steps": ("model: tiny", ["steps"]),
    "steps empty": ("model: tiny\nsteps: []", ["steps"]),
    "no model": ("steps: [verify: {}]", ["model must be given"]),
    "misspelt key": (RECIPE.replace("out: made", "uot: made"), ["'uot'", "did you mean out?"]),
    "misspelt setting": (
        RECIPE.replace("{sparsity", "{sparsty"),
        ["[0].prune", "'sparsty'", "did you mean sparsity?"],
    ),
    "unknown step": (RECIPE.replace("- pack", "- pakc"), ["steps[1]", "'pakc'", "did you mean pack?"]),
    "two steps in one": (RECIPE.replace("  - pack: {out: packed}", "    pack: {}"), ["[0]", "prune, pack"]),
    "step without name": (RECIPE.replace("- verify: {}", "- {}"), ["steps[2]"]),
    "wrong value": (RECIPE.replace("0.8", "80"), ["steps[0].prune", "sparsity", "80"]),
    "text for a number": (RECIPE.replace("0.8", "most"), ["sparsity", "'most'"]),
    "number for a key": ("1: 2\n" + RECIPE, ["'1'"]),
    "wrong version": (RECIPE.replace("version: 1", "version: 99"), ["version"]),
    "two rules": (RECIPE.replace("0.8", "0.8, gap: true"), ["--sparsity, --gap"]),
}
