"""Round values on an axis: 1, 2 or 5 times a power of ten."""

import math


def step_of(low: float, high: float, most: int = 5) -> float:
    """Between two of them, so that about `most` lie on the axis."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * each for each in (1, 2, 5, 10) if power * each >= rough * (1 - 1e-9))


def between(low: float, high: float, most: int = 5) -> list[float]:
    step = step_of(low, high, most)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]
