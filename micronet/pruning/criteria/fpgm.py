"""Scores by the total distance of a channel's weights to those of the other channels.

The other filters can replace one that lies near their geometric median (He et al. 2019, arXiv:1811.00250, equation 4).
"""

from functools import partial

import torch

from micronet.pruning.criteria.weights import WHY_UNSCORED, score_rows

__all__ = ["WHY_UNSCORED", "scores"]

scores = partial(score_rows, score=lambda rows: torch.cdist(rows, rows).sum(1))
