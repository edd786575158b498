"""How far predicted costs are corrected by those measured so far in the same search."""

import math
from dataclasses import dataclass, field

WIDTH = 0.2  # of the kernel, in the logarithm of costs: networks that differ by a fifth count as alike


@dataclass
class Correction:
    """The ratio of measured to predicted costs, as a function of the predicted cost.

    A runtime has costs that no layer alone shows: what it does between layers and once a call, and kernels that it
    chooses by the whole network. Whole networks show them. The logarithm of the ratio is the mean of those measured,
    weighted by how close their predicted costs are (Nadaraya-Watson regression with a Gaussian kernel). A straight line
    would not do: the original's widths may be awkward for a runtime where narrower ones are not.

    Attributes:
        points: Predicted and measured costs.
    """

    points: list[tuple[float, float]] = field(default_factory=list)

    def add(self, predicted: float, measured: float) -> None:
        """Note a measured cost."""
        if predicted > 0 and measured > 0:
            self.points.append((predicted, measured))

    def __call__(self, predicted: float) -> float:
        """Return a predicted cost, corrected."""
        if predicted <= 0 or all(before == after for before, after in self.points):
            return predicted
        distances = [abs(math.log(predicted / before)) / WIDTH for before, _ in self.points]
        nearest = min(distances)
        weights = [math.exp((nearest**2 - distance**2) / 2) for distance in distances]
        ratios = [math.log(after / before) for before, after in self.points]
        return predicted * math.exp(sum(map(math.prod, zip(weights, ratios, strict=True))) / sum(weights))
