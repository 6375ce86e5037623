"""In transformers: `from_pretrained` opens a folder that lpsparse has packed, and gives an ordinary model.

`PreTrainedModel.from_pretrained` is wrapped. A packed folder is passed to transformers as the dense config
and a `state_dict` whose tensors are decoded when they are read, so renames, merges, ties, casts, devices and
the loading info work as for the dense model. All other folders and arguments reach transformers untouched.

transformers does not document that it reads the values of `state_dict` lazily, by `[...]` as safetensors'
slices. If a version needs more of them, all tensors are unpacked into memory first, with a warning.
"""

import json
import tempfile
import warnings
from collections.abc import Callable
from copy import deepcopy
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig

from lpsparse.checkpoint.loader_entry import KEY, LoaderEntry, digest_of, is_ours, parse_entry
from lpsparse.checkpoint.open import open_checkpoint
from lpsparse.checkpoint.tensors import Tensor
from lpsparse.checkpoint.torchfile import NAMES
from lpsparse.errors import InputError, UsageError

_COPY = "copy the folder again, or pack the model again"
_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
_WEIGHTS = ("config.json", "lpsparse*.safetensors", "lpsparse.safetensors.index.json")
_DTYPES = {name: dtype for dtype, name in NAMES.items()}
_ADAPTER = "adapter_config.json"


class InMemoryWarning(RuntimeWarning):
    """A packed model was unpacked into memory before transformers got it."""


def register(base: Any) -> None:
    """Wrap `from_pretrained` of `base`, transformers' PreTrainedModel, once."""
    original = base.__dict__["from_pretrained"].__func__
    if getattr(original, "__module__", None) == __name__:
        return

    @wraps(original)
    def from_pretrained(cls: Any, path: Any = None, *args: Any, config: Any = None, **given: Any) -> Any:
        if "pretrained_model_name_or_path" in given:  # it may be named
            path = given.pop("pretrained_model_name_or_path")
        load = partial(original, cls)
        found = None if path is None else _packed(str(path), config, given)
        if found is None:
            return load(path, *args, config=config, **given)
        return _load(found, load, str(path), args, config, given)

    from_pretrained.__module__ = __name__
    base.from_pretrained = classmethod(from_pretrained)


def _packed(path: str, config: Any, given: dict[str, Any]) -> LoaderEntry | None:
    """The entry of a packed folder; None where this is no such folder, or not told by its config."""
    if given.get("state_dict") is not None or given.get("gguf_file") is not None:
        return None
    settings = getattr(config, KEY, None)
    if not is_ours(settings) and (not isinstance(config, PreTrainedConfig) or Path(path).is_dir()):
        settings = _config_of(path, given).get(KEY)
    return parse_entry(settings) if settings and is_ours(settings) else None


def _config_of(path: str, given: dict[str, Any]) -> dict[str, Any]:
    """The content of config.json; empty where transformers cannot get it, which it then says itself."""
    try:
        return PreTrainedConfig.get_config_dict(path, **_hub(given))[0]
    except Exception:
        return {}


def _hub(given: dict[str, Any]) -> dict[str, Any]:
    return {name: given[name] for name in _HUB if given.get(name) is not None}


def _load(
    entry: LoaderEntry, load: Callable[..., Any], path: str, args: Any, config: Any, given: dict[str, Any]
) -> Any:
    """What `load` gives for the dense folder, read from the packed one. Raises InputError where the stored
    bytes are not those that were packed, or the model did not get them."""
    folder = _folder(path, given)
    if (folder / _ADAPTER).is_file() or "_adapter_model_path" in (given.get("adapter_kwargs") or {}):
        what = f"{path}: an adapter on a packed model is loaded in a second step"
        raise UsageError(260, what, hint="load the packed folder alone, then model.load_adapter(ADAPTER)")
    reading = Reading(folder, entry)
    rest = {name: value for name, value in given.items() if name not in _HUB}
    with tempfile.TemporaryDirectory() as temporary:
        dense = _dense_config(path, config, given, entry, Path(temporary))
        found = reading.into(lambda tensors: load(None, *args, config=dense, state_dict=tensors, **rest))
    model = found[0] if isinstance(found, tuple) else found
    reading.check(model)
    model.config.name_or_path = model.name_or_path = path
    if model.can_generate() and given.get("generation_config") is None:
        model.generation_config = _generation_config(path, given)
    return found


def _folder(path: str, given: dict[str, Any]) -> Path:
    """The folder of the weights; of a hub id that of its snapshot, with them."""
    inside = given.get("subfolder") or ""
    if Path(path).is_dir():
        return Path(path, inside)
    from huggingface_hub import snapshot_download

    how = {name: value for name, value in _hub(given).items() if name not in ("subfolder", "proxies")}
    wanted = [f"{inside}/{name}" if inside else name for name in _WEIGHTS]
    return Path(snapshot_download(path, allow_patterns=wanted, **how), inside)


def _dense_config(path: str, config: Any, given: dict[str, Any], entry: LoaderEntry, into: Path) -> Any:
    """What goes to transformers as `config`: the given one, or a folder with that of `path`, each as the
    dense model has it. To a folder's config transformers applies the other arguments itself."""
    dtype = None if entry.dtype is None else _DTYPES[entry.dtype]
    if isinstance(config, PreTrainedConfig):
        config = deepcopy(config)
        if hasattr(config, KEY):
            delattr(config, KEY)
        if getattr(config, "dtype", None) is None and dtype:
            config.dtype = dtype  # what transformers finds in the dense model's weights
        return config
    table = dict(_config_of(str(config or path), given))
    table.pop(KEY, None)
    if dtype and not {"dtype", "torch_dtype"} & table.keys():
        table["dtype"] = str(dtype).removeprefix("torch.")
    (into / "config.json").write_text(json.dumps(table), encoding="utf-8")
    return str(into)


def _generation_config(path: str, given: dict[str, Any]) -> Any:
    """That of the folder; without a file of its own what config.json says, as transformers does it."""
    try:
        return GenerationConfig.from_pretrained(path, **_hub(given))
    except OSError:
        table = _config_of(path, given)
        return GenerationConfig.from_model_config({key: table[key] for key in table.keys() - {KEY}})


class Reading:
    """One load of a packed folder: what it stores is checked first, then each tensor that the model gets is
    noted."""

    def __init__(self, folder: Path, entry: LoaderEntry) -> None:
        name = "lpsparse.safetensors" + (".index.json" if entry.sharded else "")
        checkpoint = open_checkpoint(folder, name)
        if len(checkpoint.tensors) != entry.tensors:
            found = f"{len(checkpoint.tensors)} tensors are in the weight files"
            raise InputError(364, f"{folder}: {found}, config.json says {entry.tensors}", hint=_COPY)
        digest = digest_of(checkpoint)
        if digest != entry.digest:
            what = f"{folder}: the stored tensors have the digest {digest}, config.json has {entry.digest}"
            raise InputError(365, what, hint=_COPY)
        self.tensors = checkpoint.tensors
        self.given: set[str] = set()  # tensors that were read
        self.asked: set[str] = set()  # what a value was asked for that it has not

    def into(self, load: Callable[[dict[str, Any]], Any]) -> Any:
        """What `load` makes of the tensors, read lazily if it can."""
        try:
            return load({tensor.name: LazyTensor(tensor, self) for tensor in self.tensors})
        except (AttributeError, TypeError) as error:
            if not self.asked and "LazyTensor" not in str(error):
                raise
        warnings.warn(
            "this transformers does not read packed tensors one at a time (it wants "
            f"{', '.join(sorted(self.asked)) or 'tensors'}): the model is unpacked into memory first",
            InMemoryWarning,
            stacklevel=4,
        )
        return load({tensor.name: self.read(tensor) for tensor in self.tensors})

    def read(self, tensor: Tensor) -> torch.Tensor:
        if tensor.dtype not in _DTYPES:
            what = f"{tensor.file}: {tensor.name!r}: torch has no dtype for {tensor.dtype}"
            raise InputError(368, what, hint="read it with lpsparse.open")
        found = torch.from_numpy(tensor.read().reshape(-1).view("u1")).view(_DTYPES[tensor.dtype])
        self.given.add(tensor.name)
        return found.reshape(tensor.shape)

    def check(self, model: Any) -> None:
        """Raises InputError unless the model got every stored tensor that it has under the same name."""
        stored = {tensor.name for tensor in self.tensors}
        lost = sorted((stored & model.state_dict().keys()) - self.given) if self.given else sorted(stored)
        if lost:
            what = f"the model did not get {len(lost)} of {len(stored)} tensors, such as {lost[0]!r}"
            raise InputError(366, what, hint="use the model class that config.json names")


class LazyTensor:
    """A stored tensor as safetensors' slices are: read by `[...]`."""

    def __init__(self, tensor: Tensor, reading: Reading) -> None:
        self._tensor, self._reading = tensor, reading

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._reading.read(self._tensor)[index]

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def get_dtype(self) -> str:
        return self._tensor.dtype

    def __getattr__(self, name: str) -> Any:
        self._reading.asked.add(name)
        raise AttributeError(f"LazyTensor has no attribute {name!r}")
