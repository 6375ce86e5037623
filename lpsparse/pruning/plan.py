"""Plan a prune: what a rule decides about the tensors that may be cut, as plain data. Writes nothing."""

from dataclasses import dataclass

from lpsparse.checkpoint.counting import Cut
from lpsparse.checkpoint.open import Checkpoint
from lpsparse.checkpoint.tensors import Tensor
from lpsparse.pruning.gap import Band
from lpsparse.pruning.rules import Asked, Decided, Rule, rule_of
from lpsparse.pruning.targets import Chosen


@dataclass(frozen=True, slots=True)
class Plan:
    chosen: Chosen
    rule: Rule
    decided: Decided

    @property
    def threshold(self) -> float | None:
        """The one magnitude of a global cut."""
        return self.decided.threshold

    @property
    def band(self) -> Band | None:
        """The band that --gap found."""
        return self.decided.band

    def cut(self, tensor: Tensor) -> Cut | None:
        """The function that applies this plan to the blocks of a tensor; None if the tensor is kept."""
        if not self.chosen[tensor.name].prunable:
            return None
        return lambda blocks: self.rule.apply(tensor, self.decided, blocks)


def plan_prune(source: Checkpoint, step: Asked, chosen: Chosen) -> Plan:
    """Decide by the rule of `step`. Ties go by tensor name, then by position.

    Raises as `Rule.decide` does.
    """
    tensors = [tensor for tensor in source.tensors if chosen[tensor.name].prunable]
    rule = rule_of(step)
    return Plan(chosen, rule, rule.decide(source, sorted(tensors, key=lambda tensor: tensor.name)))


@dataclass(frozen=True, slots=True)
class Outlook:
    """What names and shapes tell of a plan: the fewest zeros. None is for the values to decide."""

    zeros: int | None  # of all prunable weights
    each: dict[str, int | None]  # of each prunable tensor


def plan_unread(source: Checkpoint, step: Asked, chosen: Chosen) -> Outlook:
    """What is known before a weight is read. Raises UsageError for shapes that the rule does not divide."""
    tensors = [tensor for tensor in source.tensors if chosen[tensor.name].prunable]
    return Outlook(*rule_of(step).expect(tensors))
