"""TensorRT and TensorRT-RTX: engines for NVIDIA GPUs, made from ONNX files and run."""
