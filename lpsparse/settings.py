"""From what was given to a checked step: flags over LPSPARSE_* over the recipe over the defaults; and what a
launcher's environment says of this process."""

import os
import re
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from lpsparse.errors import LpsparseError, UsageError
from lpsparse.recipe import STEPS, FinetuneStep, InspectStep, PushStep, Step, flag

S = TypeVar("S", bound=BaseModel)
_COMMANDS: dict[str, type[Step]] = {**STEPS, "inspect": InspectStep, "push": PushStep}
_SWITCHES = ("LPSPARSE_JSON", "LPSPARSE_QUIET")  # of every command, of no step
_NO_FLAGS = ("LPSPARSE_MAX_TENSORS",)  # of checkpoint.header
_WORDS = {
    **dict.fromkeys(("1", "true", "yes", "on"), True), **dict.fromkeys(("", "0", "false", "no", "off"), False)
}  # fmt: skip


# Rank, number of processes and rank on this machine, as MPICH's and Intel's, and Open MPI's mpirun tell.
_MPI = (
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
)


def name_as_launched() -> None:
    """Give a process of an srun step, or of mpirun (which `accelerate launch --cpu` calls), the names that
    torch's own launchers give. A batch script, where SLURM tells of tasks too, is no step of several."""
    given = os.environ.get
    if "RANK" in os.environ:
        return
    for rank, count, local in _MPI:
        if rank in os.environ and int(given(count, 1)) > 1:
            os.environ |= {"RANK": given(rank, ""), "WORLD_SIZE": given(count, "")}
            os.environ["LOCAL_RANK"] = given(local, "0")
            os.environ.setdefault("MASTER_ADDR", "localhost")
            os.environ.setdefault("MASTER_PORT", "29500")
            return
    if "SLURM_PROCID" not in os.environ or int(given("SLURM_STEP_NUM_TASKS", 1)) < 2:
        return
    first = re.sub(r"\[([^],-]+)[^]]*\]", r"\1", given("SLURM_STEP_NODELIST", "localhost")).partition(",")[0]
    port = 15000 + int(given("SLURM_JOB_ID", 0)) % 10000 + int(given("SLURM_STEP_ID", 0)) % 1000
    os.environ |= {"RANK": given("SLURM_PROCID", ""), "WORLD_SIZE": given("SLURM_STEP_NUM_TASKS", "")}
    os.environ["LOCAL_RANK"] = given("SLURM_LOCALID", "0")
    os.environ.setdefault("MASTER_ADDR", first)
    os.environ.setdefault("MASTER_PORT", str(port))


def is_launched() -> bool:
    """Whether a launcher (torchrun, accelerate, our own) started this process, be it alone."""
    return "RANK" in os.environ


def is_first() -> bool:
    """Whether this is process 0 of a job, or alone: the others are silent."""
    return os.environ.get("RANK", "0") == "0"


def is_one_of_several() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def local_rank() -> int:
    """Number of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def as_launched(step: FinetuneStep) -> FinetuneStep:
    """`step` under the plugin that `accelerate launch` was configured with. Sharding is our own FSDP2.

    Raises UsageError for a plugin whose partitions know no rows.
    """
    for name, other in (
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron"),
    ):
        if os.environ.get(name, "").lower() == "true":
            what = f"{other}: its flat partitions know no rows and no masks"
            raise UsageError(254, what, mend="configure accelerate without it, and give --shard (FSDP2)")
    if os.environ.pop("ACCELERATE_USE_FSDP", "").lower() == "true":
        return step.model_copy(update={"shard": True})
    return step


def variable(field: str) -> str:
    """The environment's name of a field."""
    return "LPSPARSE_" + flag(field)[2:].replace("-", "_").upper()


def check_environment() -> None:
    """Raises UsageError for an LPSPARSE_ variable that sets nothing."""
    fields = {variable(name) for kind in _COMMANDS.values() for name in kind.model_fields}
    known = sorted({*fields, *_SWITCHES, *_NO_FLAGS})
    for key in os.environ:
        if key.startswith("LPSPARSE_") and key not in known:
            near = get_close_matches(key, known, n=1)
            mend = f"did you mean {near[0]}?" if near else "unset it; settings are named as the flags are"
            raise UsageError(209, f"{key}: sets nothing", mend=mend)


def switched_on(name: str) -> bool:
    """Whether a variable of yes or no says yes. Raises UsageError for another word."""
    value = os.environ.get(name, "")
    if value.lower() not in _WORDS:
        raise UsageError(201, f"{name} {value!r}: must be 1 or 0", mend=f"{name}=1, or unset it")
    return _WORDS[value.lower()]


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
        return _WORDS.get(str(value or "").lower(), True)
    return value is not None


def _canonical(kind: type[BaseModel], values: Mapping[str, Any]) -> dict[str, Any]:
    """Keys as field names: YAML may say lambda or target-sparsity. A Path may stand for its text."""
    aliases = {info.alias: name for name, info in kind.model_fields.items() if info.alias}
    return {
        aliases.get(key, str(key).replace("-", "_")): str(value) if isinstance(value, Path) else value
        for key, value in values.items()
    }


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
        mend = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(sorted(keys))}"
        return UsageError(202, f"{prefix}unknown key {key!r}", mend=mend)
    shown = key if where else flag(key)
    if first["type"] == "missing":
        return UsageError(203, f"{prefix}{shown} is needed", mend=f"give {shown}")
    if first["type"] == "value_error":
        what = str(first["ctx"]["error"]) if "ctx" in first else first["msg"]
        return UsageError(204, f"{prefix}{what}", mend=_see(kind))
    allowed = first["msg"].replace("Input should be", "must be")
    if key == "lambda" or key == "lambda_p":
        allowed = "must be auto or a number from 0"
    choices = re.findall(r"'([^']+)'", str(first.get("ctx", {}).get("expected", "")))
    near = get_close_matches(str(first["input"]).lower(), choices, n=1)
    mend = f"did you mean {near[0]}?" if near else _see(kind)
    mend = "fractions are 0..1, such as 0.8" if "sparsity" in key else mend
    return UsageError(201, f"{prefix}{shown} {first['input']!r}: {allowed}", mend=mend)


def _see(kind: type[BaseModel]) -> str:
    """Where its settings are told."""
    command = next((name for name, step in _COMMANDS.items() if step is kind), "run")
    return f"see `lpsparse {command} --help`"
