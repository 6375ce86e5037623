"""From a checkpoint to a torch module and back: names, dtypes, heads. The weights are read by lpsparse alone.

transformers gets a state dict, never a file: shard indexes, pickles and missing tensors are our own checks'
matter.
"""

import importlib
import importlib.util
import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lpsparse.checkpoint import opening
from lpsparse.checkpoint.dtypes import DTYPES
from lpsparse.checkpoint.opening import Blocks, Checkpoint
from lpsparse.errors import InputError, UsageError

TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


@dataclass(frozen=True, slots=True)
class Loaded:
    """A module, and what each of its tensors is called in the checkpoint that will be written."""

    module: nn.Module
    names: dict[str, str]  # name in the module -> name in OUT
    new: tuple[str, ...]  # names in OUT of tensors that the checkpoint lacks (a fresh head)
    notes: tuple[str, ...]


def to_tensor(tensor: opening.Tensor) -> Tensor:
    """The tensor as torch sees it, in its own dtype; a copy."""
    if tensor.dtype not in TORCH_DTYPES:
        raise InputError(
            390, f"{tensor.file}: {tensor.name!r}: {tensor.dtype} cannot be trained", mend="convert it"
        )
    dtype = TORCH_DTYPES[tensor.dtype]
    raw = torch.from_numpy(tensor.read().view(f"<i{dtype.itemsize}" if dtype.itemsize > 1 else "u1").copy())
    return raw.view(dtype)


def from_tensor(value: Tensor, dtype: str) -> Any:
    """Raw bits of a tensor cast to a storage dtype; zeros come out as +0."""
    cast = value.detach().to("cpu", TORCH_DTYPES[dtype]).contiguous()
    if cast.dtype.is_floating_point:
        cast = torch.where(cast.float() == 0, torch.zeros_like(cast), cast)
    return cast.view(_BITS[cast.element_size()]).numpy().view(DTYPES[dtype].storage)


def read_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """config.json of a Hugging Face folder, refused when it asks for code of its own."""
    path = checkpoint.root / "config.json" if checkpoint.root else None
    if path is None or not path.is_file():
        what = f"{checkpoint.name}: no config.json beside the weights"
        raise InputError(391, what, mend="give a Hugging Face folder, or --model-fn for a bare state dict")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(392, f"{path}: not valid JSON: {error}", mend="download it again") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise InputError(392, f"{path}: names no model_type", mend="give a Hugging Face folder")
    if "auto_map" in config:
        raise InputError(
            393, f"{path}: asks for code of its own (auto_map), which is never run", mend="see --model-fn"
        )
    return config


def load_transformer(checkpoint: Checkpoint, auto: Any, changes: dict[str, Any]) -> Loaded:
    """The Hugging Face model of a checkpoint under an Auto class, in float32.

    `changes` go into its config (labels, say). A base model may lack the head's tensors: they are made fresh
    and are named in `new`; anything else that is missing or of another shape raises InputError.
    """
    from transformers import AutoConfig

    read_config(checkpoint)
    assert checkpoint.root is not None  # read_config found its config.json
    try:
        config = AutoConfig.from_pretrained(
            checkpoint.root, local_files_only=True, trust_remote_code=False, **changes
        )
    except (ValueError, OSError, KeyError, TypeError) as error:
        first = str(error).strip().splitlines()[0]
        raise InputError(
            394, f"{checkpoint.name}: config.json: {first}", mend="upgrade transformers"
        ) from None
    state = {tensor.name: to_tensor(tensor).to(_training_dtype(tensor)) for tensor in checkpoint.tensors}
    try:
        with torch.device("meta"):
            family = type(auto.from_config(config))  # the class alone: an Auto class takes no state dict
        model, info = family.from_pretrained(
            None, config=config, state_dict=state, dtype=torch.float32, output_loading_info=True
        )
    except (ValueError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise InputError(395, f"{checkpoint.name}: {first}", mend="check --task and the checkpoint") from None
    prefix = f"{model.base_model_prefix}."
    missing = sorted(info["missing_keys"])
    lost = [name for name in missing if name.startswith(prefix)]
    if lost or info["mismatched_keys"]:
        names = ", ".join(lost or sorted(str(item[0]) for item in info["mismatched_keys"]))
        what = (
            f"{checkpoint.name}: {len(lost) or 'shapes of'} tensors do not fit "
            f"{type(model).__name__}: {names[:200]}"
        )
        raise InputError(396, what, mend="check --task and config.json")
    names, notes = _names(model, {tensor.name for tensor in checkpoint.tensors}, missing)
    if missing:
        notes.append(f"fresh head: {', '.join(missing)}")
    return Loaded(model, names, tuple(missing), tuple(notes))


def _training_dtype(tensor: opening.Tensor) -> torch.dtype:
    return torch.float32 if DTYPES[tensor.dtype].is_float else TORCH_DTYPES[tensor.dtype]


def _names(model: nn.Module, source: set[str], missing: list[str]) -> tuple[dict[str, str], list[str]]:
    """Module name -> name in OUT: the source's own key, or the class's own where the class adds a head."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    names: dict[str, str] = {}
    used: set[str] = set()
    for name in model.state_dict():
        bare = name.removeprefix(prefix)
        key = next((key for key in (name, bare, prefix + name) if key in source), None)
        if key is not None and key not in used:
            used.add(key)
            names[name] = name if missing else key
        elif name in missing:
            names[name] = name
    left = sorted(source - used)
    trained = [name for name in left if not name.endswith("position_ids")]
    notes = [f"carried over, not part of {type(model).__name__}: {', '.join(trained[:5])}"] if trained else []
    return names, notes


def load_module(checkpoint: Checkpoint, model_fn: str, folder: Path | None = None) -> Loaded:
    """The module that `model_fn` builds, with a bare state
    dict loaded into it in float32; every name must fit."""
    module = build(model_fn, folder)
    own = module.state_dict()
    prefix = "module." if all(tensor.name.startswith("module.") for tensor in checkpoint.tensors) else ""
    names = {tensor.name.removeprefix(prefix): tensor.name for tensor in checkpoint.tensors}
    counters = {name for name in own if name.endswith("num_batches_tracked")}  # absent before torch 0.4.1
    lost, extra = sorted(set(own) - set(names) - counters), sorted(set(names) - set(own))
    if lost or extra:
        what = f"{checkpoint.name}: {model_fn} lacks {', '.join(extra[:4]) or 'nothing'}"
        what += f"; the checkpoint lacks {', '.join(lost[:4]) or 'nothing'}"
        raise InputError(397, what, mend="check --model-fn")
    state = {tensor.name.removeprefix(prefix): to_tensor(tensor) for tensor in checkpoint.tensors}
    for name, value in state.items():
        if value.shape != own[name].shape:
            what = (
                f"{checkpoint.name}: {name!r} is {tuple(value.shape)}, the module has "
                f"{tuple(own[name].shape)}"
            )
            raise InputError(398, what, mend="check --model-fn")
    module.load_state_dict(own | state)
    notes = ("prefix 'module.' looked through; it is kept in OUT",) if prefix else ()
    return Loaded(module.float(), names, (), notes)


def build(model_fn: str, folder: Path | None = None) -> nn.Module:
    """Call MODULE:CALLABLE or FILE.py:CALLABLE, which the person at the terminal named, not a checkpoint."""
    where, _, name = model_fn.rpartition(":")
    if not where or not name:
        raise UsageError(
            240, f"--model-fn {model_fn!r}: not MODULE:CALLABLE or FILE.py:CALLABLE", mend="see --help"
        )
    try:
        if where.endswith(".py"):
            path = Path(where) if folder is None or Path(where).exists() else folder / where
            spec = importlib.util.spec_from_file_location(path.stem, path)
            if spec is None or spec.loader is None or not path.is_file():
                raise UsageError(241, f"--model-fn: {where}: no such file", mend="check the path")
            code = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(code)
        else:
            sys.path.insert(0, "")
            try:
                code = importlib.import_module(where)
            finally:
                sys.path.remove("")
        function: Callable[[], Any] = getattr(code, name)
    except (ImportError, AttributeError) as error:
        raise UsageError(241, f"--model-fn {model_fn!r}: {error}", mend="check module and name") from None
    module = function()
    if not isinstance(module, nn.Module):
        raise UsageError(
            242, f"--model-fn {model_fn!r}: gave a {type(module).__name__}", mend="return a torch module"
        )
    return module


def trained_checkpoint(source: Checkpoint, loaded: Loaded) -> Checkpoint:
    """`source` with the module's tensors in place of its own:
    same files, dtypes and (unless a head is new) keys."""
    values = {
        out: value for name, value in loaded.module.state_dict().items() if (out := loaded.names.get(name))
    }
    by_source = {_source_key(out, source): out for out in values if out not in loaded.new}
    floats = [tensor.dtype for tensor in source.tensors if DTYPES[tensor.dtype].is_float]
    tensors = [_replaced(tensor, by_source.get(tensor.name), values) for tensor in source.tensors]
    last = source.files[-1].name
    for name in loaded.new:
        dtype = max(set(floats), key=floats.count)
        tensors.append(_from_training(name, dtype, last, values[name]))
    return Checkpoint(
        source.name, source.root, source.files, tuple(tensors), source.metadata, source.revision
    )


def _source_key(out: str, source: Checkpoint) -> str:
    keys = {tensor.name for tensor in source.tensors}
    return next((key for key in (out, out.partition(".")[2]) if key in keys), out)


def _replaced(tensor: opening.Tensor, out: str | None, values: dict[str, Tensor]) -> opening.Tensor:
    return tensor if out is None else _from_training(out, tensor.dtype, tensor.file, values[out])


def _from_training(name: str, dtype: str, file: str, value: Tensor) -> opening.Tensor:
    def blocks() -> Blocks:
        if value.numel():
            yield 0, from_tensor(value, dtype).reshape(value.shape[0] if value.ndim else 1, -1)

    nbytes = value.numel() * DTYPES[dtype].bits // 8
    return opening.Tensor(name, dtype, tuple(value.shape), file, "dense", nbytes, blocks)


def quiet_transformers() -> None:
    """No bars and no load reports of transformers: what matters of them is said by lpsparse."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
