"""Training: the loop, its steps, checkpoints, distillation and several processes."""
