"""Say what the tensors of a transformers model are, by the modules that hold them. pruning/look.py runs it in
its own process, so that the caller imports no torch.

The model is built on the meta device, which holds no values; its class comes from transformers' own tables,
never from the config, and no remote code is run.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lpsparse.training.modules import roles_of


def build(config: dict[str, Any]) -> nn.Module | None:
    """The model of a config.json without values; None where transformers has no class for it."""
    import transformers
    from transformers import AutoConfig, AutoModel
    from transformers.models.auto import modeling_auto

    settings = {key: value for key, value in config.items() if key not in ("auto_map", "quantization_config")}
    try:
        made = AutoConfig.for_model(settings.pop("model_type"), **settings)
    except (KeyError, ValueError):
        return None
    named = [name for name in config.get("architectures") or () if isinstance(name, str)]
    known = {
        each
        for table, names in vars(modeling_auto).items()
        if table.endswith("_MAPPING_NAMES")
        for value in names.values()
        for each in ((value,) if isinstance(value, str) else value)
    }
    kind = next((getattr(transformers, name, None) for name in named if name in known), None)
    with torch.device("meta"):
        return kind(made) if kind is not None else AutoModel.from_config(made)


def answer(config: Path, into: Path) -> None:
    """Write {"class", "prefix", "roles"} for a config.json, each role with the shape of its tensor."""
    model = build(json.loads(config.read_text("utf-8")))
    found: dict[str, Any] = {"class": None, "prefix": "", "roles": {}}
    if model is not None:
        state, prefix = model.state_dict(), str(getattr(model, "base_model_prefix", ""))
        roles = {name: (role, list(state[name].shape)) for name, role in roles_of(model).items()}
        found = {"class": type(model).__name__, "prefix": prefix, "roles": roles}
    into.write_text(json.dumps(found), "utf-8")
