"""The options of a report's budgets, made from the family."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, WithJsonSchema, create_model

from lpsparse.families import BUDGETS
from lpsparse.steps.base import Setting, Step

S = TypeVar("S", bound=Step)


def _texts(value: Any) -> Any:
    return [str(each) for each in value] if isinstance(value, (list, tuple)) else [str(value)]


Limits = Annotated[
    tuple[str, ...],
    BeforeValidator(_texts),
    WithJsonSchema({"type": "array", "items": {"type": ["number", "string"]}}),
]


def with_budgets(kind: type[S], budgets: Mapping[str, Any] = BUDGETS) -> type[S]:
    """`kind` with a field for the limits of each budget, which may be given more than once."""
    fields: dict[str, Any] = {
        each.field: (
            Annotated[Limits, AfterValidator(_readable(each.limit))],
            Setting((), help=each.help, panel="Budgets", metavar="LIMIT", headline=True),
        )
        for each in budgets.values()
    }
    return create_model(kind.__name__, __base__=kind, __module__=kind.__module__, **fields)


def _readable(read: Callable[[str], Any]) -> Callable[[tuple[str, ...]], tuple[str, ...]]:
    def check(value: tuple[str, ...]) -> tuple[str, ...]:
        for each in value:
            read(each)
        return value

    return check
