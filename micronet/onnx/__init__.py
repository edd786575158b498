"""ONNX files: export, lint, post-training quantization, graph rewriting."""
