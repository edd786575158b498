"""Post-training quantization of float ONNX models from any source: ONNX Runtime's quantizer with micronet's ranges.

The ranges come from histograms (four calibrators, O(bins) memory per tensor) or from a TensorRT calibration cache.
"""

import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import helper
from onnxruntime import GraphOptimizationLevel

from micronet.errors import MicronetError, first_line
from micronet.onnx.graph_view import DEQUANTIZE, QUANTIZE
from micronet.quantization.config import Calibrator
from micronet.quantization.histogram import GridSpec, Histogram, find_range
from micronet.runtimes.onnxruntime import WEIGHTED_OPS, check_size, exposing_session, image_input, optimize, run

ValueRange = tuple[float, float]  # the smallest and the largest value that the grid covers
QUANTIZABLE = (*WEIGHTED_OPS, "Add", "MaxPool", "AveragePool", "GlobalAveragePool", "Concat")
OLDEST_OPSET = 13  # the first with per-channel scales
INT8_MAX = 127
LEGACY_HEADER = "TRT-"
LEGACY_LINE = re.compile(r"\s*(?P<name>\S.*?)\s*:\s*(?P<scale>[0-9a-fA-F]{1,8})\s*")
MIN_SCALE, MAX_SCALE = 2.0**-126, 2.0**120  # so that the scale and 127 times the scale are normal float32


def is_quantized(proto: onnx.ModelProto) -> bool:
    """Return True if a model has Q/DQ nodes or integer operators."""
    ops = {node.op_type for node in proto.graph.node}
    return bool(ops & {QUANTIZE, DEQUANTIZE, "QLinearConv", "ConvInteger", "MatMulInteger"})


def check_stored(proto: onnx.ModelProto) -> None:
    """Raise MicronetError if a stored tensor holds NaN or infinity, or if the weights exceed one protobuf message."""
    check_size(sum(len(tensor.raw_data) for tensor in proto.graph.initializer))
    for tensor in proto.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise MicronetError(
                f"the model's tensor {tensor.name} contains NaN or infinity; export the model again from finite weights"
            )


def prepare(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return a float model with its batch norms and constants folded by ONNX Runtime.

    Raises MicronetError if it is quantized, holds NaN or infinity, or has an old opset and cannot be converted.
    """
    if is_quantized(proto):
        raise MicronetError("the model is already quantized; pass the float model instead")
    check_stored(proto)
    opset = next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
    if opset < OLDEST_OPSET:
        try:
            proto = onnx.version_converter.convert_version(proto, OLDEST_OPSET)
        except Exception as error:  # the converter's errors share no base class
            raise MicronetError(
                f"the model has opset {opset} and cannot be converted to opset {OLDEST_OPSET} ({first_line(error)}); "
                f"export it again with opset {OLDEST_OPSET} or later"
            ) from error
    folded = optimize(proto.SerializeToString(), GraphOptimizationLevel.ORT_ENABLE_BASIC)
    helper.set_model_props(folded, {entry.key: entry.value for entry in proto.metadata_props})
    return folded


def collect(proto: onnx.ModelProto, batches: Iterable[NDArray[np.float32]]) -> dict[str, Histogram]:
    """Return a histogram of every float tensor that a quantizable node reads or writes.

    Args:
        proto: A float model from ``prepare``.
        batches: Normalized images, (N, C, H, W) float32; at least one batch.
    """
    names = activations(proto)
    images_name = image_input(proto).name
    visible = {output.name for output in proto.graph.output} | {images_name}
    session = exposing_session(proto, [name for name in names if name not in visible])
    outputs = [output.name for output in session.get_outputs()]
    histograms: dict[str, Histogram] = {name: Histogram() for name in names}
    for images in batches:
        values = dict(zip(outputs, run(session, images), strict=True)) | {images_name: images}
        for name in names:
            histograms[name].add(torch.from_numpy(np.ascontiguousarray(values[name])))
    if any(histogram.empty for histogram in histograms.values()):
        raise MicronetError("no calibration images; pass at least one")
    return histograms


def find_ranges(
    histograms: Mapping[str, Histogram], calibrator: Calibrator, percentile: float, *, symmetric: bool
) -> dict[str, ValueRange]:
    """Return the range of every tensor for 8 bits; raise MicronetError if one of them held NaN or infinity."""
    grid = GridSpec(-INT8_MAX - 1, INT8_MAX, True) if symmetric else GridSpec(0, 255, False)
    ranges = {name: find_range(item, grid, calibrator, percentile) for name, item in histograms.items()}
    if broken := [name for name, ends in ranges.items() if not np.isfinite(ends).all()]:
        raise MicronetError(
            f"calibration found NaN or infinity in {', '.join(broken[:5])}; check the model's weights and the images"
        )
    return ranges


def read_legacy_cache(path: Path) -> dict[str, ValueRange]:
    """Read a calibration cache of TensorRT 10 or earlier; raise MicronetError if it is damaged or another file.

    A ``TRT-…`` header precedes ``name: scale`` lines. The scale is a float32 as big-endian hexadecimal bytes. A
    tensor's range is 127 scales to either side of 0.
    """
    try:
        header, *lines = path.read_text().splitlines()
    except ValueError as error:  # not UTF-8, or empty
        raise MicronetError(
            f"{path} is not a TensorRT calibration cache, which must start with TRT-…; check the path"
        ) from error
    if not header.startswith(LEGACY_HEADER):
        raise MicronetError(f"{path} is not a TensorRT calibration cache: its first line is {header[:40]!r}, not TRT-…")
    ranges: dict[str, ValueRange] = {}
    for number, line in enumerate(filter(str.strip, lines), 2):
        match = LEGACY_LINE.fullmatch(line)
        scale = struct.unpack(">f", bytes.fromhex(match["scale"].rjust(8, "0")))[0] if match else 0.0
        if match is not None and scale == 0:  # the tensor was always zero, so it has no range
            continue
        if match is None or not MIN_SCALE <= scale <= MAX_SCALE or match["name"] in ranges:
            raise MicronetError(
                f"{path}, line {number} is {line[:60]!r}; expected 'name: hexadecimal float', with no duplicate names"
            )
        ranges[match["name"]] = (-INT8_MAX * scale, INT8_MAX * scale)
    if not ranges:
        raise MicronetError(f"{path} contains no ranges; recreate it")
    return ranges


def quantize_onnx(
    proto: onnx.ModelProto,
    ranges: Mapping[str, ValueRange],
    *,
    signed: bool,
    symmetric: bool,
    per_channel: bool,
    bits: int,
) -> onnx.ModelProto:
    """Quantize a float model: int8 weights, and Q/DQ on every activation that has a range.

    Args:
        proto: A float model from ``prepare``.
        ranges: The range of every activation, by tensor name.
        signed: int8 activations with zero point 0 and float biases, for TensorRT; otherwise uint8, for ONNX Runtime.
        symmetric: Symmetric activation ranges.
        per_channel: One weight scale per output channel instead of one per layer.
        bits: 7 or 8, of the weights.

    Raises:
        MicronetError: No node has ranges for all its tensors, or ONNX Runtime's quantizer fails.
    """
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    nodes = _quantizable_nodes(proto, ranges)
    data = {name: TensorData(lowest=np.float32(low), highest=np.float32(high)) for name, (low, high) in ranges.items()}
    settings = {"ActivationSymmetric": symmetric, "WeightSymmetric": True, "QuantizeBias": not signed}
    quantizer = QDQQuantizer(
        proto, per_channel, bits == INT8_MAX.bit_length(), QuantType.QInt8,
        QuantType.QInt8 if signed else QuantType.QUInt8, TensorsData(CalibrationMethod.MinMax, data), nodes, [],
        list(QUANTIZABLE), settings,
    )  # fmt: skip
    try:
        quantizer.quantize_model()
    except Exception as error:  # the library raises many types
        raise MicronetError(f"ONNX Runtime's quantizer cannot quantize this model: {first_line(error)}") from error
    quantizer.model.topological_sort()
    model: onnx.ModelProto = quantizer.model.model
    helper.set_model_props(model, {entry.key: entry.value for entry in proto.metadata_props})
    return model


def _quantizable_nodes(proto: onnx.ModelProto, ranges: Mapping[str, ValueRange]) -> list[str]:
    """Name every node; return the names of those whose activations all have ranges, or raise MicronetError."""
    known = ranges.keys() | {output.name for output in proto.graph.output}
    stored = {tensor.name for tensor in proto.graph.initializer}
    names = []
    for index, node in enumerate(proto.graph.node):
        node.name = node.name or f"{node.op_type}_{index}"
        grouped = node.op_type == "ConvTranspose" and any(a.name == "group" and a.i > 1 for a in node.attribute)
        if node.op_type in QUANTIZABLE and not grouped and known.issuperset(_tensors(node, stored)):
            names.append(node.name)
    if not names:
        raise MicronetError(
            "none of the ranges match a tensor in this model; they belong to another network, or to another export "
            "of this one; calibrate again"
        )
    return names


def activations(proto: onnx.ModelProto) -> list[str]:
    """Return the float tensors that quantizable nodes read and write, each once."""
    stored = {tensor.name for tensor in proto.graph.initializer}
    nodes = [node for node in proto.graph.node if node.op_type in QUANTIZABLE]
    return list(dict.fromkeys(name for node in nodes for name in _tensors(node, stored)))


def _tensors(node: onnx.NodeProto, stored: set[str]) -> list[str]:
    return [name for name in (*node.input, node.output[0]) if name and name not in stored]
