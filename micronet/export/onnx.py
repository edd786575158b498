"""From an artifact to an ONNX model whose weights are integers.

Batch norms are folded, quantized layers hold their int8 weight, scale and zero point and an int32 bias, activations go
through QuantizeLinear and DequantizeLinear in the form ONNX Runtime fuses on x86: unsigned, one pair a tensor, its own
zero-point initialiser for every node.
"""

import copy
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from micronet.artifact import Artifact, versions
from micronet.errors import FailedError, MicronetError, first_line
from micronet.export.operators import OPSET, TRANSLATIONS, ActivationGrid, Sign, StoredIntegers, room_for_bias
from micronet.export.tidy import tidy
from micronet.files import write_atomically
from micronet.graph import trace
from micronet.history import StageRecord
from micronet.quantization.calibrate import check_calibrated, each_quantizer
from micronet.quantization.fold import fold_model, foldable_pairs, has_taken_norms, shares_scales
from micronet.quantization.functional import dequantize, quantize, stored
from micronet.quantization.quantizer import Quantizer
from micronet.quantization.schemes.wbwtab import SignQuantizer

INPUT, OUTPUT = "images", "scores"
METADATA_KEY = "micronet"


def to_onnx(artifact: Artifact, images: Tensor) -> onnx.ModelProto:
    """Return an artifact's ONNX model; the batch is dynamic.

    images: (N, C, H, W) float32, any real ones; they fix C, H and W.
    Raises MicronetError where torch cannot export the network, or a quantizer has no range.
    """
    check_calibrated(artifact.model)
    model = with_integers(_folded(artifact.model), artifact.history)
    proto = _export(model, images)
    tidy(proto)
    onnx.helper.set_model_props(proto, _metadata(artifact))
    onnx.checker.check_model(proto, full_check=True)
    return proto


def write_onnx(proto: onnx.ModelProto, path: Path) -> None:
    """Write an ONNX model, whole or not at all."""

    def write(temporary: Path) -> None:
        temporary.write_bytes(proto.SerializeToString())

    write_atomically(path, write)


def with_integers(model: nn.Module, history: list[StageRecord]) -> nn.Module:
    """Swap the quantizers of a folded model, in place, for modules that hold integers; return the model."""
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
            _store_weight(layer, quantizer, scales.get(inputs.get(name) or ""))
        elif isinstance(quantizer, SignQuantizer):
            setattr(layer, slot, Sign())
        else:
            setattr(layer, slot, ActivationGrid(quantizer.qparams(torch.empty(0)), quantizer.bits, f"{name}.{slot}"))
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


def _export(model: nn.Module, images: Tensor) -> onnx.ModelProto:
    exporter_log = logging.getLogger("torch.onnx")
    level = exporter_log.level
    exporter_log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                model,
                (images[:2].contiguous(),),
                dynamo=True,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                custom_translation_table=TRANSLATIONS,
                optimize=True,
                verbose=False,
            )
    except Exception as error:  # the exporter raises many kinds; its first line names the operator
        raise MicronetError(f"torch cannot export this network to ONNX: {first_line(error)}") from error
    finally:
        exporter_log.setLevel(level)
    if program is None:
        raise FailedError("torch's exporter returned nothing")
    proto: onnx.ModelProto = program.model_proto
    return proto


def _metadata(artifact: Artifact) -> dict[str, str]:
    """Return what a reader of the file needs: classes, preprocessing and what was done to the network."""
    about = {
        "model": artifact.spec.name,
        "history": [{"stage": record.stage, "config": record.config} for record in artifact.history],
        "data": artifact.data,
        "versions": versions(),
    }
    return {METADATA_KEY: json.dumps(about, sort_keys=True)}
