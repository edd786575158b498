"""Quantization schemes, one per file: the weight quantizer and the activation quantizer."""
