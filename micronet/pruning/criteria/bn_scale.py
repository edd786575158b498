"""Scores by the scale of the following batch norm (network slimming, Liu et al. 2017, arXiv:1708.06519).

The score of a channel is |gamma|. Training with an L1 penalty on gamma pushes the scales of unimportant channels
towards zero: ``s * sign(gamma)`` is added to the gradient before the optimizer's step. Unlike in the micronet of 2021,
the batch norm of the class scores is not penalized, because its channels are never cut.
"""

import numpy as np
import torch
from torch import nn

from micronet.errors import MicronetError
from micronet.graph import ops
from micronet.pruning.channel_map import ChannelMap
from micronet.pruning.criteria import Penalty, Scores
from micronet.pruning.ids import STRIDE, Ids, groups_of

WHY_UNSCORED = "no batch norm with a scale follows it; use --criterion l2 to rank by weights"


def scores(model: nn.Module, channels: ChannelMap) -> Scores:
    """Return the scores of every group whose channels all have a batch norm.

    If several batch norms scale a channel, its score is the mean of their |gamma|. Raises MicronetError for NaN.
    """
    sums = {number: np.zeros(group.width) for number, group in channels.groups.items()}
    counts = {number: np.zeros(group.width) for number, group in channels.groups.items()}
    for scale, ids in _scales(model, channels):
        magnitude = scale.detach().abs().double().cpu().numpy()
        for group in groups_of(ids):
            mine = ids // STRIDE == group
            places = ids[mine] % STRIDE
            sums[group] += channels.groups[group].spread(places, magnitude[mine])
            counts[group] += channels.groups[group].spread(places, np.ones(len(places)))
    found = {group: total / counts[group] for group, total in sums.items() if counts[group].all()}
    if any(np.isnan(values).any() for values in found.values()):
        raise MicronetError("a batch norm's scale is NaN: training diverged; train again with a lower --lr")
    return found


def penalty(model: nn.Module, channels: ChannelMap, s: float) -> Penalty:
    """Return a function that adds ``s * sign(gamma)`` to the gradients of the scales of channels that may be cut.

    Raises MicronetError if there are no such scales.
    """
    free = channels.groups.keys() - channels.pinned.keys()
    scales = [scale for scale, ids in _scales(model, channels) if set(groups_of(ids)) & free]
    if not scales:
        raise MicronetError(
            "no batch norm in this network scales prunable channels, so there is nothing to penalize; use "
            "--criterion l2 to penalize weights"
        )

    @torch.no_grad()
    def add() -> None:
        for scale in scales:
            if scale.grad is not None:
                scale.grad.add_(scale.sign(), alpha=s)

    return add


def _scales(model: nn.Module, channels: ChannelMap) -> list[tuple[nn.Parameter, Ids]]:
    """Return the scales of batch norms, with the channels that they scale."""
    norms = [(model.get_submodule(name), ids) for name, ids in channels.norms.items()]
    scales = [(norm.weight, ids) for norm, ids in norms if isinstance(norm, ops.BATCH_NORMS)]
    return [(scale, ids) for scale, ids in scales if isinstance(scale, nn.Parameter)]
