"""Histograms of a tensor's values over many batches, and the quantization ranges that calibrators derive from them.

Memory is O(bins): if a value lies outside, the width of the bins doubles and neighbors merge.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from micronet.artifact.artifact import read_tensors, write_tensors
from micronet.core.config import accepts
from micronet.core.tensor_file import read_table
from micronet.errors import MicronetError
from micronet.quantization.config import Calibrator
from micronet.quantization.functional import QParams, dequantize, range_qparams, to_integers

BINS = 2048  # half of them below zero
CANDIDATES = 128  # clips that entropy and mse try, per end
FEWEST_BINS = BINS // 8  # in a clip that entropy considers: TensorRT begins with 128 of 1024 positive bins
COUNTED_AT_ONCE = 1 << 22  # torch.histc counts in float32, where 2^24 + 1 is 2^24
WIDEST = 2.0**126  # the limit up to which torch.histc counts in float32; beyond, the width of the range overflows
SEARCHES = 3  # alternating searches for each end of an asymmetric range, with the other end fixed
_KEY = "micronet-calibration"


@dataclass
class Histogram:
    """Counts of values in equal bins over [-limit, limit]; ``low`` and ``high`` are the exact extremes."""

    counts: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.float64))
    limit: float = 0.0
    low: float = float("inf")
    high: float = float("-inf")

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Count the values of ``x``. NaN or infinity turns ``low`` and ``high`` into NaN."""
        if not x.numel():
            return
        low, high = (float(end) for end in torch.aminmax(x))
        self.low, self.high = min(self.low, low), max(self.high, high)
        largest = max(abs(low), abs(high))
        if not largest < float("inf"):
            self.low = self.high = float("nan")
            return
        if self.limit == 0.0:
            self.limit = largest or 2.0**-60
        while largest > self.limit:
            self._widen()
        wide = self.limit > WIDEST  # such as masks of the least float32
        for part in torch.split((x.double() if wide else x.float()).reshape(-1), COUNTED_AT_ONCE):
            self.counts += torch.histc(part, BINS, -self.limit, self.limit).cpu().double()

    def _widen(self) -> None:
        merged = self.counts.view(-1, 2).sum(1)
        self.counts = torch.zeros_like(self.counts)
        self.counts[BINS // 4 : BINS * 3 // 4] = merged
        self.limit *= 2

    @property
    def empty(self) -> bool:
        """Whether no value has been counted."""
        return self.low == float("inf")

    @property
    def sound(self) -> bool:
        """Whether ``add`` can have made it: counts of values between its ends, which are NaN or inside the limit."""
        counts = self.counts
        if (
            counts.shape != (BINS,)
            or not counts.is_floating_point()
            or not bool((counts.isfinite() & (counts >= 0)).all())
        ):
            return False
        if self.empty:
            return self.high == -self.low and self.limit == 0 and not bool(counts.any())
        if math.isnan(self.low) and math.isnan(self.high):  # a batch held NaN or infinity; none of it was counted
            return 0 <= self.limit < math.inf and bool(counts.any()) == (self.limit > 0)
        return 0 < self.limit < math.inf and -self.limit <= self.low <= self.high <= self.limit and bool(counts.any())

    @property
    def centers(self) -> Tensor:
        """The middle of each bin, (BINS,)."""
        width = 2 * self.limit / BINS
        return (torch.arange(BINS, dtype=torch.float64) + 0.5) * width - self.limit

    def quantile(self, share: float) -> float:
        """Return the value below which ``share`` (0..1) of all values lie, to within a bin's width."""
        total = self.counts.cumsum(0)
        index = int(torch.searchsorted(total, share * float(total[-1])))
        edge = float(self.centers[min(index, BINS - 1)]) + self.limit / BINS
        return min(max(edge, self.low), self.high)


@dataclass(frozen=True)
class GridSpec:
    """The integers of the grid that a range is for, and whether the grid is symmetric."""

    qmin: int
    qmax: int
    symmetric: bool

    def qparams(self, low: float | list[float], high: float | list[float]) -> QParams:
        """Return the grid over [low, high], or one for each pair of ends, for axis 0."""
        ends = torch.tensor(low), torch.tensor(high)
        grid = range_qparams(*ends, self.qmin, self.qmax, symmetric=self.symmetric)
        return QParams(*grid, self.qmin, self.qmax, 0 if isinstance(low, list) else None)


def find_range(histogram: Histogram, grid: GridSpec, calibrator: Calibrator, percentile: float) -> tuple[float, float]:
    """Return the range (low, high) that a calibrator chooses.

    Args:
        histogram: The values seen.
        grid: The grid that the range is for.
        calibrator: ``minmax``: all values. ``percentile``: that share of them. ``mse``: the clip of least squared error
            (Banner et al. 2019, arXiv:1810.05723, by search). ``entropy``: the clip of least Kullback-Leibler
            divergence between the values and their levels (Migacz 2017, TensorRT). The divergence ignores how far
            clipped values move, so ``entropy`` tries only clips whose squared error is at most that of ``minmax``.
        percentile: In percent; of magnitudes if the grid is symmetric, else the rest is split between both ends.
    """
    low, high = histogram.low, histogram.high
    if calibrator == "minmax" or not high > low:
        return low, high
    if calibrator == "percentile":
        share = percentile / 100
        if grid.symmetric:
            limit = _magnitudes(histogram).quantile(share)
            return max(low, -limit), min(high, limit)
        return histogram.quantile((1 - share) / 2), histogram.quantile((1 + share) / 2)
    largest_error = float(_squared_errors(histogram, grid.qparams([low], [high])))

    def best(lows: list[float], highs: list[float]) -> int:
        losses = _squared_errors(histogram, grid.qparams(lows, highs)).tolist()
        if calibrator == "entropy":
            losses = [
                _divergence(histogram, grid.qparams(*ends)) if error <= largest_error else math.inf
                for *ends, error in zip(lows, highs, losses, strict=True)
            ]
        return losses.index(min(losses))

    shares = torch.linspace(1 / CANDIDATES, 1, CANDIDATES, dtype=torch.float64).tolist()
    lows, highs = [low * share for share in shares], [high * share for share in shares]
    if grid.symmetric or low >= 0 or high <= 0:
        chosen = best(lows, highs)
        return lows[chosen], highs[chosen]
    for _ in range(SEARCHES):  # one end at a time: an outlier at one end must not narrow the other
        low = lows[best(lows, [high] * CANDIDATES)]
        high = highs[best([low] * CANDIDATES, highs)]
    return low, high


def _magnitudes(histogram: Histogram) -> Histogram:
    """Return the histogram of magnitudes."""
    half = BINS // 2
    counts = torch.zeros_like(histogram.counts)
    counts[half:] = histogram.counts[half:] + histogram.counts[:half].flip(0)
    largest = max(abs(histogram.low), abs(histogram.high))
    return Histogram(counts, histogram.limit, 0.0, largest)


def _squared_errors(histogram: Histogram, grids: QParams) -> Tensor:
    """Return the error of each grid of several, (grids,)."""
    x = histogram.centers.expand(len(grids.scale), BINS)
    error = dequantize(to_integers(x, grids), grids) - x
    return (histogram.counts * error.square()).sum(1)


def _divergence(histogram: Histogram, qparams: QParams) -> float:
    """Return KL(P || Q): P counts clipped values at the ends, Q spreads each level's count evenly over its bins."""
    x, counts = histogram.centers, histogram.counts.clone()
    middle = BINS // 2  # zero is exact on every grid, and the zeros of ReLUs would dominate
    counts[middle], counts[middle - 1] = counts[middle + 1].clone(), counts[middle - 2].clone()
    lowest = (qparams.qmin - 0.5 - qparams.zero_point) * qparams.scale
    highest = (qparams.qmax + 0.5 - qparams.zero_point) * qparams.scale
    inside = (x >= lowest) & (x <= highest)
    if int(inside.sum()) < min(qparams.qmax - qparams.qmin + 1, FEWEST_BINS):
        return float("inf")  # each bin would have its own level, so the divergence would be 0
    level = (to_integers(x, qparams) - qparams.qmin).long()[inside]
    counts_inside = counts[inside]
    if not counts_inside.any():
        return float("inf")  # P and Q would consist of clipped values alone and be equal
    p = counts_inside.clone()
    p[0] += counts[x < lowest].sum()
    p[-1] += counts[x > highest].sum()
    used = (p > 0).double()
    levels = qparams.qmax - qparams.qmin + 1
    total = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, counts_inside)
    bins = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, used)
    q = used * (total / bins.clamp(min=1))[level]
    p, q = p / p.sum(), (q + 1e-12 * used) / (q + 1e-12 * used).sum()
    found = p > 0
    return float((p[found] * (p[found] / q[found]).log()).sum())


Statistics = dict[str, Histogram]  # of each activation quantizer, ``module.slot``


def save_statistics(statistics: Statistics, path: Path, network: str) -> None:
    """Write statistics to a file; ``network``: a hash of the network and images that they come from."""
    tensors = {name: histogram.counts for name, histogram in statistics.items()}
    ends = {name: [item.limit, item.low, item.high] for name, item in statistics.items()}
    write_tensors(path, tensors, _KEY, {"network": network, "ends": ends})


def load_statistics(path: Path, network: str | None) -> Statistics:
    """Read statistics. Raises MicronetError if the file is damaged, or is not of ``network``, if that is given."""
    try:
        table = read_table(path)
        header, tensors = table.header(_KEY), read_tensors(path, table)
        ends = header["ends"]
        if not accepts(dict[str, list[float]], ends) or any(len(each) != 3 for each in ends.values()):
            raise ValueError("its ends are invalid")
        found = {name: Histogram(tensors[name], *map(float, each)) for name, each in ends.items()}
        for name, item in found.items():
            if not item.sound:
                raise ValueError(f"the counts or ends of {name} are invalid")
    except (OSError, KeyError, ValueError, OverflowError) as error:
        raise MicronetError(
            f"{path} is not a calibration statistics file ({error}); delete it or choose another"
        ) from error
    if network is not None and header.get("network") != network:
        raise MicronetError(
            f"{path} contains calibration statistics from a different artifact or different images; delete it "
            "or choose another"
        )
    return found
