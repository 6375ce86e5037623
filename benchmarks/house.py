"""Count what a reader of the source meets: files, lines, long functions, hand-kept lists, hops of options.

    python benchmarks/house.py [--no-hops]

The hops of an option: our functions on the stack where its value is used last and where it has its effect
(bytes of a weight file; the optimizer's param_groups), and those in between that make a new step of it.
"""

import argparse
import ast
import inspect
import io
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import redirect_stdout
from decimal import Decimal
from importlib import import_module
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from pydantic import BaseModel

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lpsparse"
ODD = "0.8137"  # a value that nothing else has
COMMON = ["bundled:stories260k", "out", "--quiet", "--threads", "1"]
LANGUAGE = ["--data", "bundled:shakespeare", "--task", "causal-lm", "--steps", "30", "--max-length", "16"]
COMMANDS = {
    "sparsity": ["prune", *COMMON, "--sparsity", ODD],
    "p": ["finetune", *COMMON, *LANGUAGE, "--batch-size", "2", "--target-sparsity", "0.5", "--p", ODD],
}
PATTERNS = {
    "fmt: skip": r"fmt: skip",
    "mend": r"(?i)\bmend(?:s|ed|ing)?\b",
    "isinstance of a step": r"isinstance\(.*Step\b",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--no-hops", action="store_true", help="count only; run nothing")
    parser.add_argument("--trace", choices=COMMANDS, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if asked.trace:
        return trace(asked.trace)
    print(*counted(), sep="\n", flush=True)
    for option in () if asked.no_hops else COMMANDS:
        with tempfile.TemporaryDirectory() as folder:
            words = [sys.executable, __file__, "--trace", option]
            subprocess.run(words, cwd=folder, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def counted() -> Iterator[str]:
    for folder in ("lpsparse", "tests"):
        files = [path.read_text("utf-8").splitlines() for path in (ROOT / folder).rglob("*.py")]
        yield f"{folder}: {len(files)} files, {sum(map(len, files)):,} lines"
    texts = {where(path): path.read_text("utf-8") for path in sorted(PACKAGE.rglob("*.py"))}
    lines = [(name, line.strip()) for name, text in texts.items() for line in text.splitlines()]
    nodes = [(name, node) for name, text in texts.items() for node in ast.walk(ast.parse(text))]
    yield from shown("modules in the root", [n for n in texts if n.count("/") == 1 and "__" not in n])
    yield from shown("files over 300 lines", [n for n, text in texts.items() if text.count("\n") > 300])
    yield from shown("functions over 45 lines", [f"{n}:{f.name}" for n, f in nodes if length(f) > 45])
    for title, pattern in PATTERNS.items():
        yield from shown(title, [f"{name}: {line}" for name, line in lines if re.search(pattern, line)])
    fields = fields_of_steps()
    kept = [f"{n}:{node.lineno}" for n, node in nodes for node in by_hand(node, fields)]
    yield from shown("hand-kept lists of fields", kept)
    yield from shown("lines with Any in public signatures", sorted(set(with_any())))


def shown(title: str, found: list[str]) -> Iterator[str]:
    yield f"{title}: {len(found)}"
    yield from (f"    {each}" for each in found)


def where(path: Path | str) -> str:
    return Path(path).relative_to(ROOT).as_posix()


def length(node: ast.AST) -> int:
    return node.end_lineno - node.lineno + 1 if isinstance(node, ast.FunctionDef) and node.end_lineno else 0


def fields_of_steps() -> list[set[str]]:
    path = import_module("lpsparse.steps").__path__
    modules = [import_module(f"lpsparse.steps.{each.name}") for each in pkgutil.iter_modules(path)]
    known = [each for module in modules for each in vars(module).values() if inspect.isclass(each)]
    return [set(each.model_fields) for each in known if issubclass(each, BaseModel)]


def by_hand(node: ast.AST, fields: list[set[str]]) -> Iterator[ast.expr]:  # four fifths are fields
    if isinstance(node, ast.Tuple | ast.List | ast.Set | ast.Dict):
        items = node.keys if isinstance(node, ast.Dict) else node.elts
        texts = [each.value for each in items if isinstance(each, ast.Constant)]
        names = {text.lstrip("-").replace("-", "_") for text in texts if isinstance(text, str)}
        if len(names) >= 4 and any(len(names & step) >= 0.8 * len(names) for step in fields):
            yield node


def with_any() -> Iterator[str]:
    """Lines of signatures: functions of api.py, and what `lpsparse` exports with its public methods."""
    lpsparse, api = import_module("lpsparse"), import_module("lpsparse.api")
    public = [getattr(lpsparse, name) for name in lpsparse.__all__]
    public += [each for each in vars(api).values() if getattr(each, "__module__", "") == "lpsparse.api"]
    methods = [vars(each).items() for each in public if inspect.isclass(each)]
    public += [each for items in methods for name, each in items if name == "__init__" or name[0] != "_"]
    for function in filter(inspect.isfunction, public):
        lines, first = inspect.getsourcelines(function)
        path = inspect.getsourcefile(function) or ""
        for i, line in enumerate(lines if path.startswith(str(PACKAGE)) else []):
            if re.search(r"\bAny\b", line):
                yield f"{where(path)}:{first + i}: {line.strip()}"
            if re.search(r":\s*(#.*)?$|: \.\.\.$", line):  # the end of the signature
                break


def trace(option: str) -> None:
    """Run the command of `option`, and print the functions that its value passes through."""
    used: list[CodeType] = []  # the stack where a function was last given the value itself
    made: dict[CodeType, None] = {}  # what returned a step that holds it
    effect: list[CodeType] = []  # the stack where it had its effect

    def look(frame: FrameType, event: str, what: Any) -> None:
        code = frame.f_code
        if effect or not code.co_filename.startswith(str(PACKAGE)):
            return
        if event == "call" and code.co_name[0] != "<" and any(holds(each, 0) for each in arguments(frame)):
            used[:] = stack(frame)
        elif event == "return" and is_step(what) and not any(what is each for each in arguments(frame)):
            made[code] = None
        if had_effect(option, frame, event, what):
            effect.extend(stack(frame))

    sys.argv = ["lpsparse", *COMMANDS[option]]
    from lpsparse.cli import main as run

    threading.setprofile(look)
    sys.setprofile(look)
    try:
        with redirect_stdout(io.StringIO()):
            run()
    except SystemExit as end:
        sys.setprofile(None)
        if end.code or not effect:
            raise
    hops = dict.fromkeys(f"{where(code.co_filename)}:{code.co_name}" for code in (*used, *made, *effect))
    print(f"hops of --{option}: {len(hops)}, in {len({hop.partition(':')[0] for hop in hops})} files")
    print("\n".join(f"    {hop}" for hop in hops))


def stack(frame: FrameType | None) -> list[CodeType]:
    found: list[CodeType] = []
    while frame is not None:
        if frame.f_code.co_filename.startswith(str(PACKAGE)) and frame.f_code.co_name[0] != "<":
            found.insert(0, frame.f_code)
        frame = frame.f_back
    return found


def arguments(frame: FrameType) -> list[Any]:
    code = frame.f_code
    return [
        frame.f_locals.get(name) for name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    ]


def is_step(value: Any) -> bool:
    return (
        isinstance(value, BaseModel)
        and type(value).__module__.startswith("lpsparse.steps")
        and holds(value, 1)
    )


def holds(value: Any, depth: int) -> bool:
    if isinstance(value, str | float | Decimal):
        return str(value) == ODD
    return depth > 0 and any(holds(each, depth - 1) for each in vars(value).values())


def had_effect(option: str, frame: FrameType, event: str, what: Any) -> bool:
    if option == "sparsity":
        is_write = event == "c_call" and getattr(what, "__name__", "") in (
            "write",
            "pwrite",
            "writev",
            "pwritev",
        )
        return is_write and "/checkpoint/" in frame.f_code.co_filename
    optimizers = [getattr(each, "optimizer", each) for each in arguments(frame)] if event == "return" else []
    groups = [group for each in optimizers for group in getattr(each, "param_groups", ())]
    return any(holds(value, 0) for group in groups for value in group.values())


if __name__ == "__main__":
    main()
