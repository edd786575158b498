"""Judging channels by the weights that make them: one row of a layer's weight a channel."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from micronet.errors import MicronetError
from micronet.pruning.flow import Flow
from micronet.pruning.numbering import STRIDE, groups_of

Penalty = Callable[[], None]
Scores = dict[int, NDArray[np.float64]]
WHY_UNJUDGED = "no weights make it"


@torch.no_grad()
def judge(model: nn.Module, flow: Flow, worth: Callable[[Tensor], Tensor], *, of_gradients: bool = False) -> Scores:
    """Return (channels,) scores of every group: the mean, over the layers that make its channels, of a row's worth.

    ``worth``: (rows, weights) float64 -> (rows,). Each layer's are divided by their mean, so that layers of other
    sizes compare (the whole network has one threshold). ``of_gradients``: rows of weight times gradient.
    Raises MicronetError where a weight is NaN or infinite, or a gradient is missing.
    """
    sums = {group: np.zeros(width) for group, width in flow.widths.items()}
    judges = dict.fromkeys(flow.widths, 0)
    for name, layer in flow.layers.items():
        module: Any = model.get_submodule(name)
        weight = module.weight.detach().double()
        if of_gradients:
            if module.weight.grad is None:
                raise MicronetError(f"{name} has no gradient; run the loss backward on some batches before pruning")
            weight = weight * module.weight.grad.double()
        if not bool(weight.isfinite().all()):
            raise MicronetError(f"{name} has weights that are NaN or infinite; train it anew with a lower --lr")
        rows = weight.transpose(0, 1) if getattr(module, "transposed", False) else weight
        if len(rows) != len(layer.outputs):
            continue
        found = worth(rows.flatten(1)).cpu().numpy()
        found = found / (found.mean() or 1.0)
        for group in groups_of(layer.outputs):
            mine = layer.outputs // STRIDE == group
            if len(np.unique(layer.outputs[mine])) == flow.widths[group]:
                np.add.at(sums[group], layer.outputs[mine] % STRIDE, found[mine])
                judges[group] += 1
    return {group: total / judges[group] for group, total in sums.items() if judges[group]}


def push(model: nn.Module, flow: Flow, s: float, slope: Callable[[Tensor], Tensor]) -> Penalty:
    """Return the function that adds ``s * slope(rows)`` to the gradients of the weights that make cuttable channels.

    ``slope``: (rows, weights) -> the penalty's subgradient, of the same shape. Raises MicronetError where there
    are none.
    """
    weights: list[tuple[nn.Parameter, bool]] = []
    for name, layer in flow.layers.items():
        module: Any = model.get_submodule(name)
        if set(groups_of(layer.outputs)) - flow.pinned.keys():
            weights.append((module.weight, bool(getattr(module, "transposed", False))))
    if not weights:
        raise MicronetError("no layer of this network makes channels that could be cut, so there is nothing to push")

    @torch.no_grad()
    def add() -> None:
        for weight, transposed in weights:
            if weight.grad is not None:
                rows = weight.transpose(0, 1) if transposed else weight
                pushed = slope(rows.flatten(1)).view_as(rows)
                weight.grad.add_(pushed.transpose(0, 1) if transposed else pushed, alpha=s)

    return add
