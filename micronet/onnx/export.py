"""From an artifact to an ONNX model whose weights are integers.

Batch norms are folded, quantized layers hold their int8 weight, scale and zero point and an int32 bias, activations go
through QuantizeLinear and DequantizeLinear in the form the target fuses: unsigned for ONNX Runtime on x86, signed
for TensorRT; one pair a tensor, its own zero-point initialiser for every node.
"""

import copy
import io
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from micronet.artifact.artifact import Artifact, versions
from micronet.artifact.history import StageRecord
from micronet.core.files import write_bytes
from micronet.data.dataset import DataSpec
from micronet.errors import FailedError, MicronetError, first_line
from micronet.graph.trace import trace
from micronet.onnx.config import AXES, ExportConfig
from micronet.onnx.operators import (
    INT8_BITS,
    ActivationGrid,
    Sign,
    StoredIntegers,
    check_signed,
    room_for_bias,
    translations,
)
from micronet.onnx.rewrite import embed_preprocessing, quantize_behind_reshapes, to_half, to_int4
from micronet.onnx.tidy import tidy
from micronet.quantization.calibrate import check_calibrated, each_quantizer
from micronet.quantization.fold import fold_model, foldable_pairs, has_taken_norms, shares_scales
from micronet.quantization.functional import dequantize, quantize, stored
from micronet.quantization.quantizer import Quantizer
from micronet.quantization.schemes.wbwtab import SignQuantizer
from micronet.runtimes.onnxruntime import METADATA_KEY, check_size

INPUT, OUTPUT = "images", "scores"
SIXTEEN_BITS_OPSET = 21


def to_onnx(artifact: Artifact, images: Tensor, config: ExportConfig | None = None) -> onnx.ModelProto:
    """Return an artifact's ONNX model.

    images: (N, C, H, W) float32, any real ones; they fix the axes that are not free.
    Raises MicronetError where torch cannot export the network, a quantizer has no range, or its integers are none that
    the target takes.
    """
    config = config or ExportConfig()
    check_calibrated(artifact.model)
    quantized = any(True for _ in each_quantizer(artifact.model))
    if quantized and config.precision == "fp16":
        raise MicronetError("--precision fp16 is for float networks; this one's integers are smaller already")
    widest = max((quantizer.bits for _, _, quantizer in each_quantizer(artifact.model)), default=0)
    if widest > INT8_BITS and config.opset < SIXTEEN_BITS_OPSET:
        raise MicronetError(f"quantizers of {widest} bits need --opset {SIXTEEN_BITS_OPSET} or later")
    model = with_integers(_folded(artifact.model), artifact.history, signed=config.target == "tensorrt")
    check_size(sum(tensor.nbytes for tensor in model.state_dict().values()))
    proto = _export(model, images, config)
    tidy(proto)
    about = _about(artifact)
    if config.target == "tensorrt":
        quantize_behind_reshapes(proto)
    if config.int4_storage:
        to_int4(proto)
    if config.precision == "fp16":
        proto, about["kept_float32"] = to_half(proto, images.numpy())
    if config.embed_preprocessing:
        embed_preprocessing(proto, DataSpec.from_json(artifact.data or {}))
    onnx.helper.set_model_props(proto, {METADATA_KEY: json.dumps(about, sort_keys=True)})
    onnx.checker.check_model(proto, full_check=True)
    return proto


def write_onnx(proto: onnx.ModelProto, path: Path) -> None:
    """Write an ONNX model, whole or not at all."""
    write_bytes(path, proto.SerializeToString())


def with_integers(model: nn.Module, history: list[StageRecord], *, signed: bool = False) -> nn.Module:
    """Swap the quantizers of a folded model, in place, for modules that hold integers; return the model.

    ``signed``: for TensorRT, with int8 activations, and biases in float, since it dequantizes no int32.
    """
    inputs: dict[str, str | None] = next(
        (record.result["inputs"] for record in history if record.stage == "quantize"), {}
    )
    scales = {
        f"{name}.{slot}": quantizer.qparams(torch.empty(0)).scale
        for name, slot, quantizer in each_quantizer(model)
        if slot in ("input_quantizer", "output_quantizer") and not isinstance(quantizer, SignQuantizer)
    }
    for name, slot, quantizer in list(each_quantizer(model)):
        layer: Any = model.get_submodule(name)
        if slot == "weight_quantizer":
            if signed:
                check_signed(stored(quantizer.qparams(layer.weight)), f"{name}.{slot}")
            _store_weight(layer, quantizer, None if signed else scales.get(inputs.get(name) or ""))
        elif isinstance(quantizer, SignQuantizer):
            setattr(layer, slot, Sign())
        else:
            grid = quantizer.qparams(torch.empty(0))
            setattr(layer, slot, ActivationGrid(grid, quantizer.bits, f"{name}.{slot}", signed=signed))
    return model


@torch.no_grad()
def _store_weight(layer: Any, quantizer: Quantizer, input_scale: Tensor | None) -> None:
    """Put a layer's weight, and its bias where the input's scale is known, into integers."""
    weight, bias = layer.weight, layer.bias
    grid = quantizer.qparams(weight)
    values = dequantize(quantizer.integers(weight), grid)
    grid = stored(grid)
    if bias is not None and input_scale is not None and not shares_scales(layer):
        room = room_for_bias(grid.scale, input_scale, bias)
        grid = grid._replace(scale=room.weight_scale)
        q = (bias.double() / room.bias_scale.double()).round().to(torch.int32)
        layer.bias_quantizer = StoredIntegers(q, room.bias_scale, torch.zeros_like(q), 0)
        layer.bias = nn.Parameter(torch.zeros(0))
    dtype = next(kind for kind in (torch.int8, torch.int16, torch.int32) if grid.qmax <= torch.iinfo(kind).max)
    q = quantize(values, grid).to(dtype)
    layer.weight_quantizer = StoredIntegers(q, grid.scale, grid.zero_point, grid.axis)
    layer.weight = nn.Parameter(torch.zeros(0))  # the float copy must not reach the file


def _folded(model: nn.Module) -> nn.Module:
    """Return a contiguous copy on the CPU, in eval mode, its batch norms folded where they follow a layer."""
    model = copy.deepcopy(model).cpu().eval()
    model = model.to(memory_format=torch.contiguous_format)
    graph = trace(model)
    foldable = graph is not None and (foldable_pairs(graph) or has_taken_norms(model))
    return fold_model(model)[0] if foldable else model


def _export(model: nn.Module, images: Tensor, config: ExportConfig) -> onnx.ModelProto:
    free = {AXES[name]: torch.export.Dim(name) for name in config.free_axes}
    example = images[: 2 if free else 1].contiguous()  # an example of one makes torch write 1 down
    _run(model, example)
    try:
        with _silence(), torch.no_grad():
            program = torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                opset_version=config.opset,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=(free,),
                custom_translation_table=translations(config.opset),
                optimize=True,
                verbose=False,
            )
    except Exception as error:  # the exporter raises many kinds around the one whose first line tells the reason
        free_sides = " with free sides; try --dynamic batch" * (len(free) > 1)
        reason = first_line(error.__cause__ or error)
        raise MicronetError(f"torch cannot export this network to ONNX{free_sides}: {reason}") from error
    if program is None:
        raise FailedError("torch's exporter returned nothing")
    proto: onnx.ModelProto = program.model_proto
    return proto


@contextmanager
def _silence() -> Iterator[None]:
    """Keep torch from logging and printing, over many lines, what its exception tells as well."""
    log = logging.getLogger("torch")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


@torch.no_grad()
def _run(model: nn.Module, images: Tensor) -> None:
    """Raise MicronetError where a network does not take images: of the exporter's many lines none says so plainly."""
    try:
        model(images)
    except Exception as error:  # whatever the user's code raises
        shape = "x".join(map(str, images.shape))
        raise MicronetError(f"the network does not take an input of {shape}: {first_line(error)}") from error


def _about(artifact: Artifact) -> dict[str, Any]:
    """Return what a reader of the file needs: classes, preprocessing and what was done to the network."""
    return {
        "model": artifact.spec.name,
        "history": [{"stage": record.stage, "config": record.config} for record in artifact.history],
        "data": artifact.data,
        "versions": versions(),
    }
