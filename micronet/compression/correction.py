"""How far predicted costs are corrected by those measured so far in the same search."""

import math
from dataclasses import dataclass, field

import numpy as np

from micronet.core.timing import NOISE


@dataclass
class Correction:
    """The ratio of measured to predicted costs, as a function of the predicted cost.

    A runtime has costs that no layer alone shows: what it does between layers and once a call, and kernels that it
    chooses by the whole network. Whole networks show them. Between two of them, the logarithm of the ratio is
    interpolated in that of the cost; beyond the last, it is the last one's. A straight line would not do: the
    original's widths may be awkward for a runtime where narrower ones are not. The corrected cost rises with the
    predicted one, as a walk and a bisection need: networks that were measured in another order than was predicted, or
    that are alike within the noise of timing, count as one, their mean.

    Attributes:
        points: Predicted and measured costs.
    """

    points: list[tuple[float, float]] = field(default_factory=list)

    def add(self, predicted: float, measured: float) -> None:
        """Note a measured cost."""
        if predicted > 0 and 0 < measured < math.inf:
            self.points.append((predicted, measured))

    def __call__(self, predicted: float) -> float:
        """Return a predicted cost, corrected."""
        if predicted <= 0 or all(before == after for before, after in self.points):
            return predicted
        costs, measured = zip(*self._rising(), strict=True)
        ratios = [after - before for before, after in zip(costs, measured, strict=True)]
        return predicted * math.exp(np.interp(math.log(predicted), costs, ratios))

    def _rising(self) -> list[tuple[float, float]]:
        """Return the logarithms of predicted and measured costs, both rising (pool adjacent violators)."""
        pools: list[tuple[int, float, float]] = []
        for before, after in sorted(self.points):
            size, x, y = 1, math.log(before), math.log(after)
            while pools and (pools[-1][1] > x - math.log(NOISE) or pools[-1][2] >= y):
                other, low, lowest = pools.pop()
                x, y = ((size * new + other * old) / (size + other) for new, old in ((x, low), (y, lowest)))
                size += other
            pools.append((size, x, y))
        return [(x, y) for _, x, y in pools]
