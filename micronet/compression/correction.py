"""How far predicted costs are corrected by those measured so far in the same search."""

from dataclasses import dataclass, field

import numpy as np

# Standard deviations that the fit assumes, as fractions: of a measured cost, of the slope, of the offset.
NOISE, SLOPE, OFFSET = 0.03, 0.1, 0.1


@dataclass
class Correction:
    """measured = offset + slope * predicted, fitted to the networks measured so far.

    A runtime has costs that no layer alone shows: what it does between layers, and what it does once a call. Whole
    networks show them. The fit minimizes relative errors and is drawn to no correction (ridge regression: the mode of
    a normal prior), so that one network, or two alike, cannot tilt it.

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
        if all(before == after for before, after in self.points):
            return predicted
        offset, slope = self._fit()
        return max(offset + slope * predicted, 0.0)

    def _fit(self) -> tuple[float, float]:
        """Return the offset and the slope."""
        predicted, measured = np.array(self.points, np.float64).T
        unit = measured.max()
        rows = np.stack([unit / measured, predicted / measured], axis=1) / NOISE
        matrix = np.vstack([rows, [1 / OFFSET, 0], [0, 1 / SLOPE]])
        wanted = np.concatenate([np.full(len(measured), 1 / NOISE), [0.0, 1 / SLOPE]])
        offset, slope = np.linalg.lstsq(matrix, wanted, rcond=None)[0]
        return float(offset * unit), float(slope)
