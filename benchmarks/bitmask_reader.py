"""Have compressed-tensors itself read what lpsparse packs, and lpsparse read what compressed-tensors packed.

    python benchmarks/bitmask_reader.py [--venv FOLDER] [--golden tests/golden/compressed-tensors]

The bitmask layout is that of compressed-tensors 0.14, the last version that had it. Its requirements do not
go together with ours, so it gets a virtual environment of its own (--venv keeps it for the next time; it
takes about a minute from pip's cache) and shares only files with this one. 0.8.1, the last that packed every
tensor under its whole name, is beside it. Prints a line a check; exit 1 when one fails. --golden writes the
small files that the tests hold against `pack` and `load`, so that they need no network.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

NEW, OLD = "0.14.*", "0.8.1"
DTYPES = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--venv", type=Path)
    parser.add_argument("--golden", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lpsparse-bitmask-") as folder:
        work = Path(folder)
        venv = (arguments.venv or work / "venv").absolute()
        prepare(venv)
        files = work / "golden"
        files.mkdir()
        inside(venv, "write", files)
        inside(venv, "write_old", files, PYTHONPATH=str(venv / OLD))
        passed = [*written_by_them(files, work), *written_by_us(files, work, venv)]
        if arguments.golden is not None:
            shutil.copytree(files, arguments.golden, dirs_exist_ok=True)
            for path in arguments.golden.rglob("*.safetensors"):
                path.chmod(0o644)
    print(f"{sum(passed)} of {len(passed)} ok")
    sys.exit(0 if all(passed) else 1)


def prepare(venv: Path) -> None:
    import torch

    python = venv / "bin" / "python"
    if not (venv / OLD).is_dir():
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        version = torch.__version__.partition("+")[0]
        wanted = [f"compressed-tensors=={NEW}", f"torch=={version}", "psutil", "accelerate"]
        subprocess.run([*pip, *wanted], check=True)
        subprocess.run(
            [*pip, "--no-deps", "--target", str(venv / OLD), f"compressed-tensors=={OLD}"], check=True
        )


def inside(venv: Path, action: str, *paths: Path, **environment: str) -> bool:
    """Run a function of this file where compressed-tensors is. Whether it ended well."""
    names = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | environment
    code = (
        f"import sys; sys.path.append({str(Path(__file__).parent)!r}); import bitmask_reader as b; b.{action}"
    )
    words = [str(venv / "bin" / "python"), "-W", "ignore", "-c", f"{code}(*sys.argv[1:])", *map(str, paths)]
    done = subprocess.run(words, env=names, capture_output=True, text=True)
    if done.returncode:
        print(done.stdout + done.stderr, file=sys.stderr)
    assert done.returncode == 0 or action == "read", f"{action}: failed"
    return done.returncode == 0


# With lpsparse


def written_by_them(files: Path, work: Path) -> list[bool]:
    """lpsparse opens and unpacks each, bit by bit, and packs the dense form to the same bytes."""
    from safetensors import safe_open

    import lpsparse

    passed: list[bool] = []
    for packed, dense in (
        ("parts.safetensors", "dense.safetensors"),
        ("old.safetensors", "old-dense.safetensors"),
        ("sparse-bitmask", "sparse-bitmask-dense.safetensors"),
        ("sparse-24-bitmask", "sparse-24-bitmask-dense.safetensors"),
    ):
        lpsparse.unpack(files / packed, work / f"unpacked-{packed}")
        for path in (files / packed, work / f"unpacked-{packed}"):
            same = bits(lpsparse.load(path)) == bits(lpsparse.load(files / dense))
            passed.append(
                say(same, f"{packed}: {'unpacked' if path.parent == work else 'opened'} bit by bit")
            )
    for theirs, dense in (
        ("parts.safetensors", "dense.safetensors"),
        ("sparse-bitmask/model.safetensors", "sparse-bitmask-dense.safetensors"),
    ):
        lpsparse.pack(files / dense, work / f"packed-{dense}", layout="bitmask")
        with (
            safe_open(work / f"packed-{dense}" / "lpsparse.safetensors", "pt") as ours,
            safe_open(files / theirs, "pt") as other,
        ):
            mine, known = ({name: f.get_tensor(name) for name in f.keys()} for f in (ours, other))  # noqa: SIM118
        for name in sorted(name.removesuffix(".bitmask") for name in mine if name.endswith(".bitmask")):
            parts = [f"{name}.{part}" for part in ("compressed", "bitmask", "shape", "row_offsets")]
            if all(part in known for part in parts):
                same = bits({p: mine[p] for p in parts}) == bits({p: known[p] for p in parts})
                passed.append(
                    say(same, f"{dense}: {name} packed to the same names, dtypes, shapes and bytes")
                )
    return passed


def written_by_us(files: Path, work: Path, venv: Path) -> list[bool]:
    """compressed-tensors unpacks what `pack` has just written."""
    return [
        say(
            inside(venv, "read", work / f"packed-{dense}" / "lpsparse.safetensors", files / dense),
            f"{dense}: packed by lpsparse, read by compressed-tensors {NEW} bit by bit",
        )
        for dense in ("dense.safetensors", "sparse-bitmask-dense.safetensors")
    ]


def say(passed: bool, what: str) -> bool:
    print(f"{'ok  ' if passed else 'FAIL'}  {what}", flush=True)
    return passed


def bits(tensors: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    import torch

    return {
        name: (str(t.dtype), tuple(t.shape), t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, t in tensors.items()
    }


# With compressed-tensors


def sparse(shape: tuple[int, ...], dtype: str, seed: int) -> Any:
    """Nine of ten are +0, and so is a row; columns need not be whole bytes of a mask."""
    import torch

    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    values = torch.where(values.abs() > 1.6, values, torch.zeros_like(values))
    if len(shape) > 1 and shape[0] > 2:
        values[1] = 0
    return values.to(getattr(torch, dtype))


def write(folder: str) -> None:
    """A file of single weights, and a model saved in either layout; each dense, too."""
    from compressed_tensors.compressors import BitmaskCompressor
    from compressed_tensors.config import BitmaskConfig
    from safetensors.torch import save_file

    files = Path(folder)
    state = {f"{dtype}.weight": sparse((11, 29), dtype, seed) for seed, dtype in enumerate(DTYPES)}
    state["aligned.weight"] = sparse((11, 32), "bfloat16", 7)
    state["zero.weight"] = sparse((11, 29), "float32", 8).abs() * 0
    state |= {
        "rowless.weight": sparse((0, 7), "float32", 9),
        "columnless.weight": sparse((7, 0), "float32", 9),
    }
    state["a.bias"] = sparse((13,), "float32", 10)  # stays as it is
    save_file(state, files / "dense.safetensors")
    save_file(BitmaskCompressor(BitmaskConfig()).compress(state), files / "parts.safetensors")
    for layout in ("sparse-bitmask", "sparse-24-bitmask"):
        _write_model(files, layout)


def _write_model(files: Path, layout: str) -> None:
    """As llm-compressor saved one: packed state dict, save_pretrained, then the config."""
    import torch
    from compressed_tensors import ModelCompressor
    from compressed_tensors.compressors.sparse_compressors.sparse_24_bitmask import get_24_bytemasks
    from compressed_tensors.config import SparsityCompressionConfig
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=20
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            weight = module.weight.data
            kept = weight.abs() > 0.03 if layout == "sparse-bitmask" else get_24_bytemasks(weight)
            module.weight.data = torch.where(kept, weight, torch.zeros_like(weight))
    save_file(
        {name: value.clone() for name, value in model.state_dict().items()},
        files / f"{layout}-dense.safetensors",
    )
    structure = "2:4" if layout == "sparse-24-bitmask" else "unstructured"
    told = SparsityCompressionConfig.load_from_registry(
        layout, targets=["Linear"], ignore=["lm_head"], global_sparsity=0.5, sparsity_structure=structure
    )
    compressor = ModelCompressor(sparsity_config=told)
    model.save_pretrained(files / layout, state_dict=compressor.compress(model), safe_serialization=True)
    compressor.update_config(str(files / layout))
    (files / layout / "generation_config.json").unlink()


def write_old(folder: str) -> None:
    """Every tensor packed under its whole name, as until 0.8: of no, one, two and four dimensions."""
    from compressed_tensors.compressors import BitmaskCompressor
    from safetensors.torch import save_file

    state = {
        "a.weight": sparse((7, 13), "float32", 1),
        "a.bias": sparse((13,), "float16", 2),
        "conv.weight": sparse((5, 3, 3, 3), "bfloat16", 3),
        "ids": sparse((3, 11), "int64", 4),
        "count": sparse((), "int64", 5) + 3,
    }
    save_file(state, Path(folder) / "old-dense.safetensors")
    save_file(BitmaskCompressor(config=None).compress(state), Path(folder) / "old.safetensors")


def read(packed: str, dense: str) -> None:
    from compressed_tensors.compressors import BitmaskCompressor
    from compressed_tensors.config import BitmaskConfig
    from safetensors.torch import load_file

    found = dict(BitmaskCompressor(BitmaskConfig()).decompress(packed))
    assert bits(found) == bits(load_file(dense)), sorted(found)


if __name__ == "__main__":
    main()
