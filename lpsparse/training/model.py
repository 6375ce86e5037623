"""From a checkpoint to a torch module and back: names, dtypes, heads. Only lpsparse reads the weights.

transformers gets a state dict, never a file: our own checks handle shard indexes, pickles
and missing tensors.
"""

import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from lpsparse.checkpoint.dtypes import DTYPES, Bits
from lpsparse.checkpoint.loader_entry import is_ours
from lpsparse.checkpoint.open import Checkpoint
from lpsparse.checkpoint.tensors import BLOCK_BYTES, Blocks, grid_of, read_all
from lpsparse.checkpoint.tensors import Tensor as StoredTensor
from lpsparse.checkpoint.torchfile import NAMES
from lpsparse.errors import InputError, StateError
from lpsparse.families import RETIRED_LAYOUTS
from lpsparse.parallel import ranks
from lpsparse.training.model_fn import build
from lpsparse.training.names import match_names, turned_back

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
LOADED_DTYPES = {name: dtype for dtype, name in NAMES.items()}  # those that can be read, too
_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
_Shared = tuple[list[str], tuple[int, ...], torch.dtype, bool]  # names, shape, dtype, requires_grad


@dataclass(frozen=True, slots=True)
class Loaded:
    """A module, and what each of its tensors is called in the checkpoint that will be written."""

    module: nn.Module
    names: dict[str, str]  # name in the module -> name in OUT
    new: tuple[str, ...]  # names in OUT of tensors that the checkpoint lacks (a fresh head)
    notes: tuple[str, ...]
    origin: dict[str, str] = field(default_factory=dict[str, str])  # name in OUT -> name in the checkpoint
    dtypes: dict[str, str] = field(default_factory=dict[str, str])  # name in OUT -> storage dtype of a float
    # Name in OUT of a tensor that is a part of a fused one -> the fused one in the module, which is its own
    # name in `names` and `dtypes`; and the part's shape.
    fused: dict[str, tuple[str, tuple[int, ...]]] = field(
        default_factory=dict[str, tuple[str, tuple[int, ...]]]
    )

    def parts(self) -> dict[str, list[str]]:
        """Fused tensor -> the names in OUT of its parts."""
        found: dict[str, list[str]] = {}
        for out, (name, _) in self.fused.items():
            found.setdefault(name, []).append(out)
        return found

    @torch.no_grad()
    def round_to_storage(self) -> None:
        """Give every float the value that its storage dtype will hold,
        so that what is measured is what is written."""
        state = self.module.state_dict()
        for name, out in self.names.items():
            if out in self.dtypes:
                values = ranks.local_tensor(state[name])
                values.copy_(values.to(TORCH_DTYPES[self.dtypes[out]]))


def to_tensor(tensor: StoredTensor) -> Tensor:
    """The tensor as torch sees it, in its own dtype; a copy."""
    return to_tensors([tensor])[tensor.name]


def to_tensors(
    tensors: Iterable[StoredTensor], dtypes: dict[str, torch.dtype] = TORCH_DTYPES
) -> dict[str, Tensor]:
    """Each as torch sees it, in its own dtype, by name; copies, read on all threads."""
    work = list(tensors)
    for tensor in work:
        if tensor.dtype not in dtypes:
            why = "cannot be trained" if dtypes is TORCH_DTYPES else "has no dtype in torch"
            what = f"{tensor.file}: {tensor.name!r}: {tensor.dtype} {why}"
            raise InputError(390, what, hint="convert it, or read its bits by lpsparse.open")
    found: dict[str, Tensor] = {}
    for tensor, bits in zip(work, read_all(work), strict=True):
        dtype = dtypes[tensor.dtype]
        raw = torch.from_numpy(bits.view(f"<i{dtype.itemsize}" if dtype.itemsize > 1 else "u1"))
        found[tensor.name] = raw.view(dtype)
    return found


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
        raise InputError(391, what, hint="give a Hugging Face folder, or --model-fn for a bare state dict")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(392, f"{path}: not valid JSON: {error}", hint="download it again") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise InputError(392, f"{path}: names no model_type", hint="give a Hugging Face folder")
    for key, value in _entries(config):
        if key == "auto_map" or (key.endswith("_implementation") and not str(value).isidentifier()):
            what = f"{path}: asks for code of its own ({key}), which is never run"
            raise InputError(393, what, hint="give the code yourself: --model-fn FILE.py:CALLABLE")
        if key == "quantization_config" and is_ours(value):
            continue
        if key == "quantization_config":
            if checkpoint.layout in RETIRED_LAYOUTS:
                what = f"{path}: says {checkpoint.layout}, which cannot be trained as it is"
                raise InputError(393, what, hint="`lpsparse unpack` it first")
            raise InputError(
                393, f"{path}: is quantised, which cannot be trained", hint="dequantise it first"
            )
    return {key: value for key, value in config.items() if not is_ours(value)}


def _entries(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every key of a config and of the configs inside it that has a value."""
    for key, value in config.items():
        if value is not None:
            yield key, value
        if isinstance(value, dict):
            yield from _entries(value)  # pyright: ignore[reportUnknownArgumentType]


def load_transformer(checkpoint: Checkpoint, auto: Any, changes: dict[str, Any]) -> Loaded:
    """The Hugging Face model of a checkpoint under an Auto class, in float32.

    `changes` go into its config (labels, say). A base model may lack the head's tensors: they are made fresh
    and are named in `new`; anything else that is missing or of another shape raises InputError. All
    processes call it; see `_read_once` for their values.
    """
    config = _config(checkpoint, changes)

    def empty() -> nn.Module:
        with init_empty_weights(include_buffers=False):
            return auto.from_config(config, dtype=torch.float32)

    return _read_once(lambda: _load_transformer(checkpoint, auto, config), empty)


def _config(checkpoint: Checkpoint, changes: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    quiet_transformers()
    read_config(checkpoint)
    assert checkpoint.root is not None  # read_config found its config.json
    try:
        config = AutoConfig.from_pretrained(
            checkpoint.root, local_files_only=True, trust_remote_code=False, **changes
        )
    except Exception as error:  # a broken config makes transformers stumble over anything
        what = f"{checkpoint.name}: config.json: {first_line(error)}"
        raise InputError(394, what, hint="fix config.json, or upgrade transformers") from None
    vars(config).pop("quantization_config", None)  # a packed folder's: what transformers is given is dense
    return config


def has_head(checkpoint: Checkpoint, auto: Any) -> bool:
    """Return whether a checkpoint has all that the class of `auto` adds to the base model."""
    model = _outline(checkpoint, auto, _config(checkpoint, {}))
    base, wrapper = f"{model.base_model_prefix}.", _wrapper(checkpoint)
    there = {tensor.name.removeprefix(wrapper) for tensor in checkpoint.tensors}
    return all(name in there for name, _ in model.named_parameters() if not name.startswith(base))


def _outline(checkpoint: Checkpoint, auto: Any, config: Any) -> Any:
    """The model without values: an Auto class takes no state dict, and the class that it finds does."""
    try:
        with torch.device("meta"):
            return auto.from_config(config)
    except MemoryError:
        raise
    except Exception as error:
        what = f"{checkpoint.name}: {first_line(error)}"
        raise InputError(395, what, hint="check --task, config.json and the checkpoint") from None


def _wrapper(checkpoint: Checkpoint) -> str:
    """A wrapper's prefix is looked through, and stays in OUT."""
    return "module." if all(tensor.name.startswith("module.") for tensor in checkpoint.tensors) else ""


def _read_once(load: Callable[[], Loaded], empty: Callable[[], nn.Module]) -> Loaded:
    """Return what `load` gives on rank 0. The other ranks get the same without the values, until
    `ranks.distribute`: a module of `empty`, with parameters and buffers like those of rank 0."""
    mine: list[Loaded] = []

    def outline() -> tuple[Loaded, list[_Shared], list[_Shared]]:
        mine.append(load())
        module = mine[0].module
        params = _shared(module.named_parameters(remove_duplicate=False))
        buffers = _shared(module.named_buffers(remove_duplicate=False))
        return replace(mine[0], module=nn.Identity()), params, buffers

    loaded, params, buffers = ranks.run_on_rank_0(outline)
    return mine[0] if mine else replace(loaded, module=_alike(empty(), params, buffers))


def _shared(named: Iterable[tuple[str, Tensor]]) -> list[_Shared]:
    """Each tensor with all of its names; tied ones have several."""
    tensors = dict(named)
    names: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    of = [(group, tensors[group[0]]) for group in names.values()]
    return [(group, tuple(tensor.shape), tensor.dtype, tensor.requires_grad) for group, tensor in of]


def _alike(module: nn.Module, params: list[_Shared], buffers: list[_Shared]) -> nn.Module:
    """Give `module` these parameters and buffers. What a user's own code has made stays, as other parts of
    the module may hold it, too."""
    if all(param.is_meta for param in module.parameters()):
        for names, shape, dtype, trained in params:
            param = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), trained)
            for name in names:
                parent, _, own = name.rpartition(".")
                module.get_submodule(parent).register_parameter(own, param)
        for names, shape, dtype, _ in buffers:
            buffer = torch.zeros(shape, dtype=dtype)
            for name in names:
                parent, _, own = name.rpartition(".")
                setattr(module.get_submodule(parent), own, buffer)  # a buffer stays one
    found = (module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
    if [_shared(each) for each in found] != [params, buffers]:
        what = f"rank {ranks.rank()} builds another {type(module).__name__} than rank 0"
        raise StateError(712, what, hint="give every process the same code and versions")
    return module.eval()


def _load_transformer(checkpoint: Checkpoint, auto: Any, config: Any) -> Loaded:
    wrapper = _wrapper(checkpoint)
    state = {
        tensor.name.removeprefix(wrapper): to_tensor(tensor).to(_training_dtype(tensor))
        for tensor in checkpoint.tensors
    }
    keys = set(state)
    model, missing = _instantiate(checkpoint, auto, config, state)
    found = match_names(checkpoint, model, state, missing)
    # The source's own keys; the class's own where the class adds a head, so that it finds them all.
    names = {
        name: found.own.get(str(name), str(name)) if missing else wrapper + found.sources[name]
        for name in model.state_dict()
        if name in found.sources or name in missing
    }
    names |= {name: name for name in found.fused.values()}
    origin = {names[name]: wrapper + key for name, key in found.sources.items()}
    parts = {wrapper + key: (name, tuple(state[key].shape)) for key, name in found.fused.items()}
    dtypes = _dtypes(checkpoint, {**origin, **{name: key for key, (name, _) in parts.items()}}, missing)
    left = sorted(keys - {*found.sources.values(), *found.fused})
    notes = _notes(model, wrapper, missing, left)
    return Loaded(model, names, tuple(missing), notes, origin, dtypes, parts)


def _instantiate(
    checkpoint: Checkpoint, auto: Any, config: Any, state: dict[str, Tensor]
) -> tuple[Any, list[str]]:
    """The model with the values of `state`, and the names of the head's tensors that it lacks."""
    family = type(_outline(checkpoint, auto, config))
    with _reports() as reports:
        try:
            model, info = family.from_pretrained(
                None,
                config=config,
                state_dict=state,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        except MemoryError:
            raise
        except Exception as error:
            what = f"{checkpoint.name}: {'; '.join(_told(reports)) or first_line(error)}"
            raise InputError(395, what, hint="check --task, config.json and the checkpoint") from None
    missing = sorted(info["missing_keys"])
    lost = [name for name in missing if name.startswith(f"{model.base_model_prefix}.")]
    if lost or info["mismatched_keys"]:
        odd = (f"{key} is {list(had)}, expected {list(own)}" for key, had, own in info["mismatched_keys"])
        names = ", ".join(lost or sorted(odd))
        what = (
            f"{checkpoint.name}: {len(lost) or 'shapes of'} tensors do not fit "
            f"{type(model).__name__}: {names[:200]}"
        )
        raise InputError(396, what, hint="check --task and config.json")
    return model, missing


def _notes(model: nn.Module, wrapper: str, missing: list[str], left: list[str]) -> tuple[str, ...]:
    """What there is to say of a loaded model: tensors that it has not (`left`), prefix, fresh head."""
    left = [key for key in left if not key.endswith("position_ids")]
    notes = [f"carried over, not part of {type(model).__name__}: {', '.join(left[:5])}"] if left else []
    if wrapper:
        notes.append(f"prefix {wrapper!r} looked through" + ("" if missing else "; it is kept in OUT"))
    if missing:
        notes.append(f"fresh head: {', '.join(missing)}")
    return tuple(notes)


def first_line(error: Exception) -> str:
    """Kind and first line of an error of another library."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def _training_dtype(tensor: StoredTensor) -> torch.dtype:
    return torch.float32 if DTYPES[tensor.dtype].is_float else TORCH_DTYPES[tensor.dtype]


def _dtypes(checkpoint: Checkpoint, origin: dict[str, str], new: list[str]) -> dict[str, str]:
    """Storage dtype of each float in OUT: its own; of a fresh head, the one that most tensors have."""
    floats = {tensor.name: tensor.dtype for tensor in checkpoint.tensors if DTYPES[tensor.dtype].is_float}
    known = {out: floats[key] for out, key in origin.items() if key in floats}
    if not new:
        return known
    return known | dict.fromkeys(new, Counter(floats.values()).most_common(1)[0][0])


def load_module(checkpoint: Checkpoint, model_fn: str, folder: Path | None = None) -> Loaded:
    """The module that `model_fn` builds, with a bare state dict loaded into it in float32; every name must
    fit. All processes call it; see `_read_once` for their values."""
    return _read_once(
        lambda: _load_module(checkpoint, model_fn, folder), lambda: build(model_fn, folder).float()
    )


def _load_module(checkpoint: Checkpoint, model_fn: str, folder: Path | None) -> Loaded:
    module = build(model_fn, folder)
    own = module.state_dict()
    prefix = _wrapper(checkpoint)
    names = {tensor.name.removeprefix(prefix): tensor.name for tensor in checkpoint.tensors}
    counters = {name for name in own if name.endswith("num_batches_tracked")}  # absent before torch 0.4.1
    shared = _shared(module.named_parameters(remove_duplicate=False))
    tied = {name for group, *_ in shared if not names.keys().isdisjoint(group) for name in group}
    lost, extra = sorted(set(own) - set(names) - counters - tied), sorted(set(names) - set(own))
    if lost or extra:
        what = f"{checkpoint.name}: {model_fn} lacks {', '.join(extra[:4]) or 'nothing'}"
        what += f"; the checkpoint lacks {', '.join(lost[:4]) or 'nothing'}"
        raise InputError(397, what, hint="check --model-fn")
    state = {tensor.name.removeprefix(prefix): to_tensor(tensor) for tensor in checkpoint.tensors}
    for name, value in state.items():
        if value.shape != own[name].shape:
            what = (
                f"{checkpoint.name}: {name!r} is {tuple(value.shape)}, the module has "
                f"{tuple(own[name].shape)}"
            )
            raise InputError(398, what, hint="check --model-fn")
    module.load_state_dict(own | state)
    notes = ("prefix 'module.' looked through; it is kept in OUT",) if prefix else ()
    origin = {name: name for name in names.values()}
    return Loaded(module.float(), names, (), notes, origin, _dtypes(checkpoint, origin, []))


def trained_checkpoint(source: Checkpoint, loaded: Loaded) -> Checkpoint:
    """`source` with the module's tensors in place of its own:
    same files, dtypes and (unless a head is new) keys."""
    values = {
        out: value for name, value in loaded.module.state_dict().items() if (out := loaded.names.get(name))
    }
    by_source = {key: out for out, key in loaded.origin.items()}
    tensors = [_replaced(tensor, by_source.get(tensor.name), values) for tensor in source.tensors]
    for key, (name, _) in loaded.fused.items():
        place = next(i for i, tensor in enumerate(tensors) if tensor.name == key)
        tensors[place] = _part_of(loaded.module, name, tensors[place])
    last = source.files[-1].name
    tensors += [_from_training(name, loaded.dtypes[name], last, values[name]) for name in loaded.new]
    return Checkpoint(
        source.name, source.root, source.files, tuple(tensors), source.metadata, source.revision
    )


def _replaced(tensor: StoredTensor, out: str | None, values: dict[str, Tensor]) -> StoredTensor:
    return tensor if out is None else _from_training(out, tensor.dtype, tensor.file, values[out])


def _part_of(module: nn.Module, name: str, tensor: StoredTensor) -> StoredTensor:
    """`tensor` of the source with the values that it has in the fused tensor `name` of the module."""

    def blocks(first: int = 0, last: int | None = None) -> Blocks:
        whole = ranks.full_tensor(module.state_dict()[name])
        if ranks.rank() > 0:  # it only gives its part
            return
        turned = turned_back(module, {name: whole})
        key = tensor.name if tensor.name in turned else tensor.name.removeprefix("module.")
        value = turned[key]
        yield from _blocks_of(from_tensor(value, tensor.dtype).reshape(tensor.grid), first, last)

    return StoredTensor(tensor.name, tensor.dtype, tensor.shape, tensor.file, "dense", tensor.nbytes, blocks)


def _from_training(name: str, dtype: str, file: str, value: Tensor) -> StoredTensor:
    def blocks(first: int = 0, last: int | None = None) -> Blocks:
        if value.numel():
            whole = ranks.full_tensor(value)  # one tensor at a time, on all processes
            if ranks.rank() > 0:  # it only gives its part
                return
            grid = grid_of(tuple(value.shape), dtype)
            yield from _blocks_of(from_tensor(whole, dtype).reshape(grid), first, last)

    nbytes = value.numel() * DTYPES[dtype].bits // 8
    return StoredTensor(name, dtype, tuple(value.shape), file, "dense", nbytes, blocks)


def _blocks_of(lines: Bits, first: int, last: int | None) -> Blocks:
    """In parts, so that few of its bytes are under way when the next tensor comes."""
    step = max(1, BLOCK_BYTES // max(lines[:1].nbytes, 1))
    end = len(lines) if last is None else last
    yield from ((line, lines[line : min(line + step, end)]) for line in range(first, end, step))


def quiet_transformers() -> None:
    """Turn off the bars and load reports of transformers; lpsparse reports what matters of them."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


class _Listener(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


@contextmanager
def _reports() -> Generator[list[str]]:
    """Collect what transformers logs while it loads, unseen: its errors refer to it."""
    root, listener = logging.getLogger("transformers"), _Listener()
    before = root.handlers, root.propagate, root.level
    root.handlers, root.propagate = [listener], False
    root.setLevel(logging.WARNING)
    try:
        yield listener.said
    finally:
        root.handlers, root.propagate = before[:2]
        root.setLevel(before[2])


def _told(reports: list[str]) -> list[str]:
    """The lines of a load report that say what failed, without colours, rules and columns."""
    lines = [re.sub(r"\x1b\[[\d;]*m", "", line) for line in "\n".join(reports).splitlines()]
    told = [
        " ".join(line.replace("|", " ").split()) for line in lines if "CONVERSION" in line or "Error" in line
    ]
    return [line[:200] for line in told if not line.startswith("-")][:3]
