"""The criterion ``auto``: batch-norm scales where they rank every channel that may be cut, otherwise weight norms."""

from torch import nn

from micronet.pruning.channel_map import ChannelMap
from micronet.pruning.config import PruneConfig
from micronet.pruning.criteria import Scores, bn_scale, l2
from micronet.pruning.plan import excluded_groups


def choose_criterion(model: nn.Module, channels: ChannelMap, config: PruneConfig) -> tuple[str, Scores]:
    """Return ``bn-scale``, or ``l2`` if channels that may be cut have no batch norm with a scale, and its scores."""
    by_scale, by_weights = bn_scale.scores(model, channels), l2.scores(model, channels)
    whole = channels.pinned.keys() | excluded_groups(channels, config)
    return ("bn-scale", by_scale) if by_weights.keys() - whole <= by_scale.keys() else ("l2", by_weights)
