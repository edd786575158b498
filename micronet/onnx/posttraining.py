"""Post-training quantization of float ONNX models from any source, for ONNX Runtime or TensorRT.

The ranges come from histograms (four calibrators, O(bins) memory per tensor) or from a TensorRT calibration cache.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx import helper
from onnx_ir.passes.common import LiftSubgraphInitializersToMainGraphPass, RemoveUnusedNodesPass
from onnxruntime import GraphOptimizationLevel

from micronet.errors import MicronetError, by_reason, first_line, listed
from micronet.onnx.constants import free_name
from micronet.onnx.feeds import Feed
from micronet.onnx.float_nodes import layers_inside
from micronet.onnx.insertion import Insertion, ValueRange
from micronet.onnx.integer_plan import NO_RANGE, Plan, Planner
from micronet.onnx.ops import CONTROL, DEQUANTIZE, QUANTIZE, WEIGHTED_OPS
from micronet.onnx.sessions import run_feed
from micronet.onnx.simplify import simplify
from micronet.onnx.stored import content_key
from micronet.onnx.weight_layout import keep_in_float
from micronet.quantization.config import Calibrator
from micronet.quantization.histogram import GridSpec, Histogram, find_range
from micronet.runtimes.onnxruntime import check_size, exposing_session, optimize

OLDEST_IR = 4  # the first whose stored tensors need not be inputs
OLDEST_OPSET = 13  # the first with per-channel scales
INT8_MAX = 127
_LISTED = 3  # layers named for each reason
_FUSED = re.compile(r"(/(MatMulAdd|GemmTranspose|GemmSum)Fusion/?)+(_token_\d+)?$")  # what ONNX Runtime adds to names


def is_quantized(proto: onnx.ModelProto) -> bool:
    """Return True if a model has Q/DQ nodes or integer operators."""
    ops = {node.op_type for node in proto.graph.node}
    return bool(ops & {QUANTIZE, DEQUANTIZE, "QLinearConv", "ConvInteger", "MatMulInteger"})


def check_stored(proto: onnx.ModelProto) -> None:
    """Raise MicronetError for NaN, or for infinities in weights, or if the weights exceed one protobuf message.

    Other constants may be infinite, for example the masks of attention.
    """
    check_size(sum(len(tensor.raw_data) for tensor in proto.graph.initializer))
    weights = {name for node in proto.graph.node if node.op_type in WEIGHTED_OPS for name in node.input[1:]}
    for tensor in proto.graph.initializer:
        if tensor.data_type not in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE):
            continue
        array = onnx.numpy_helper.to_array(tensor)
        if np.isnan(array).any() or (tensor.name in weights and not np.isfinite(array).all()):
            raise MicronetError(
                f"the model's tensor {tensor.name} contains NaN or infinity; export the model again from finite weights"
            )


def prepare(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return a float model with its batch norms and constants folded, and operators that have integer forms.

    Raises MicronetError if it is quantized, holds NaN, or has an old opset and cannot be converted.
    """
    if is_quantized(proto):
        raise MicronetError("the model is already quantized; pass the float model instead")
    check_stored(proto)
    proto = _with_fixed_weights(proto)
    _name_nodes(proto.graph.node)
    opset = next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
    if opset < OLDEST_OPSET:
        try:
            proto = onnx.version_converter.convert_version(proto, OLDEST_OPSET)
        except Exception as error:  # the converter's errors share no base class
            raise MicronetError(
                f"the model has opset {opset} and cannot be converted to opset {OLDEST_OPSET} ({first_line(error)}); "
                f"export it again with opset {OLDEST_OPSET} or later"
            ) from error
    optimized = optimize(proto.SerializeToString(), GraphOptimizationLevel.ORT_ENABLE_BASIC)
    if any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in optimized.graph.initializer):
        # Casts to float32, which it adds after it has folded constants; the next run folds those of weights.
        optimized = optimize(optimized.SerializeToString(), GraphOptimizationLevel.ORT_ENABLE_BASIC)
    _clear_shared_axes(optimized.graph)
    try:
        folded = ir.from_proto(optimized)
        _name_nodes(folded.graph)
        if any(node.op_type in CONTROL for node in folded.graph):  # ONNX Runtime folds weights once per branch
            LiftSubgraphInitializersToMainGraphPass()(folded)
            _merge_equal(folded.graph)
        _complete_types(folded)
        simplify(folded.graph)
        RemoveUnusedNodesPass()(folded)
        prepared = ir.to_proto(folded)
    except ir.serde.SerdeError as error:  # of a file that ONNX Runtime reads, but onnx_ir does not
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise MicronetError(f"the model is damaged ({first_line(cause)}); export it again") from error
    helper.set_model_props(prepared, {entry.key: entry.value for entry in proto.metadata_props})
    return prepared


def _clear_shared_axes(graph: onnx.GraphProto) -> None:
    """Leave out names of axes that several outputs share and no input has, in place.

    TorchScript's exporter gives the levels of a pyramid the same names, and ONNX Runtime may then reuse memory of
    another size.
    """

    def sizes(value: onnx.ValueInfoProto) -> Any:
        return [size for size in value.type.tensor_type.shape.dim if size.dim_param]

    given = {size.dim_param for value in graph.input for size in sizes(value)}
    number = Counter(name for value in graph.output for name in {size.dim_param for size in sizes(value)} - given)
    for value in (*graph.output, *graph.value_info):
        for size in sizes(value):
            if number[size.dim_param] > 1:
                size.ClearField("dim_param")


def _name_nodes(nodes: Iterable[Any]) -> None:
    """Name the nodes that have no name, and those that ONNX Runtime has fused as what they were before, in place."""
    taken = {node.name for node in nodes}
    for index, node in enumerate(nodes):
        name = _FUSED.sub("", node.name or "") or f"{node.op_type}_{index}"
        if name != node.name:
            node.name = free_name(name, taken)
            taken.add(node.name)


def _merge_equal(graph: ir.Graph) -> None:
    """Store equal tensors once, in place."""
    first: dict[tuple[Any, ...], ir.Value] = {}
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or tensor.dtype == ir.DataType.STRING or value.is_graph_output() or value.is_graph_input():
            continue
        kept = first.setdefault((tensor.dtype, *content_key(tensor.numpy())), value)
        if kept is not value:
            value.replace_all_uses_with(kept)
            graph.initializers.pop(str(value.name))


def _with_fixed_weights(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy whose stored tensors are no inputs as well, as in old files: nothing could be folded into them."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(proto)
    stored = {tensor.name for tensor in proto.graph.initializer}
    del fixed.graph.input[:]
    fixed.graph.input.extend(entry for entry in proto.graph.input if entry.name not in stored)
    fixed.ir_version = max(proto.ir_version, OLDEST_IR)
    return fixed


def _complete_types(model: ir.Model) -> None:
    """Ask ONNX Runtime for the types and shapes that its optimizer did not write."""
    values = {str(value.name): value for node in model.graph for value in node.outputs if value.name}
    session = exposing_session(ir.to_proto(model), values.keys() - {value.name for value in model.graph.outputs})
    for found in session.get_outputs():
        value = values.get(found.name)
        if value is not None and value.dtype is None and found.type == "tensor(float)":
            value.dtype = ir.DataType.FLOAT
            if value.shape is None and found.shape:  # an unknown rank looks like that of a scalar
                value.shape = ir.Shape(found.shape)


def activations(proto: onnx.ModelProto, *, signed: bool = False) -> list[str]:
    """Return the tensors of a model from ``prepare`` that are to be quantized, in order."""
    return [str(value.name) for value in _planned(ir.from_proto(proto), signed).roots]


def left_float(
    proto: onnx.ModelProto,
    *,
    signed: bool = False,
    allowed: Collection[str] | None = None,
    excluded: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Return the layers that stay in float: name -> reason.

    ``allowed``: the tensors that have ranges; None: all. ``excluded``: layers to leave in float -> why.
    """
    constrained, free = (_planned(ir.from_proto(proto), signed, names, excluded).floats for names in (allowed, None))
    return {**constrained, **free}


def _planned(
    model: ir.Model,
    signed: bool,
    allowed: Collection[str] | None = None,
    excluded: Mapping[str, str] | None = None,
) -> Plan:
    return Planner(model.graph, signed, allowed, excluded).plan()


def collect(proto: onnx.ModelProto, feeds: Iterable[Feed], *, signed: bool = False) -> dict[str, Histogram]:
    """Return a histogram of every tensor that is to be quantized.

    Args:
        proto: A float model from ``prepare``.
        feeds: The inputs of each run, by name; at least one.
        signed: For TensorRT.
    """
    plan = _planned(ir.from_proto(proto), signed)
    names = [str(value.name) for value in plan.roots]
    if not names:
        raise MicronetError(_nothing(plan))
    given = {entry.name for entry in proto.graph.input}
    visible = {output.name for output in proto.graph.output} | given
    session = exposing_session(proto, [name for name in names if name not in visible])
    outputs = [output.name for output in session.get_outputs()]
    histograms: dict[str, Histogram] = {name: Histogram() for name in names}
    empty = True
    for feed in feeds:
        values = dict(zip(outputs, run_feed(session, feed), strict=True)) | feed
        empty = False
        for name in names:
            histograms[name].add(torch.from_numpy(np.ascontiguousarray(values[name])))
    if empty:
        raise MicronetError("no calibration inputs; pass at least one")
    return histograms


def find_ranges(
    histograms: Mapping[str, Histogram], calibrator: Calibrator, percentile: float, *, signed: bool = False
) -> dict[str, ValueRange]:
    """Return the range of every tensor for 8 bits, except those that held NaN or infinity: they stay in float."""
    grid = GridSpec(-INT8_MAX - 1, INT8_MAX, True) if signed else GridSpec(0, 255, False)
    found = ((name, find_range(item, grid, calibrator, percentile)) for name, item in histograms.items())
    ranges = {name: ends for name, ends in found if np.isfinite(ends).all()}
    if not ranges:
        raise MicronetError("calibration found NaN or infinity in every tensor; check the model's weights and inputs")
    return ranges


def quantize_onnx(
    proto: onnx.ModelProto,
    ranges: Mapping[str, ValueRange],
    *,
    signed: bool,
    per_channel: bool,
    bits: int,
    excluded: Mapping[str, str] | None = None,
) -> onnx.ModelProto:
    """Quantize a float model: int8 weights, and Q/DQ on the tensors between operators that run in integers.

    Args:
        proto: A float model from ``prepare``.
        ranges: The ranges of its ``activations``, by name; what reads or writes a tensor without one stays in float.
        signed: Symmetric int8 activations and float biases, for TensorRT; otherwise asymmetric uint8, for ONNX Runtime.
        per_channel: One weight scale per output channel instead of one per layer.
        bits: 7 or 8, of the weights.
        excluded: Layers to leave in float -> why.

    Raises:
        MicronetError: No layer can be quantized.
    """
    model = ir.from_proto(proto)
    plan = _planned(model, signed, ranges.keys(), excluded)
    if not any(node.op_type in WEIGHTED_OPS for node in plan.nodes):
        raise MicronetError(_nothing(plan))
    Insertion(model.graph, plan, ranges, signed, per_channel, bits).write()
    model.graph.sort()
    if not signed:
        keep_in_float(model.graph)
    RemoveUnusedNodesPass()(model)
    quantized = ir.to_proto(model)
    helper.set_model_props(quantized, {entry.key: entry.value for entry in proto.metadata_props})
    return quantized


def _nothing(plan: Plan) -> str:
    """Return why nothing could be quantized."""
    if not plan.floats:
        return "the model has no convolution or matrix product with stored weights; leave it in float"
    if set(plan.floats.values()) == {NO_RANGE}:
        return (
            "none of the ranges match a tensor in this model; they belong to another network, or to another export "
            "of this one; calibrate again"
        )
    reasons = by_reason(plan.floats)
    inside = next((kind for kind in CONTROL if layers_inside(kind) in reasons), None)
    cure = f"; export the model without {inside}, for one value of what it depends on" if inside else ""
    named = "; ".join(f"{listed(names, _LISTED)} ({why})" for why, names in reasons.items())
    return f"none of the model's layers can be quantized: {named}{cure}"
