"""From what was given to a checked step: flags over LPSPARSE_* over the recipe over the defaults."""

import os
import re
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from lpsparse.errors import LpsparseError, UsageError
from lpsparse.parallel.environment import WORDS
from lpsparse.steps.base import Step, about, flag, label, other_names
from lpsparse.steps.finetune import EvalStep, FinetuneStep
from lpsparse.steps.table import COMMANDS, step_of

S = TypeVar("S", bound=BaseModel)
_SWITCHES = (
    "LPSPARSE_JSON",
    "LPSPARSE_QUIET",
    "LPSPARSE_VERBOSE",
    "LPSPARSE_FULL",
)  # of commands, of no step
_NO_FLAGS = ("LPSPARSE_MAX_TENSORS",)  # of checkpoint.header


def as_launched(step: FinetuneStep) -> FinetuneStep:
    """`step` under the plugin that `accelerate launch` was configured with. Sharding is our own FSDP2.

    Raises UsageError for a plugin whose partitions know no rows.
    """
    for name, other in (
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron"),
    ):
        if os.environ.get(name, "").lower() == "true":
            what = f"{other}: not supported: it flattens parameters, and pruning needs whole rows"
            raise UsageError(254, what, hint="configure accelerate without it, and use --shard (FSDP2)")
    if os.environ.pop("ACCELERATE_USE_FSDP", "").lower() == "true":
        return step.model_copy(update={"shard": True})
    return step


def as_trained(step: EvalStep, training: Mapping[str, Any]) -> EvalStep:
    """`step` with what it does not say itself from the settings of the fine-tune that made its model, unless
    that was for another task. Raises UsageError where neither says a task."""
    given = {name: getattr(step, name) for name in step.model_fields_set}
    fields = EvalStep.model_fields
    known = {name: training.get(name) for name, each in about(EvalStep).items() if each.inherited}
    known = {name: value for name, value in known.items() if value not in (None, fields[name].default)}
    if given.get("task") not in (None, known.get("task")):
        return step
    if not {"task"} & {*given, *known}:
        what = f"--task is needed: {step.model} does not say which task it was trained for"
        raise UsageError(203, what, hint="give --task, such as --task text-classification")
    return resolve(EvalStep, given, known, where=f"{step.model}: lpsparse.json")


def variable(field: str) -> str:
    """The environment's name of a field."""
    return "LPSPARSE_" + flag(field)[2:].replace("-", "_").upper()


def check_environment() -> None:
    """Raises UsageError for an LPSPARSE_ variable that sets nothing."""
    kinds = (step_of(name) for name, command in COMMANDS.items() if command.step)
    fields = {variable(name) for kind in kinds for name in kind.model_fields}
    known = sorted({*fields, *_SWITCHES, *_NO_FLAGS})
    for key in os.environ:
        if key.startswith("LPSPARSE_") and key not in known:
            near = get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "unset it; variables have the names of flags"
            raise UsageError(209, f"{key}: sets nothing", hint=hint)


def resolve(
    kind: type[S], given: Mapping[str, Any], recipe: Mapping[str, Any] | None = None, where: str = ""
) -> S:
    """A checked step: what was given (flags) over LPSPARSE_* over the recipe over the defaults.

    Raises UsageError naming the flag or key, the value and what is allowed.
    """
    names = {name: info.alias or name for name, info in kind.model_fields.items()}
    environment: dict[str, Any] = {
        name: os.environ[variable(name)]
        for name in names
        if (issubclass(kind, Step) or name in ("model", "data"))  # a recipe's own other keys have no flags
        and variable(name) in os.environ
        and kind.model_fields[name].annotation is not Path
    }
    layers = (_canonical(kind, recipe or {}), environment, _canonical(kind, given))
    merged = _merged(layers, kind)
    try:
        return kind.model_validate(merged, by_name=True, by_alias=True)
    except ValidationError as error:
        raise _explain(error, kind, where) from None


def _merged(layers: Sequence[Mapping[str, Any]], kind: type[BaseModel]) -> dict[str, Any]:
    """Each layer over those before it. Of settings that exclude one another, one that is given takes away
    what the layers before it say of the others."""
    rivals: Collection[str] = getattr(kind, "rivals", ())
    merged: dict[str, Any] = {}
    for layer in layers:
        if any(_is_chosen(kind, name, layer.get(name)) for name in rivals):
            merged = {name: value for name, value in merged.items() if name not in rivals}
        merged |= layer
    return merged


def _is_chosen(kind: type[BaseModel], name: str, value: Any) -> bool:
    if kind.model_fields[name].annotation is bool:
        return WORDS.get(str(value or "").lower(), True)
    return value is not None


def _canonical(kind: type[BaseModel], values: Mapping[str, Any]) -> dict[str, Any]:
    """Keys as field names: YAML may say lambda or target-sparsity. A Path may stand for its text."""
    aliases = {info.alias: name for name, info in kind.model_fields.items() if info.alias}
    aliases |= other_names(kind)
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        name = aliases.get(name, name)
        if name in found:
            what = f"{key}: it is another name of {name}, which stands there too"
            raise UsageError(202, what, hint=f"give {name} alone")
        found[name] = str(value) if isinstance(value, Path) else value
    return found


def _explain(error: ValidationError, kind: type[BaseModel], where: str) -> LpsparseError:
    first = error.errors()[0]
    keys = [info.alias or name for name, info in kind.model_fields.items()]
    key = (
        ".".join(str(part) for part in first["loc"] if part not in ("constrained-float", "literal['auto']"))
        or "options"
    )
    prefix = f"{where}: " if where else ""
    if first["type"] == "extra_forbidden":
        near = get_close_matches(key, keys, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(sorted(keys))}"
        return UsageError(202, f"{prefix}unknown key {key!r}", hint=hint)
    shown = key if where else flag(key)
    if first["type"] == "missing":
        names = [str(each["loc"][0]) for each in error.errors() if each["type"] == "missing"]
        listed = " and ".join(name if where else label(kind, name) for name in names)
        return UsageError(203, f"{prefix}{listed} must be given", hint=_see(kind))
    if first["type"] == "value_error":
        what = str(first["ctx"]["error"]) if "ctx" in first else first["msg"]
        return UsageError(204, f"{prefix}{what}", hint=_see(kind))
    allowed = first["msg"].replace("Input should be", "must be")
    if key == "lambda" or key == "lambda_p":
        allowed = "must be auto or a number from 0"
    choices = re.findall(r"'([^']+)'", str(first.get("ctx", {}).get("expected", "")))
    near = get_close_matches(str(first["input"]).lower(), choices, n=1)
    hint = f"did you mean {near[0]}?" if near else _see(kind)
    hint = "fractions are 0..1, such as 0.8" if "sparsity" in key else hint
    return UsageError(201, f"{prefix}{shown} {first['input']!r}: {allowed}", hint=hint)


def _see(kind: type[BaseModel]) -> str:
    """Where its settings are told."""
    return f"see `lpsparse {getattr(kind, 'command', 'run')} --help`"
