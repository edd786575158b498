import numpy as np
import pytest
import torch

from micronet.quantization.functional import dequantize, to_integers
from micronet.quantization.histogram import (
    BINS,
    CANDIDATES,
    GridSpec,
    Histogram,
    find_range,
    load_statistics,
    save_statistics,
)


def filled(*batches):
    histogram = Histogram()
    for batch in batches:
        histogram.add(batch)
    return histogram


def test_nothing_is_lost_when_the_range_grows():
    x = torch.cat([torch.randn(1000), 50 * torch.randn(1000), torch.tensor([-700.0, 3.0])])
    histogram = filled(*x.split(300))
    assert histogram.counts.shape == (BINS,)
    assert histogram.counts.sum() == len(x)
    assert (histogram.low, histogram.high) == (float(x.min()), float(x.max()))
    edges = np.linspace(-histogram.limit, histogram.limit, BINS + 1)
    expected, _ = np.histogram(x.numpy(), edges)
    assert np.abs(np.cumsum(histogram.counts.numpy() - expected)).max() <= 4  # values on an edge may fall either way


INF, LARGEST = float("inf"), torch.finfo(torch.float32).max


@pytest.mark.parametrize("values", [[], [0.0], [1e-45], [1, -INF], [-INF], [1, torch.nan], [-LARGEST, 3], [LARGEST]])
def test_a_file_holds_whatever_was_seen(tmp_path, values):
    histogram = filled(*torch.tensor(values).split(1))
    assert histogram.counts.sum() == sum(abs(value) < INF for value in values)
    save_statistics({"a": histogram}, tmp_path / "a", "")
    read = load_statistics(tmp_path / "a", "")["a"]
    assert torch.equal(read.counts, histogram.counts)
    assert repr((read.limit, read.low, read.high)) == repr((histogram.limit, histogram.low, histogram.high))


@pytest.mark.parametrize("share", [0.5, 0.9, 0.999])
def test_quantiles_are_right_to_a_bin(share):
    x = torch.randn(20000)
    histogram = filled(*x.split(5000))
    width = 2 * histogram.limit / BINS
    assert histogram.quantile(share) == pytest.approx(float(np.quantile(x.numpy(), share)), abs=2 * width)


GRIDS = [GridSpec(0, 15, True), GridSpec(-7, 7, True), GridSpec(0, 15, False), GridSpec(0, 255, False)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_mse_finds_the_least_error_of_all_clips(grid):
    x = torch.randn(20000).abs() if grid.qmin == 0 and grid.symmetric else torch.randn(20000)
    x[:5] *= 6
    low, high = find_range(filled(x), grid, "mse", 100)

    def error(low, high):
        qparams = grid.qparams(low, high)
        return float((dequantize(to_integers(x, qparams), qparams) - x).square().mean())

    every = [error(part * float(x.min()), part * float(x.max())) for part in np.linspace(1 / CANDIDATES, 1, CANDIDATES)]
    assert error(low, high) <= min(every) * 1.02
    assert error(low, high) < 0.9 * error(float(x.min()), float(x.max())) or grid.qmax == 255


@pytest.mark.parametrize("calibrator", ["minmax", "percentile", "entropy", "mse"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_ranges_are_inside_what_was_seen(calibrator, grid):
    x = torch.randn(5000).relu() if grid.qmin == 0 and grid.symmetric else torch.randn(5000)
    histogram = filled(x)
    low, high = find_range(histogram, grid, calibrator, 99.0)
    assert histogram.low - 1e-6 <= low <= high <= histogram.high + 1e-6
    assert high > 0.3 * histogram.high
    assert find_range(histogram, grid, "minmax", 99.0) == (histogram.low, histogram.high)


def test_a_percentile_leaves_out_its_share():
    x = torch.linspace(0, 1, 10001)
    low, high = find_range(filled(x), GridSpec(0, 255, True), "percentile", 90.0)
    assert high == pytest.approx(0.9, abs=2e-3)
    low, high = find_range(filled(x - 0.5), GridSpec(0, 255, False), "percentile", 90.0)
    assert (low, high) == pytest.approx((-0.45, 0.45), abs=2e-3)


@pytest.mark.parametrize("x", [torch.zeros(10), torch.full((10,), 3.0), torch.full((10,), -3.0)], ids=["0", "3", "-3"])
@pytest.mark.parametrize("calibrator", ["minmax", "percentile", "entropy", "mse"])
def test_constant_tensors_have_a_range(x, calibrator):
    low, high = find_range(filled(x), GridSpec(0, 255, False), calibrator, 99.9)
    assert low <= float(x[0]) <= high


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_stays_visible(bad):
    histogram = filled(torch.randn(10), torch.tensor([1.0, bad]), torch.randn(10))
    assert not histogram.high < float("inf")


def outliers(x):
    return torch.cat([20 * x[:20], x[20:]])


@pytest.mark.parametrize(
    "shape", [torch.relu, torch.nn.functional.hardswish, outliers, lambda x: outliers(x).relu(), torch.sigmoid]
)
@pytest.mark.parametrize(
    "grid", [GridSpec(0, 255, True), GridSpec(-127, 127, True), GridSpec(0, 255, False), GridSpec(-7, 7, True)]
)
def test_entropy_costs_no_squared_error(shape, grid):
    x = shape(3 * torch.randn(50000))
    if grid.qmin == 0 and grid.symmetric:
        x = x.abs()

    def error(ends):
        qparams = grid.qparams(*ends)
        return float((dequantize(to_integers(x, qparams), qparams) - x).square().mean())

    histogram = filled(x)
    least = error(find_range(histogram, grid, "minmax", 100))
    assert error(find_range(histogram, grid, "entropy", 100)) <= 1.1 * least  # a bin's values are taken for its center
