"""A step: what one command can be asked, with all that there is to know about each setting.

Defaults, help, panels and what a setting needs are written here and nowhere else. No heavy imports.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    WithJsonSchema,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from lpsparse.families import Family


@dataclass(frozen=True, slots=True)
class About:
    """What a setting's type, default and help do not say. pydantic calls it with the JSON schema of it."""

    panel: str = "Method"  # of --help; Arguments: given by its place
    needs: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    advanced: bool = False  # shown by --help-all only
    metavar: str = ""
    aliases: tuple[str, ...] = ()  # other names that the command line, recipes and Python accept
    recorded: bool = True  # decides the bytes of OUT, so the manifest has it
    local: bool = False  # says how this machine runs the step, so a resolved recipe leaves it out
    headline: bool = False  # shown where a step is named on one line
    is_path: bool = False  # of this machine
    is_made: bool = False  # may name what an earlier step of a recipe makes
    is_swept: bool = False  # the sparsity that a sweep varies
    inherited: bool = False  # of the fine-tune that made MODEL, where an eval does not give it
    of_loop: bool = False  # what a training loop of one's own decides itself
    noted: bool = False  # named in a training's summary where it is not at its default
    has_default: bool = True  # False: it may be left out, and what stands in for it is no value

    def __call__(self, schema: dict[str, Any]) -> None:
        if not self.has_default:
            del schema["default"]


_OF_ABOUT = frozenset(About.__dataclass_fields__)


def Setting(default: Any = ..., *, help: str, **more: Any) -> Any:
    """A field of a step: `more` are fields of `About`, and pydantic's own rules such as ge, lt or alias.

    `needs` maps another setting to the values one of which it must have for this one to mean anything; where
    there are none, it must be given. `local` settings are not recorded.
    """
    about = {name: more.pop(name) for name in _OF_ABOUT & more.keys()}
    about.setdefault("recorded", not about.get("local", False))
    return Field(default, description=help, json_schema_extra=About(**about), **more)


def about(kind: type[BaseModel]) -> dict[str, About]:
    """What there is to know about each field, by its name."""
    return {name: about_of(info) for name, info in kind.model_fields.items()}


def about_of(info: FieldInfo) -> About:
    extra = info.json_schema_extra
    return extra if isinstance(extra, About) else About()


def is_repeated(info: FieldInfo) -> bool:
    """Whether its option may be given more than once."""
    return get_args(info.annotation) == (str, ...)


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

INCLUDE = Setting(
    (),
    help="Glob of tensor names that count as prunable; repeatable. Default: linear and convolution weights, "
    "except output heads and routers.",
    panel="Selection",
)

EXCLUDE = Setting(
    (),
    help="Glob of tensor names that do not count as prunable; repeatable. Wins over --include.",
    panel="Selection",
)

MODEL = Setting(
    min_length=1,
    help="Folder, weight file, *.index.json, or hub id org/name[@revision].",
    panel="Arguments",
    recorded=False,
    is_made=True,
)

WEIGHTS = Setting(
    None,
    help="Name of the weight file or index inside MODEL; needed only if there are several.",
    panel="Input",
    recorded=False,
    advanced=True,
)

KEY = Setting(
    None,
    help="Table of tensors inside a torch file, such as params_ema or ema.model; needed only if there "
    "are several.",
    panel="Input",
    advanced=True,
)

OUT = Setting(help="Folder to write; it must not exist.", panel="Arguments", recorded=False)

OVERWRITE = Setting(False, help="Replace OUT if lpsparse wrote it.", panel="Output", local=True)

THREADS = Setting(
    None,
    ge=1,
    help="Worker threads (default: one per core). Does not affect the output.",
    panel="Hardware",
    local=True,
    advanced=True,
)

ALLOW_EMPTY = Setting(
    False,
    help="Exit 0 even if a tensor or a layer type is left without weights (default: exit 1).",
    panel="Output",
    recorded=False,
    advanced=True,
)

DRY_RUN = Setting(False, help="Show what would be done; write nothing.", panel="Output", local=True)


def other_names(kind: type[BaseModel]) -> dict[str, str]:
    """Each alias that a step's settings have -> the setting's name."""
    return {
        alias: name
        for name, known in about(kind).items()
        for alias in known.aliases
        if alias not in kind.model_fields
    }


def flag(field: str) -> str:
    """The command line's name of a field."""
    return "--lambda" if field == "lambda_p" else "--" + field.replace("_", "-")


class Step(BaseModel):
    """One command's settings."""

    # Validators are built when they are first needed, which --help does not.
    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=(), defer_build=True
    )
    command: ClassVar[str]  # that does it
    trains: ClassVar[bool] = False
    measures: ClassVar[bool] = (
        False  # quality, for the task and with the settings that MODEL was trained with
    )
    restores: ClassVar[bool] = False  # writes the same values in another layout
    same_selection: ClassVar[bool] = False  # of tensors as the step before it
    fixed: ClassVar[Mapping[str, Any]] = {}  # fields that have one value only
    rivals: ClassVar[tuple[str, ...]] = ()  # fields of which one alone may be given

    @property
    def destination(self) -> Path | None:
        """The folder that it writes a checkpoint to, if it writes one."""
        return getattr(self, "out", None)

    @model_validator(mode="after")
    def _has_use(self) -> Self:
        """Refuse a setting, not at its default, that means nothing beside the others."""
        for name, known in about(type(self)).items():
            for of, values in known.needs.items() if not self.at_default(name) else ():
                if values and getattr(self, of) not in values:
                    wanted = f"{flag(name)} is for {flag(of)} {' or '.join(values)}"
                    raise ValueError(f"{wanted}, not {getattr(self, of)}")
                if not values and self.at_default(of):
                    raise ValueError(f"{flag(name)} needs {label(type(self), of)}")
        return self

    def as_command(self) -> "Step":
        """The step that a person would type for it."""
        return self

    def recorded(self) -> dict[str, Any]:
        """The settings that decide the bytes of the result: no paths of this machine."""
        hidden = {name for name, known in about(type(self)).items() if not known.recorded}
        return self.model_dump(mode="json", exclude=hidden)

    def at_default(self, name: str) -> bool:
        return getattr(self, name) == type(self).model_fields[name].default

    def arguments(self) -> list[str]:
        """What is given by its place, as a person would type it."""
        places = (name for name, known in about(type(self)).items() if known.panel == "Arguments")
        return [str(value) for name in places if (value := getattr(self, name)) is not None]

    def options(self, among: Collection[str] | None = None) -> list[str]:
        """The options (`among` these fields) that are not at their defaults, as a person would type them."""
        words: list[str] = []
        for name, info in type(self).model_fields.items():
            value = getattr(self, name)
            if about_of(info).panel == "Arguments" or self.at_default(name):
                continue
            if among is not None and name not in among:
                continue
            if isinstance(value, bool):
                words.append(flag(name) if value else f"--no-{flag(name)[2:]}")
            elif is_repeated(info):
                for pattern in value:
                    words += [flag(name), pattern]
            else:
                text = ",".join(f"{part:g}" for part in value) if isinstance(value, tuple) else str(value)
                words += [flag(name), text]
        return words


def label(kind: type[BaseModel], name: str) -> str:
    """The command line's name of a field: MODEL, or --data."""
    known = about(kind).get(name)
    return name.upper() if known is not None and known.panel == "Arguments" else flag(name)
