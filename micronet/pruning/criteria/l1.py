"""Scores by the L1 norm of a channel's weights (Li et al. 2017, arXiv:1608.08710, section 3.1)."""

from functools import partial

from micronet.pruning.criteria.weights import WHY_UNSCORED, penalize_rows, score_rows

__all__ = ["WHY_UNSCORED", "penalty", "scores"]

scores = partial(score_rows, score=lambda rows: rows.abs().sum(1))
penalty = partial(penalize_rows, subgradient=lambda rows: rows.sign())
