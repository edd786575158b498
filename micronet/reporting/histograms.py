"""Histograms of a network's weights and activations, with the grids of their quantizers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from micronet.evaluation import plot
from micronet.quantization.calibrate import collect, each_quantizer
from micronet.quantization.functional import broadcast
from micronet.quantization.layers import effective_weight
from micronet.quantization.quantizer import Quantizer

BINS = 120
MOST_LEVELS = 17  # of a grid whose levels are all drawn; of finer ones, the ends alone
COLUMNS = 4
WIDTH, HEIGHT = 3.2, 2.2  # of a panel, in inches


class Panel(NamedTuple):
    """A histogram: its bins' edges (n + 1,) and counts (n,), and the levels of the grid in the same unit."""

    title: str
    unit: str
    edges: NDArray[np.float64]
    counts: NDArray[np.float64]
    levels: list[float]


def weight_panels(model: nn.Module) -> list[Panel]:
    """Return a histogram for each layer with weights: of quantized ones in steps of their channels' grids."""
    quantizers = {name: quantizer for name, slot, quantizer in each_quantizer(model) if slot == "weight_quantizer"}
    found = []
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() < 2 or not weight.numel():
            continue
        if name in quantizers:
            weight = effective_weight(module).detach()
            grid = quantizers[name].qparams(weight)
            weight = weight.tanh() if quantizers[name].scheme == "dorefa-weight" else weight
            steps = weight / broadcast(grid.scale, weight, grid.axis) + broadcast(grid.zero_point, weight, grid.axis)
            counts, edges = _histogram(steps)
            found.append(Panel(name, "steps", edges, counts, _levels(quantizers[name], grid.qmin, grid.qmax)))
        else:
            counts, edges = _histogram(weight.detach())
            found.append(Panel(f"{name} (float)", "value", edges, counts, []))
    return found


def activation_panels(model: nn.Module, batches: Sequence[Any]) -> list[Panel]:
    """Return a histogram, in steps of the grid, of what reaches each activation quantizer but signs.

    ``batches``: inputs of the network.
    """
    quantizers = {f"{name}.{slot}": quantizer for name, slot, quantizer in each_quantizer(model)}
    found = []
    for place, histogram in collect(model, batches).items():
        if histogram.empty:
            continue
        grid = quantizers[place].qparams(histogram.centers)
        scale, zero_point = float(grid.scale), float(grid.zero_point)
        edges = np.linspace(-histogram.limit, histogram.limit, len(histogram.counts) + 1)
        used = np.flatnonzero(histogram.counts.numpy())
        inside = slice(used[0], used[-1] + 1)
        steps = edges[used[0] : used[-1] + 2] / scale + zero_point
        levels = _levels(quantizers[place], grid.qmin, grid.qmax)
        found.append(Panel(place.removesuffix("_quantizer"), "steps", steps, histogram.counts.numpy()[inside], levels))
    return found


def draw(panels: Sequence[Panel], path: Path) -> None:
    """Draw histograms into a .png, .svg or .pdf file, four in a row, with a line for each level of the grid."""
    rows = -(-len(panels) // COLUMNS)

    def fill(grid: Any) -> None:
        axes = grid.ravel()
        for axis, panel in zip(axes, panels, strict=False):
            axis.stairs(panel.counts, panel.edges, fill=True, color="#0b62a8")
            for level in panel.levels:
                axis.axvline(level, color="#d55e00", linewidth=0.6)
            axis.set_title(panel.title, fontsize=7)
            axis.set_yscale("log")
            axis.tick_params(labelsize=6)
            axis.set_xlabel(panel.unit, fontsize=6)
        for axis in axes[len(panels) :]:
            axis.set_axis_off()

    plot.draw(path, (WIDTH * COLUMNS, HEIGHT * rows + 0.4), fill, (rows, COLUMNS))


def _histogram(values: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    counts, edges = np.histogram(values.flatten().double().cpu().numpy(), BINS)
    return counts.astype(np.float64), edges


def _levels(quantizer: Quantizer, qmin: int, qmax: int) -> list[float]:
    """Return the levels of a grid, or its ends if there are many."""
    step = 2 if quantizer.scheme in ("binary", "sign", "dorefa-weight") else 1  # these have no even integers
    every = [float(level) for level in range(qmin, qmax + 1, step)]
    return every if len(every) <= MOST_LEVELS else [every[0], every[-1]]
