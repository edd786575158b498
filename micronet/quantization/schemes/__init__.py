"""Quantization schemes, one paper each: functions that make a weight's and an activation's quantizer."""
