"""A step: the settings of one command, with their defaults, which are written nowhere else.

Light on purpose: `--help` imports it.
"""

from collections.abc import Collection
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Any, ClassVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    WithJsonSchema,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from lpsparse.families import Family


def listed(value: Any) -> Any:
    """A single value, or text with commas, where several may stand."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return [value] if isinstance(value, (int, float)) else value


def fraction(value: Any) -> Any:
    """80% is 0.8, where a fraction is wanted."""
    text = str(value).strip()
    if not text.endswith("%"):
        return value
    try:
        found = Decimal(text[:-1].strip()) / 100
    except ArithmeticError:  # no number, or one of a million digits
        return value
    return found if found.is_finite() else value


@dataclass(frozen=True)
class OneOf:
    """Annotation of a field that names a member of a family `but` some, or one of `others`."""

    family: Family
    others: tuple[str, ...] = ()
    but: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        return [*self.others, *(name for name in self.family if name not in self.but)]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {**handler(schema), "enum": self.names}

    def _check(self, value: str) -> str:
        if value not in self.names:
            expected = " or ".join(f"'{name}'" for name in self.names)
            raise PydanticCustomError("literal_error", "Input should be {expected}", {"expected": expected})
        return value


Patterns = Annotated[tuple[str, ...], BeforeValidator(listed)]

Fraction = Annotated[
    Decimal,
    BeforeValidator(fraction),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "minimum": 0, "maximum": 1},
                {"type": "string", "pattern": r"^\s*(0*(\.\d*)?|0*1(\.0*)?|\d+(\.\d*)? *%)\s*$"},
            ]
        }
    ),
]

INCLUDE = Field(
    (),
    description="Glob over tensor names that may be cut; repeatable. Default: linear and convolution "
    "weights, except output heads and routers.",
)

EXCLUDE = Field((), description="Glob over tensor names that are kept; repeatable, wins over --include.")

MODEL = Field(min_length=1, description="Folder, weight file, *.index.json, or hub id org/name[@revision].")

WEIGHTS = Field(
    None,
    description="Weight file or index in MODEL that is meant, a name alone. Default: the one that is there.",
)

KEY = Field(
    None,
    description="Table of tensors to read from a torch file, such as params_ema or ema.model. Default: the "
    "only one.",
)

OUT = Field(description="Folder to write; must not exist yet.")

OVERWRITE = Field(False, description="Replace an OUT that lpsparse wrote.")

THREADS = Field(None, ge=1, description="Threads; the result is the same. Default: one a core.")

ALLOW_EMPTY = Field(
    False, description="Exit 0 also where a tensor or a layer type is left without weights. Default: exit 1."
)

DRY_RUN = Field(False, description="Say what would be done and write nothing.")

POSITIONAL = ("model", "out", "base", "source", "folder", "repo")

REPEATED = (  # flags that may be given more than once
    "component",
    "include",
    "exclude",
    "freeze",
    "min_sparsity",
    "max_bytes",
    "max_quality_drop",
    "max_layer_sparsity",
    "min_nm",
    "warn",
)

_UNRECORDED = {
    "model",
    "weights",
    "out",
    "overwrite",
    "dry_run",
    "threads",
    "source",
    "base",
    "data",
    "eval_data",
    "model_fn",
    "processes",
    "shard",
    "workers",
    "resume",
    "save_every",
    "keep_last",
    "max_time",
    "track",
    "rank_timeout",
    "look",
    "allow_empty",
    "component",
}

OTHER_NAMES = {  # what people call a setting -> the field, where a step has no such field of its own
    "learning_rate": "lr",
    "sparsity": "target_sparsity",
}


def other_names(fields: Collection[str]) -> dict[str, str]:
    """Of OTHER_NAMES those that a step with these fields takes."""
    return {name: of for name, of in OTHER_NAMES.items() if of in fields and name not in fields}


def flag(field: str) -> str:
    """The command line's name of a field."""
    return "--lambda" if field == "lambda_p" else "--" + field.replace("_", "-")


class Step(BaseModel):
    """One command's settings."""

    # Validators are built when they are first needed, which --help does not.
    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=(), defer_build=True
    )
    decides: ClassVar[frozenset[str]] = frozenset()  # what is recorded here, other than elsewhere

    def recorded(self) -> dict[str, Any]:
        """The settings that decide the bytes of the result: no paths of this machine."""
        return self.model_dump(mode="json", exclude=_UNRECORDED - type(self).decides)

    def at_default(self, name: str) -> bool:
        return getattr(self, name) == type(self).model_fields[name].default

    def options(self, among: Collection[str] | None = None) -> list[str]:
        """The options (`among` these fields) that are not at their defaults, as a person would type them."""
        words: list[str] = []
        for name in type(self).model_fields:
            if name in POSITIONAL or self.at_default(name) or (among is not None and name not in among):
                continue
            value = getattr(self, name)
            if isinstance(value, bool):
                words.append(flag(name) if value else f"--no-{flag(name)[2:]}")
            elif name in REPEATED:
                for pattern in value:
                    words += [flag(name), pattern]
            else:
                text = ",".join(f"{part:g}" for part in value) if isinstance(value, tuple) else str(value)
                words += [flag(name), text]
        return words
