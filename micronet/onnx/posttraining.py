"""Float ONNX models made int8 from data alone, whoever made them: ONNX Runtime's quantizer, our ranges.

The ranges come from our histograms (all four calibrators, memory O(bins)) or from a calibration cache of TensorRT.
"""

import re
import struct
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper

from micronet.errors import MicronetError, first_line
from micronet.quantization.histogram import Calibrator, Grid, Histogram, find_range
from micronet.runtimes.config import RuntimeOptions
from micronet.runtimes.onnxruntime import check_size, image_input, open_session, run

Range = tuple[float, float]
QUANTIZED = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "MaxPool", "AveragePool", "GlobalAveragePool", "Concat")
OLDEST_OPSET = 13  # scales of a weight's channels
INT8_MAX = 127
LEGACY_HEADER = "TRT-"
LEGACY_LINE = re.compile(r"\s*(?P<name>\S.*?)\s*:\s*(?P<scale>[0-9a-fA-F]{1,8})\s*")
LEAST_SCALE, GREATEST_SCALE = 2.0**-126, 2.0**120  # normal float32, and 127 of it too


def is_quantized(proto: onnx.ModelProto) -> bool:
    """Tell whether a model has Q/DQ nodes or integer operators already."""
    kinds = {node.op_type for node in proto.graph.node}
    return bool(kinds & {"QuantizeLinear", "DequantizeLinear", "QLinearConv", "ConvInteger", "MatMulInteger"})


def check_stored(proto: onnx.ModelProto) -> None:
    """Raise MicronetError where a stored tensor holds NaN or infinity, or all are too many for one message."""
    check_size(sum(len(tensor.raw_data) for tensor in proto.graph.initializer))
    for tensor in proto.graph.initializer:
        if (
            tensor.data_type in (TensorProto.FLOAT, TensorProto.FLOAT16)
            and not np.isfinite(onnx.numpy_helper.to_array(tensor)).all()
        ):
            raise MicronetError(f"{tensor.name} of the model holds NaN or infinity; train it anew with a lower --lr")


def prepare(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return a float model with its batch norms and constants folded, by ONNX Runtime.

    Raises MicronetError where the model is of an operator set too old to hold a scale a channel, or is quantized.
    """
    if is_quantized(proto):
        raise MicronetError("the model is quantized already; give the float one")
    check_stored(proto)
    opset = next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
    if opset < OLDEST_OPSET:
        try:
            proto = onnx.version_converter.convert_version(proto, OLDEST_OPSET)
        except Exception as error:  # the converter's errors share no base class
            raise MicronetError(
                f"the model is of opset {opset}, too old, and cannot be converted: {first_line(error)}; "
                f"export it anew with opset {OLDEST_OPSET} or later"
            ) from error
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "folded.onnx"
        settings = onnxruntime.SessionOptions()
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        settings.optimized_model_filepath = str(path)
        settings.log_severity_level = 3
        try:
            onnxruntime.InferenceSession(proto.SerializeToString(), settings, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise MicronetError(f"ONNX Runtime cannot run the model: {first_line(error)}") from error
        folded = onnx.load(path)
    helper.set_model_props(folded, {entry.key: entry.value for entry in proto.metadata_props})
    return folded


def collect(proto: onnx.ModelProto, batches: Iterable[NDArray[np.float32]]) -> dict[str, Histogram]:
    """Return a histogram of every float tensor that a quantizable node reads or gives, over normalised images.

    Raises MicronetError where there was no batch.
    """
    names = _activations(proto)
    exposed = onnx.ModelProto()
    exposed.CopyFrom(proto)
    known = {output.name for output in proto.graph.output}
    images_name = image_input(proto).name
    inner = [name for name in names if name not in known and name != images_name]
    exposed.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in inner)
    session = open_session(exposed.SerializeToString(), RuntimeOptions(), "the model")
    order = [output.name for output in session.get_outputs()]
    found: dict[str, Histogram] = {name: Histogram() for name in names}
    batches = iter(batches)
    for images in batches:
        values = dict(zip(order, run(session, images), strict=True)) | {images_name: images}
        for name in names:
            found[name].add(torch.from_numpy(np.ascontiguousarray(values[name])))
    if any(histogram.empty for histogram in found.values()):
        raise MicronetError("there was no image to calibrate on; give at least one")
    return found


def find_ranges(
    histograms: Mapping[str, Histogram], calibrator: Calibrator, percentile: float, *, symmetric: bool
) -> dict[str, Range]:
    """Return every tensor's (low, high) for 8 bits. Raises MicronetError where NaN or infinity was seen."""
    grid = Grid(-INT8_MAX - 1, INT8_MAX, True) if symmetric else Grid(0, 255, False)
    ranges = {name: find_range(item, grid, calibrator, percentile) for name, item in histograms.items()}
    if broken := [name for name, ends in ranges.items() if not np.isfinite(ends).all()]:
        raise MicronetError(f"NaN or infinity reached {', '.join(broken[:5])} while calibrating")
    return ranges


def read_legacy_cache(path: Path) -> dict[str, Range]:
    """Read a calibration cache as TensorRT wrote them up to version 10: ``TRT-…`` and ``name: hex float`` lines.

    The number is the scale, a float32's bytes in hexadecimal, big end first; a range is 127 of them to either side.
    Raises MicronetError where the file is none, or a line of it is damaged.
    """
    try:
        header, *lines = path.read_text().splitlines()
    except (UnicodeDecodeError, ValueError) as error:
        raise MicronetError(f"{path} is no calibration cache; its first line would be TRT-…-EntropyCalibration2") from (
            error
        )
    if not header.startswith(LEGACY_HEADER):
        raise MicronetError(f"{path} is no calibration cache of TensorRT; its first line is {header[:40]!r}")
    ranges: dict[str, Range] = {}
    for number, line in enumerate(filter(str.strip, lines), 2):
        match = LEGACY_LINE.fullmatch(line)
        scale = struct.unpack(">f", bytes.fromhex(match["scale"].rjust(8, "0")))[0] if match else 0.0
        if match is not None and scale == 0:  # nothing but zeros was seen: no range
            continue
        if match is None or not LEAST_SCALE <= scale <= GREATEST_SCALE or match["name"] in ranges:
            raise MicronetError(f"{path}, line {number}: {line[:60]!r} is no 'name: hexadecimal float' of its own")
        ranges[match["name"]] = (-INT8_MAX * scale, INT8_MAX * scale)
    if not ranges:
        raise MicronetError(f"{path} holds no range")
    return ranges


def quantize(
    proto: onnx.ModelProto, ranges: Mapping[str, Range], *, signed: bool, symmetric: bool, per_channel: bool, bits: int
) -> onnx.ModelProto:
    """Return a float model, as ``prepare`` gives it, with int8 weights and Q/DQ on every activation that has a range.

    ``signed``: int8 activations with zero point 0 and float biases, for TensorRT; else uint8, for ONNX Runtime.
    ``bits``: of weights, 7 or 8. Raises MicronetError where no node has ranges.
    """
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    nodes = [node.name for node in _with_names(proto) if _has_ranges(proto, node, ranges)]
    if not nodes:
        raise MicronetError(
            "no tensor of the model has one of the ranges; they are of another network, whose tensors have other names"
        )
    data = {name: TensorData(lowest=np.float32(low), highest=np.float32(high)) for name, (low, high) in ranges.items()}
    settings = {
        "ActivationSymmetric": symmetric,
        "WeightSymmetric": True,
        "QuantizeBias": not signed,
        "ForceQuantizeNoInputCheck": False,
    }
    quantizer = QDQQuantizer(
        proto, per_channel, bits == INT8_MAX.bit_length(), QuantType.QInt8,
        QuantType.QInt8 if signed else QuantType.QUInt8, TensorsData(CalibrationMethod.MinMax, data), nodes, [],
        list(QUANTIZED), settings,
    )  # fmt: skip
    try:
        quantizer.quantize_model()
    except Exception as error:  # the library raises many kinds for a node that it cannot quantize
        raise MicronetError(f"ONNX Runtime's quantizer cannot do this model: {first_line(error)}") from error
    quantizer.model.topological_sort()
    model: onnx.ModelProto = quantizer.model.model
    helper.set_model_props(model, {entry.key: entry.value for entry in proto.metadata_props})
    return model


def _with_names(proto: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    for index, node in enumerate(proto.graph.node):
        node.name = node.name or f"{node.op_type}_{index}"
        yield node


def _has_ranges(proto: onnx.ModelProto, node: onnx.NodeProto, ranges: Mapping[str, Range]) -> bool:
    stored = {tensor.name for tensor in proto.graph.initializer}
    tensors = [name for name in node.input if name and name not in stored] + [node.output[0]]
    outputs = {output.name for output in proto.graph.output}
    grouped = node.op_type == "ConvTranspose" and any(at.name == "group" and at.i > 1 for at in node.attribute)
    return node.op_type in QUANTIZED and not grouped and all(name in ranges or name in outputs for name in tensors)


def without_range(proto: onnx.ModelProto, ranges: Mapping[str, Range]) -> list[str]:
    """Return the tensors that quantizable nodes read and that have no range, so that those nodes stay float."""
    return [name for name in _activations(proto) if name not in ranges]


def _activations(proto: onnx.ModelProto) -> list[str]:
    """Return the float tensors that quantizable nodes read and give."""
    stored = {tensor.name for tensor in proto.graph.initializer}
    names: dict[str, None] = {}
    for node in proto.graph.node:
        if node.op_type in QUANTIZED:
            names |= dict.fromkeys(name for name in (*node.input, node.output[0]) if name and name not in stored)
    return list(names)
