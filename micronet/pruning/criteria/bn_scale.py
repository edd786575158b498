"""Channels judged by the scale of the batch norm behind them (network slimming, Liu et al. 2017, arXiv:1708.06519).

A channel is worth |gamma|; training with an L1 penalty on gamma pushes what the network can do without towards zero.
The penalty's subgradient ``s * sign(gamma)`` is added to the gradient before the optimizer's step. Deviation from the
micronet of 2021: the batch norm of the class scores, which is never cut, is not penalised.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from micronet.errors import MicronetError
from micronet.pruning.flow import Flow
from micronet.pruning.numbering import STRIDE, groups_of

WHY_UNJUDGED = "no batch norm with a scale follows it; --criterion l2 judges by weights"


def scores(model: nn.Module, flow: Flow) -> dict[int, NDArray[np.float64]]:
    """Return (channels,) scores of every group that has a batch norm on all its channels; higher is worth more.

    Where channels are added to others, or several batch norms read them, it is the mean of their scales' magnitudes.
    Raises MicronetError where a scale is NaN.
    """
    sums = {group: np.zeros(width) for group, width in flow.widths.items()}
    judges = {group: np.zeros(width) for group, width in flow.widths.items()}
    for name, ids in flow.norms.items():
        scale = _scale(model, name)
        if scale is None:
            continue
        worth = scale.detach().abs().double().cpu().numpy()
        for group in groups_of(ids):
            mine = ids // STRIDE == group
            np.add.at(sums[group], ids[mine] % STRIDE, worth[mine])
            np.add.at(judges[group], ids[mine] % STRIDE, 1)
    found = {group: total / judges[group] for group, total in sums.items() if judges[group].all()}
    if any(np.isnan(worth).any() for worth in found.values()):
        raise MicronetError("a batch norm's scale is NaN: the network has diverged; train it anew with a lower --lr")
    return found


def penalty(model: nn.Module, flow: Flow, s: float) -> Callable[[], None]:
    """Return the function that adds ``s * sign(gamma)`` to the gradients of the scales that pruning may judge by.

    Raises MicronetError where there are none.
    """
    cuttable = flow.widths.keys() - flow.pinned.keys()
    scales = [
        scale
        for name, ids in flow.norms.items()
        if set(groups_of(ids)) & cuttable and (scale := _scale(model, name)) is not None
    ]

    if not scales:
        raise MicronetError(
            "no batch norm of this network scales channels that could be cut, so there is nothing to push; "
            "--criterion l2 pushes weights"
        )

    @torch.no_grad()
    def add() -> None:
        for scale in scales:
            if scale.grad is not None:
                scale.grad.add_(scale.sign(), alpha=s)

    return add


def _scale(model: nn.Module, name: str) -> nn.Parameter | None:
    norm = model.get_submodule(name)
    scale = norm.weight if isinstance(norm, nn.modules.batchnorm._BatchNorm) else None
    return scale if isinstance(scale, nn.Parameter) else None
