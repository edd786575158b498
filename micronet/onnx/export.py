"""Export an artifact to an ONNX model whose weights are integers.

Batch norms are folded. Quantized layers hold an int8 weight, its scale and zero point, and an int32 bias. Activations
go through QuantizeLinear and DequantizeLinear (Q/DQ) in the form that the target fuses: unsigned for ONNX Runtime on
x86, signed for TensorRT. Every node has a zero-point initializer of its own.
"""

import copy
import json
from contextlib import nullcontext
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import Tensor, nn

from micronet.artifact.artifact import Artifact, versions
from micronet.artifact.header import StageRecord
from micronet.core.progress import Progress
from micronet.data.dataset import DataSpec
from micronet.errors import MicronetError
from micronet.models.device import Inputs, head
from micronet.models.inputs import TORCHSCRIPT
from micronet.onnx import operators, rewrite
from micronet.onnx.channel_padding import pad_depthwise
from micronet.onnx.config import ExportConfig
from micronet.onnx.gates import quantize_gates
from micronet.onnx.graph_export import export_graph, without_stacks
from micronet.onnx.low_bits import pack_weights, to_int4
from micronet.onnx.moves import quantize_before_concats, requantize_moves
from micronet.onnx.sharing import share_weights
from micronet.onnx.simplify import simplify
from micronet.onnx.weight_layout import (
    keep_in_float,
    quantize_biases,
    store_transposed_in_float,
    transpose_weights,
)
from micronet.quantization.calibrate import check_calibrated, each_quantizer
from micronet.quantization.fold import fold_if_any, shares_scales
from micronet.quantization.functional import dequantize, int8_grid, to_integers
from micronet.quantization.layers import ACTIVATION_SLOTS, drop_parametrizations
from micronet.quantization.quantizer import Quantizer
from micronet.quantization.schemes.wbwtab import SignQuantizer
from micronet.runtimes.onnxruntime import METADATA_KEY, check_size

SIXTEEN_BITS_OPSET = 21


def to_onnx(
    artifact: Artifact,
    images: Tensor | Inputs,
    config: ExportConfig | None = None,
    *,
    pairs: bool = True,
    gates: bool = True,
    progress: Progress | None = None,
) -> onnx.ModelProto:
    """Export an artifact to an ONNX model.

    Args:
        artifact: The float or quantized network.
        images: (N, C, H, W) float32, or the inputs of another network; they fix the sizes of the axes that are not
            dynamic.
        config: Target, opset and storage; default: for ONNX Runtime.
        pairs: Add the Q/DQ pairs that the network does not have but ONNX Runtime needs to compute in integers.
        gates: With ``pairs``, also those inside SiLU and hardswish, each of which may move a result by a step.
        progress: Where to report the phases.

    Raises:
        MicronetError: Torch cannot export the network, a quantizer has no range, or the target does not support its
            integers.
    """
    config = config or ExportConfig()
    if config.embed_preprocessing:
        rewrite.check_preprocessing(DataSpec.from_json(artifact.data))
    _check_scripted(artifact.model)
    check_calibrated(artifact.model)
    quantized = _check_bits(artifact.model, config)
    model = with_integers(
        _folded(artifact.model, head(images, 2)), artifact.history, signed=config.target == "tensorrt"
    )
    check_size(_stored_bytes(model))
    with without_stacks() if pairs else nullcontext():  # else ``tidy`` reads the lines
        exported = export_graph(model, images, config, progress)
    _adapt(exported, config, quantized=quantized, pairs=pairs, gates=gates)
    proto = _as_proto(exported, artifact, images, config)
    if quantized and config.target == "ort" and pairs:
        proto = share_weights(proto)
    if config.low_bit_storage:
        proto = pack_weights(proto)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def _as_proto(exported: ir.Model, artifact: Artifact, images: Tensor | Inputs, config: ExportConfig) -> onnx.ModelProto:
    """Return an exported model with its metadata, in half precision or with the preprocessing if that is wanted."""
    proto = ir.to_proto(exported)
    del proto.graph.value_info[:]  # readers infer the shapes themselves
    about = _about(artifact)
    if config.precision == "fp16":
        if isinstance(images, Inputs) or not images.is_floating_point():
            raise MicronetError("--precision fp16 only supports networks with a single float input; drop --precision")
        proto, about["kept_float32"] = rewrite.to_half(proto, images.numpy())
    if config.embed_preprocessing:
        proto = rewrite.embed_preprocessing(proto, DataSpec.from_json(artifact.data or {}))
    onnx.helper.set_model_props(proto, {METADATA_KEY: json.dumps(about, sort_keys=True)})
    return proto


def _check_scripted(model: nn.Module) -> None:
    """Raise MicronetError if a module is TorchScript: torch's exporter needs its Python code."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise MicronetError(
                f"torch cannot export this network to ONNX: {name or 'it'} is {TORCHSCRIPT}; use the Python module "
                "that it was made from"
            )


def _about(artifact: Artifact) -> dict[str, Any]:
    """Return what a reader of the file needs to know of the network, in JSON values."""
    return {
        "model": artifact.spec.name,
        "model_args": artifact.spec.args,
        "history": [{"stage": record.stage, "config": record.config} for record in artifact.history],
        "data": artifact.data,
        "versions": versions(),
        "left_float": artifact.left_float,
    }


def _check_bits(model: nn.Module, config: ExportConfig) -> bool:
    """Return True if a network has quantizers; raise MicronetError if their bits do not fit the other settings."""
    widest = max((quantizer.bits for _, _, quantizer in each_quantizer(model)), default=0)
    if widest and config.precision == "fp16":
        raise MicronetError(
            "--precision fp16 only applies to float networks, but this one is quantized; drop --precision"
        )
    if widest > operators.INT8_BITS and config.opset < SIXTEEN_BITS_OPSET:
        raise MicronetError(f"{widest}-bit quantizers need --opset {SIXTEEN_BITS_OPSET} or later; got {config.opset}")
    return widest > 0


def _adapt(model: ir.Model, config: ExportConfig, *, quantized: bool, pairs: bool, gates: bool) -> None:
    """Rewrite an exported graph, in place, into the form that its target fuses; see ``to_onnx``."""
    rewrite.tidy(model, keep_lines=not pairs)
    if quantized:
        rewrite.clip_before_pools(model)
    if quantized and config.target == "ort" and pairs:
        _add_pairs(model, gates=gates)
    if config.target == "tensorrt":
        rewrite.quantize_after_reshapes(model)
    if config.int4_storage:
        to_int4(model)


def _add_pairs(model: ir.Model, *, gates: bool = True) -> None:
    transpose_weights(model.graph)
    simplify(model.graph, {"ReduceMean"})
    quantize_before_concats(model)
    requantize_moves(model)
    if gates:
        quantize_gates(model)
    store_transposed_in_float(model.graph)
    rewrite.store_quantized(model.graph)
    quantize_biases(model.graph)
    keep_in_float(model.graph)
    rewrite.unshare_initializers(model.graph)
    pad_depthwise(model.graph)
    RemoveUnusedNodesPass()(model)


def with_pairs(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model that was exported with ``pairs=False`` as it would be with them."""
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    _add_pairs(model)
    return ir.to_proto(model)


def with_integers(model: nn.Module, history: list[StageRecord], *, signed: bool = False) -> nn.Module:
    """Replace the quantizers of a folded model, in place, by modules that hold integers; return the model.

    Args:
        model: The model, its batch norms folded.
        history: The artifact's records; ``quantize``'s says which quantizer feeds which layer.
        signed: For TensorRT: int8 activations, and float biases because TensorRT cannot dequantize int32.
    """
    inputs: dict[str, str | None] = next(
        (record.result.get("inputs", {}) for record in history if record.stage == "quantize"), {}
    )
    scales = {
        f"{name}.{slot}": quantizer.qparams(torch.empty(0)).scale
        for name, slot, quantizer in each_quantizer(model)
        if slot in ACTIVATION_SLOTS and not isinstance(quantizer, SignQuantizer)
    }
    for name, slot, quantizer in list(each_quantizer(model)):
        layer: Any = model.get_submodule(name)
        if slot == "weight_quantizer":
            drop_parametrizations(layer)
            if signed:
                operators.require_int8(int8_grid(quantizer.qparams(layer.weight)), f"{name}.{slot}")
            _store_weight(layer, quantizer, None if signed else scales.get(inputs.get(name) or ""))
        elif isinstance(quantizer, SignQuantizer):
            setattr(layer, slot, operators.Sign())
        else:
            qparams = quantizer.qparams(torch.empty(0))
            setattr(layer, slot, operators.ActivationQDQ(qparams, quantizer.bits, f"{name}.{slot}", signed=signed))
    return model


def _stored_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's tensors, without the floats in whose place it holds integers."""
    replaced = {
        getattr(layer, slot.removesuffix("_quantizer"))
        for layer in model.modules()
        for slot in ("weight_quantizer", "bias_quantizer")
        if isinstance(getattr(layer, slot, None), operators.StoredIntegers)
    }
    tensors = (each for each in (*model.parameters(), *model.buffers()) if each not in replaced)
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


@torch.no_grad()
def _store_weight(layer: Any, quantizer: Quantizer, input_scale: Tensor | None) -> None:
    """Store a layer's weight as integers, and its bias too if the input's scale is known.

    The floats stay for a forward that reads them elsewhere, such as a decoder with the encoder's weight.
    """
    weight, bias = layer.weight, layer.bias
    qparams = quantizer.qparams(weight)
    values = dequantize(quantizer.integers(weight), qparams)
    qparams = int8_grid(qparams)
    if bias is not None and input_scale is not None and not shares_scales(layer):
        scales = operators.bias_scales(qparams.scale, input_scale, bias)
        qparams = qparams._replace(scale=scales.weight)
        q = (bias.double() / scales.bias.double()).round().to(torch.int32)
        layer.bias_quantizer = operators.StoredIntegers(q, scales.bias, torch.zeros_like(q), 0)
    dtype = next(each for each in (torch.int8, torch.int16, torch.int32) if qparams.qmax <= torch.iinfo(each).max)
    q = to_integers(values, qparams).to(dtype)
    layer.weight_quantizer = operators.StoredIntegers(q, qparams.scale, qparams.zero_point, qparams.axis)


def _folded(model: nn.Module, example: Tensor | Inputs) -> nn.Module:
    """Return a contiguous copy on the CPU, in eval mode, with batch norms folded into the layers before them."""
    model = copy.deepcopy(model).cpu().eval().to(memory_format=torch.contiguous_format)
    return fold_if_any(model, example)
