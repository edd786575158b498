"""Scores and penalties of channels by their weights: one row of a layer's weight per channel."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from micronet.errors import MicronetError
from micronet.pruning.channel_map import ChannelMap
from micronet.pruning.criteria import Penalty, Scores
from micronet.pruning.ids import STRIDE, groups_of

WHY_UNSCORED = "no layer with weights produces it"


@torch.no_grad()
def score_rows(
    model: nn.Module, channels: ChannelMap, score: Callable[[Tensor], Tensor], *, of_gradients: bool = False
) -> Scores:
    """Return the mean score of each channel over the layers that produce it.

    A layer's scores are divided by their mean, because one threshold compares layers of all sizes.
    ``score``: (rows, weights per row), float64 -> (rows,). ``of_gradients``: score weight times gradient.
    Raises MicronetError if a weight is NaN or infinite, or a gradient is missing.
    """
    sums = {number: np.zeros(group.width) for number, group in channels.groups.items()}
    counts = dict.fromkeys(channels.groups, 0)
    for name, layer in channels.layers.items():
        module: Any = model.get_submodule(name)
        weight = _real(module.weight.detach())
        if of_gradients:
            if module.weight.grad is None:
                raise MicronetError(
                    f"{name} has no gradient; call backward() on the loss of a few batches before pruning"
                )
            weight = weight * _real(module.weight.grad)
        if not bool(weight.isfinite().all()):
            raise MicronetError(f"{name} has NaN or infinite weights; train again with a lower --lr")
        rows = _rows(module, weight)
        if len(rows) != len(layer.outputs):
            continue
        found = score(rows.flatten(1)).cpu().numpy()
        found = found / (found.mean() or 1.0)
        for group in groups_of(layer.outputs):
            mine = layer.outputs // STRIDE == group
            places = layer.outputs[mine] % STRIDE
            if channels.groups[group].spread(places, np.ones(len(places))).all():
                sums[group] += channels.groups[group].spread(places, found[mine])
                counts[group] += 1
    return {group: total / counts[group] for group, total in sums.items() if counts[group]}


def penalize_rows(model: nn.Module, channels: ChannelMap, s: float, subgradient: Callable[[Tensor], Tensor]) -> Penalty:
    """Return a function that adds ``s`` times a subgradient to the gradients of layers whose channels may be cut.

    ``subgradient``: (rows, weights per row) -> the same shape. Raises MicronetError if there are no such layers.
    """
    layers: list[Any] = [
        model.get_submodule(name)
        for name, layer in channels.layers.items()
        if set(groups_of(layer.outputs)) - channels.pinned.keys()
    ]
    if not layers:
        raise MicronetError(
            "this network has no prunable channels, so there is nothing to penalize; use micronet train instead"
        )

    @torch.no_grad()
    def add() -> None:
        for module in layers:
            if module.weight.grad is not None:
                rows = _rows(module, module.weight)
                slope = subgradient(rows.flatten(1)).view_as(rows)
                module.weight.grad.add_(_rows(module, slope), alpha=s)

    return add


def _real(weight: Tensor) -> Tensor:
    """Return a weight in float64; complex numbers get an axis of their two parts."""
    return (torch.view_as_real(weight) if weight.is_complex() else weight).double()


def _rows(module: Any, weight: Tensor) -> Tensor:
    """Swap a weight's first axes if that brings the outputs to the front, or back from there."""
    return weight.transpose(0, 1) if getattr(module, "transposed", False) else weight
