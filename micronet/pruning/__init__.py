"""Channel pruning: find groups of channels, score them, plan which to cut, and cut them out of the weights."""
