"""Hooks around the step of a user's optimizer, with a closure or without, which no copy silently loses."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lpsparse.errors import UsageError

Closure = Callable[[], Any]
Given = tuple[tuple[Any, ...], dict[str, Any]]
_NAME = "_lpsparse"  # in the optimizer: what is attached to it
_COPIED = "__getstate__"  # what copy and pickle ask an object for


class Attached:
    """Hooks of `name` on an optimizer, until `remove`. As long as there are some, the optimizer refuses to be
    copied or pickled: torch leaves hooks out of a copy, which would go on without them. `uncover` puts the
    weights that a step is to move in their places, where the forward pass saw others."""

    def __init__(
        self, optimizer: Optimizer, name: str, handles: list[Any], uncover: Callable[[], None] | None = None
    ) -> None:
        self.optimizer, self.name, self.handles, self.uncover = optimizer, name, handles, uncover
        vars(optimizer).setdefault(_NAME, []).append(self)
        vars(optimizer)[_COPIED] = partial(_refuse_copy, type(optimizer).__name__, name)

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        others: list[Attached] = vars(self.optimizer).get(_NAME, [])
        if self in others:
            others.remove(self)
        if not others:
            vars(self.optimizer).pop(_COPIED, None)


def uncover(optimizer: Optimizer) -> None:
    """Have the weights that the step is to move in their places, whatever was attached first."""
    for each in vars(optimizer).get(_NAME, []):
        if each.uncover is not None:
            each.uncover()


def _refuse_copy(kind: str, name: str) -> Any:
    what = f"a copy of this {kind} would lack {name}, which is attached to it"
    raise UsageError(236, what, hint="copy its state_dict(), load it into a new one, and attach again")


def with_hooks(optimizer: Optimizer) -> Optimizer:
    """`optimizer`, or the one inside a wrapper without step hooks (accelerate's). Raises UsageError where
    there is none."""
    inner: Any = optimizer
    while inner is not None:
        try:
            inner.register_step_pre_hook(lambda *_: None).remove()
        except AttributeError:
            inner = getattr(inner, "optimizer", None)
        else:
            return inner
    what = f"{type(optimizer).__name__} wraps an optimizer and has no step hooks of torch's"
    raise UsageError(237, what, hint="give the optimizer inside it")


def around_step(
    optimizer: Optimizer,
    name: str,
    before: Callable[[], None],
    after: Callable[[], None] | None = None,
    *,
    uncover: Callable[[], None] | None = None,
) -> Attached:
    """Call `before` when the gradients of a step are there, after the closure if it is given one, and `after`
    when the weights have moved. A step that evaluates its closure twice raises UsageError."""

    def once(closure: Closure) -> Closure:
        calls: list[None] = []

        def called() -> Any:
            calls.append(None)
            if len(calls) > 1:
                what = f"{type(optimizer).__name__} evaluates its closure again within a step, which {name}"
                raise UsageError(238, f"{what} cannot follow", hint="use an optimizer that does so once")
            value = closure()
            before()
            return value

        return called

    def first(_: Optimizer, args: Any, kwargs: Any) -> Given | None:
        given = with_closure(args, kwargs, once)
        if given is None:
            before()
        return given

    handles: list[Any] = [optimizer.register_step_pre_hook(first)]
    if after is not None:
        handles.append(optimizer.register_step_post_hook(lambda *_: after()))
    return Attached(optimizer, name, handles, uncover)


def with_closure(
    args: tuple[Any, ...], kwargs: dict[str, Any], wrap: Callable[[Closure], Closure]
) -> Given | None:
    """The arguments of `step`, itself first, with its closure wrapped; None without a closure."""
    if callable(kwargs.get("closure")):
        return args, {**kwargs, "closure": wrap(kwargs["closure"])}
    if len(args) > 1 and callable(args[1]):
        return (args[0], wrap(args[1]), *args[2:]), kwargs
    return None


def own_rate(group: dict[str, Any]) -> float:
    """The learning rate that a schedule multiplies, kept where torch's schedulers keep it."""
    return float(group.setdefault("initial_lr", float(group["lr"])))


def set_rate(group: dict[str, Any], rate: float) -> None:
    if isinstance(group["lr"], Tensor):  # of a step that was compiled or captured: it is to see the change
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate
