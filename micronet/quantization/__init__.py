"""Quantizers, their placement, and the procedures over them: calibration, recovery, folding."""
