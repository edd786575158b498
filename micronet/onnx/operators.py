"""The operators that carry integers through torch's ONNX exporter, and their ONNX translation.

torch.onnx knows nothing of our quantizers. Before export each becomes one of the modules here, which holds the
integers and calls a custom operator; the exporter translates that to QuantizeLinear and DequantizeLinear.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import onnx_ir as ir
import onnxscript
import torch
from torch import Tensor, nn

from micronet.errors import MicronetError
from micronet.quantization.functional import QParams, broadcast

INT8_BITS = 8
INT32_MAX = 2**31 - 1
FOR_TENSORRT = "quantize with --q-type sym --a-sign signed and 8 bits or fewer (dorefa: 7), or export for --target ort"


@torch.library.custom_op("micronet::dequantize", mutates_args=())
def dequantize_integers(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    """Return (q - zero_point) * scale as float32; ``axis`` -1: one scale for all."""
    at = None if axis < 0 else axis
    values = q.to(torch.float32) - broadcast(zero_point.to(torch.float32), q, at)
    return values * broadcast(scale, q, at)


@torch.library.custom_op("micronet::quantize_dequantize", mutates_args=())
def quantize_dequantize(x: Tensor, scale: Tensor, zero_point: Tensor, name: str) -> Tensor:
    """Return ``x`` on the whole grid of the zero point's integer type; ``name`` tells whose quantizer this is."""
    limits = torch.iinfo(zero_point.dtype)
    shift = zero_point.to(torch.float32)
    return ((x / scale).round_().add_(shift).clamp_(limits.min, limits.max) - shift) * scale


@dequantize_integers.register_fake
def _(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    return torch.empty_like(q, dtype=torch.float32)


@quantize_dequantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, name: str) -> Tensor:
    return torch.empty_like(x)


def translations(opset: int) -> dict[Any, Callable[..., Any]]:
    """Return how the exporter writes the operators here, in an ONNX operator set."""
    op = getattr(onnxscript, f"opset{opset}")

    def write_dequantize(q: Any, scale: Any, zero_point: Any, axis: int) -> Any:
        if q.dtype == ir.DataType.INT32:  # a bias: ONNX wants its zero point 0, which is what none at all says
            return op.DequantizeLinear(q, scale, axis=axis)
        if axis < 0:
            return op.DequantizeLinear(q, scale, zero_point)
        return op.DequantizeLinear(q, scale, zero_point, axis=axis)

    def write_quantize_dequantize(x: Any, scale: Any, zero_point: Any, name: str) -> Any:
        return op.DequantizeLinear(op.QuantizeLinear(x, scale, zero_point), scale, zero_point)

    return {
        torch.ops.micronet.dequantize.default: write_dequantize,
        torch.ops.micronet.quantize_dequantize.default: write_quantize_dequantize,
    }


class StoredIntegers(nn.Module):
    """A weight or a bias held as integers; its forward ignores the float tensor that it replaces."""

    q: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, q: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None) -> None:
        super().__init__()
        self.axis = -1 if axis is None else axis
        self.register_buffer("q", q)
        self.register_buffer("scale", scale.clone())
        self.register_buffer("zero_point", zero_point.to(q.dtype))

    def forward(self, replaced: Tensor) -> Tensor:
        """Return the values of the integers."""
        out: Tensor = torch.ops.micronet.dequantize(self.q, self.scale, self.zero_point, self.axis)
        return out


class ActivationGrid(nn.Module):
    """An activation's quantizer as ONNX can say it: a clip where the grid is narrower than its integer type, then Q/DQ.

    For ONNX Runtime the integers are unsigned, a signed grid's shifted by half their range: the same values, and the
    form that its x86 kernels are fast with. For TensorRT they are int8 with zero point 0, which is all it takes.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, qparams: QParams, bits: int, name: str, *, signed: bool = False) -> None:
        super().__init__()
        self.name = name
        if signed:
            check_signed(qparams, name)
        dtype = torch.int8 if signed else torch.uint8 if bits <= INT8_BITS else torch.uint16
        limits = torch.iinfo(dtype)
        shift = (limits.max + 1) // 2 if qparams.qmin < 0 and not signed else 0
        clipped = (qparams.qmin + shift, qparams.qmax + shift) != (limits.min, limits.max)
        zero_point = float(qparams.zero_point)
        scale = float(qparams.scale.detach())
        self.bounds = ((qparams.qmin - zero_point) * scale, (qparams.qmax - zero_point) * scale) if clipped else None
        self.register_buffer("scale", qparams.scale.clone())
        self.register_buffer("zero_point", (qparams.zero_point + shift).to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` on its grid."""
        if self.bounds is not None:
            x = x.clamp(*self.bounds)
        out: Tensor = torch.ops.micronet.quantize_dequantize(x, self.scale, self.zero_point, self.name)
        return out


def check_signed(qparams: QParams, name: str) -> None:
    """Raise MicronetError where a grid is none that TensorRT takes."""
    limits = torch.iinfo(torch.int8)
    if bool((qparams.zero_point != 0).any()):
        raise MicronetError(f"{name} has a zero point, which TensorRT refuses; {FOR_TENSORRT}")
    if qparams.qmin < limits.min or qparams.qmax > limits.max:
        raise MicronetError(
            f"{name} has integers of {qparams.qmin} to {qparams.qmax}, and TensorRT takes int8 alone; {FOR_TENSORRT}"
        )


class Sign(nn.Module):
    """A binary activation; its values are exact in float, so it needs no integers of its own."""

    def forward(self, x: Tensor) -> Tensor:
        """Return +1 where x >= 0, else -1."""
        return torch.where(x >= 0, 1.0, -1.0)


class BiasRoom(NamedTuple):
    """A weight's scale, widened where its bias would not fit int32, and the bias's own scale."""

    weight_scale: Tensor
    bias_scale: Tensor


def room_for_bias(weight_scale: Tensor, input_scale: Tensor, bias: Tensor) -> BiasRoom:
    """Return scales with which round(bias / (input_scale * weight_scale)) fits int32.

    Only a channel of next to no weight beside a large bias is widened; its weights then matter less than the bias's
    own rounding to float32.
    """
    wanted = torch.maximum(weight_scale.double(), bias.abs().double() / (input_scale.double() * INT32_MAX * 0.999))
    widened = torch.where(wanted > weight_scale.double(), wanted, weight_scale.double()).float()
    if weight_scale.dim() == 0:
        widened = widened.max()
    return BiasRoom(widened, (widened * input_scale).expand_as(bias).contiguous())
