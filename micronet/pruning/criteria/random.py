"""Channels judged by chance, the same every time: what any criterion must do better than."""

import numpy as np
from torch import nn

from micronet.pruning.criteria.rows import WHY_UNJUDGED, Scores
from micronet.pruning.flow import Flow

__all__ = ["WHY_UNJUDGED", "scores"]


def scores(model: nn.Module, flow: Flow) -> Scores:
    """Return (channels,) scores of every group."""
    draw = np.random.default_rng(0)
    return {group: draw.random(width) for group, width in flow.widths.items()}
