"""Agreement: how close a network's outputs are to those of its float original, for any network and no labels.

Each output is compared on its own: the signal-to-quantization-noise ratio, SQNR = 10 log10(sum(y^2) / sum((y' - y)^2))
in dB, over all values and channel by channel, and the cosine similarity. A network is judged by its worst output.
Integers other than uint8, which holds pixels, are labels: they are equal or not, and only count if no output is float.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from micronet.core.image_size import ImageSize
from micronet.core.metrics import EQUAL_DB
from micronet.data.arrays import open_inputs
from micronet.data.dataset import DataSource, DataSpec
from micronet.data.folder import open_unlabeled
from micronet.data.load import open_images
from micronet.errors import MicronetError
from micronet.tasks.task import Outputs, Task, describe

SMALLEST = 1e-30  # keeps sums of squares of zeros from dividing by zero
SLOTS = 512  # of channels whose sums are kept apart
LARGEST_DB = float(EQUAL_DB)  # of equal outputs, whose SQNR is infinite; float64 resolves 313 dB
FIGURES = "sqnr_db", "channel_sqnr_db", "cosine", "equal_labels"  # of each output; the least is that of the network
LARGEST_ERROR = 10 ** (LARGEST_DB / 20)  # of outputs with NaN or infinity: -300 dB


class Similarity:
    """Sums of products of outputs and references, for each output and each of its channels (axis 1)."""

    def __init__(self) -> None:
        # (6, outputs, SLOTS) float64: y^2, y'^2, y y', (y' - y)^2, and of labels those that differ and all of them;
        # ranks add theirs up
        self.totals = torch.zeros(0)

    def update(self, outputs: Outputs, targets: Outputs) -> None:
        """Add the outputs of a network and of its original for the same batch."""
        columns = []
        for ours, theirs in zip(*_paired(outputs, targets), strict=True):
            y, other = theirs.double(), ours.double()
            is_label = torch.full_like(y, _holds_labels(theirs))
            products = y * y, other * other, y * other, (other - y).square(), (other != y) * is_label, is_label
            columns.append(torch.stack([_by_channel(each) for each in products]))
        added = torch.stack(columns, 1)
        self.totals = self.totals + added if len(self.totals) else added

    def compute(self) -> dict[str, float]:
        """Return the figures of the worst output and, if there are several, of each, numbered from 1.

        ``error`` is the root of noise over signal, 0 for equal outputs: 20 log10(1 / error) is the SQNR. That of the
        channels is from the mean of their noise over their signal, at most 1 each, so that small values beside large
        ones, such as scores beside boxes in pixels, count like these. ``equal_labels``: the share of labels that are
        equal, if there are any; if all outputs are labels, ``error`` is the root of the share of the others.
        """
        signal, own, product, noise, different, labels = self.totals.sum(2)
        error = (noise / signal.clamp(min=SMALLEST)).sqrt().nan_to_num(LARGEST_ERROR).clamp(max=LARGEST_ERROR)
        cosine = (product / (signal * own).sqrt().clamp(min=SMALLEST)).nan_to_num(0.0)
        cosine = torch.where((signal == 0) & (own == 0), 1.0, cosine).clamp(-1, 1)
        channels = _channel_error(self.totals[0], self.totals[3])
        is_label, share = labels > 0, different / labels.clamp(min=1)
        error = torch.where(is_label, share.sqrt(), error)
        rows: list[dict[str, float]] = [
            {"equal_labels": 1 - other} if label else
            {"sqnr_db": decibels(each), "channel_sqnr_db": decibels(channel), "cosine": alike}
            for label, other, each, channel, alike in zip(
                *(x.tolist() for x in (is_label, share, error, channels, cosine)), strict=True
            )
        ]  # fmt: skip
        found = {key: min(row[key] for row in rows if key in row) for key in FIGURES if any(key in row for row in rows)}
        found["error"] = float((error if is_label.all() else error[~is_label]).max())
        if len(rows) > 1:
            found |= {f"{key}/{number}": value for number, row in enumerate(rows, 1) for key, value in row.items()}
        return found


class Agreement(Task):
    """How close outputs are to those of the float network."""

    name = "agreement"
    main = "error"
    higher_is_better = False
    needs_reference = True

    def open(self, place: str, image_size: ImageSize | None) -> DataSource:
        """Open arrays of inputs, a folder of .npy files, or any images, whose labels do not matter."""
        path = Path(place)
        source = open_inputs(path)
        if source is None and path.is_dir():
            source = open_unlabeled(path, image_size)
        return source or open_images(place, image_size)

    def check(self, outputs: Outputs, spec: DataSpec, name: str) -> None:
        """Raise MicronetError if the network returns no numbers to compare."""
        if isinstance(outputs, list) and not outputs:
            raise MicronetError(f"{name} returned no tensor; return one, or a tuple, a list or a dict of tensors")

    def loss(self, outputs: Outputs, targets: Any) -> Tensor:
        """Return the squared relative error, averaged over the outputs."""
        return relative_error(outputs, targets)

    def meter(self) -> Similarity:
        """Return an empty meter of SQNR and cosine similarity."""
        return Similarity()


def decibels(error: float) -> float:
    """Return the SQNR of outputs with an ``error``, in dB."""
    return min(LARGEST_DB, 20 * math.log10(1 / max(error, SMALLEST)))


def relative_error(outputs: Outputs, targets: Outputs) -> Tensor:
    """Return sum((y' - y)^2) / sum(y^2), averaged over the outputs y' and their targets y, without labels beside them.

    In training mode a network may return more, such as the scores of an auxiliary classifier, behind these outputs.
    """
    if isinstance(outputs, list):
        outputs = outputs[: 1 if isinstance(targets, Tensor) else len(targets)]
    pairs, errors = list(zip(*_paired(outputs, targets), strict=True)), []
    for ours, theirs in [pair for pair in pairs if not _holds_labels(pair[1])] or pairs:
        y = theirs.float()
        errors.append((ours.float() - y).square().sum() / y.square().sum().clamp(min=SMALLEST))
    return torch.stack(errors).mean()


def energy(outputs: Outputs) -> Tensor:
    """Return the mean squared value of every output, added up over the outputs: a loss for criteria without labels.

    Each output is divided by its present energy, so that the outputs with large values do not outweigh the others.
    Raises MicronetError if none of them is of a floating-point type.
    """
    found = []
    for each in [outputs] if isinstance(outputs, Tensor) else outputs:
        if each.is_floating_point():
            squared = each.float().square().mean()
            found.append(squared / squared.detach().clamp(min=SMALLEST))
    if not found:
        raise MicronetError("the network has no floating-point outputs, so it has no gradients; add --criterion l2")
    return torch.stack(found).sum()


def _paired(outputs: Outputs, targets: Outputs) -> tuple[list[Tensor], list[Tensor]]:
    ours, theirs = ([each] if isinstance(each, Tensor) else list(each) for each in (outputs, targets))
    shapes = [[tuple(each.shape) for each in outputs] for outputs in (ours, theirs)]
    if shapes[0] != shapes[1]:
        if [shape[1:] for shape in shapes[0]] == [shape[1:] for shape in shapes[1]]:
            raise MicronetError(
                f"the networks return other numbers of rows for the same inputs ({_spelled(shapes[0])} here, "
                f"{_spelled(shapes[1])} in the reference), as forward() selects them by value; return what comes "
                "before the selection, or write a task that compares them (--task FILE.py:Task); quantize --skip-test "
                "compares nothing"
            )
        raise MicronetError(
            f"the networks have different outputs: {describe(ours)} here, {describe(theirs)} in the reference; compare "
            "networks made from the same original"
        )
    return ours, theirs


def _spelled(shapes: list[tuple[int, ...]]) -> str:
    return ", ".join("x".join(map(str, shape)) for shape in shapes[:3]) + " …" * (len(shapes) > 3)


def _holds_labels(values: Tensor) -> bool:
    return not (values.is_floating_point() or values.is_complex() or values.dtype == torch.uint8)


def _by_channel(values: Tensor) -> Tensor:
    """Return the sums of values (N, C, ...) over all axes but the second, (SLOTS,); more channels share slots."""
    channels = values.sum([axis for axis in range(values.dim()) if axis != 1]).reshape(-1)
    index = torch.arange(len(channels)) * SLOTS // max(SLOTS, len(channels))
    return torch.zeros(SLOTS, dtype=torch.float64).index_add_(0, index, channels.cpu())


def _channel_error(signal: Tensor, noise: Tensor) -> Tensor:
    """Return the root of the mean over the channels of noise over signal, at most 1 each; (outputs, SLOTS) each."""
    ratio = torch.where(noise == 0, 0.0, (noise / signal).clamp(max=1))
    ratio = torch.where(noise.isfinite(), ratio, LARGEST_ERROR**2)
    used = ((signal != 0) | (noise != 0)).sum(1)
    return (ratio.sum(1) / used.clamp(min=1)).sqrt()
