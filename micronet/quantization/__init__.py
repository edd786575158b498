"""Quantizers, where they are placed, and the procedures over them. Knows nothing of pruning."""
