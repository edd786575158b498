"""Training: the loop, one step, checkpoints, several processes."""
