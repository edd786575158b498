"""Criteria, one per file: how channels are scored, and the training penalty that separates the scores."""

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import nn

from micronet.pruning.channel_map import ChannelMap

Scores = Mapping[int, NDArray[np.float64]]  # group -> (channels,); higher = keep
Penalty = Callable[[], None]  # adds to the gradients, before an optimizer's step


class Criterion(Protocol):
    """What a criterion's module has. For sparse training it also has ``penalty(model, channels, s) -> Penalty``.

    ``WHY_UNSCORED`` says why a group may be missing from the scores.
    """

    WHY_UNSCORED: str

    def scores(self, model: nn.Module, channels: ChannelMap) -> Scores:
        """Return the scores of the groups that can be scored."""
