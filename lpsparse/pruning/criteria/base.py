"""A criterion: what ranks the weights of a tensor. The smallest scores are cut first."""

from collections.abc import Callable
from dataclasses import dataclass

from lpsparse.checkpoint.dtypes import Bits
from lpsparse.checkpoint.tensors import Tensor


@dataclass(frozen=True, slots=True)
class Criterion:
    """A member of the family CRITERIA.

    `score(codes, tensor, line)` ranks a block of a tensor. `codes` are its magnitudes as `ordered` gives
    them, finite, (lines, width); `line` is the number of the first line. It returns integers of the same
    shape in the order of the scores, which are values of the dtype that `dtype(tensor)` names. A zero
    scores 0.
    """

    score: Callable[[Bits, Tensor, int], Bits]
    dtype: Callable[[Tensor], str] = lambda _: "F32"
