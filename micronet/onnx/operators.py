"""The operators that carry integers through torch's ONNX exporter, and their translation to ONNX.

torch.onnx does not know our quantizers. Before the export, each is replaced by one of the modules here, which holds
the integers and calls a custom operator. The exporter translates that to QuantizeLinear and DequantizeLinear.
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
FOR_TENSORRT = "quantize with --q-type sym --a-sign signed and at most 8 bits (dorefa: 7), or export with --target ort"


@torch.library.custom_op("micronet::dequantize", mutates_args=())
def dequantize_integers(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    """Return (q - zero_point) * scale as float32; an ``axis`` of -1 means one scale per tensor."""
    channels = None if axis < 0 else axis
    values = q.to(torch.float32) - broadcast(zero_point.to(torch.float32), q, channels)
    return values * broadcast(scale, q, channels)


@torch.library.custom_op("micronet::quantize_dequantize", mutates_args=())
def quantize_dequantize(x: Tensor, scale: Tensor, zero_point: Tensor, name: str) -> Tensor:
    """Round ``x`` to the full range of the zero point's integer type; ``name`` identifies the quantizer."""
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
    """Return how the exporter translates these operators for an ONNX opset: torch operator -> function."""
    op = getattr(onnxscript, f"opset{opset}")

    def write_dequantize(q: Any, scale: Any, zero_point: Any, axis: int) -> Any:
        points = [] if q.dtype == ir.DataType.INT32 else [zero_point]  # a bias: ONNX requires the default, 0
        return op.DequantizeLinear(q, scale, *points, **({} if axis < 0 else {"axis": axis}))

    def write_quantize_dequantize(x: Any, scale: Any, zero_point: Any, name: str) -> Any:
        return op.DequantizeLinear(op.QuantizeLinear(x, scale, zero_point), scale, zero_point)

    return {
        torch.ops.micronet.dequantize.default: write_dequantize,
        torch.ops.micronet.quantize_dequantize.default: write_quantize_dequantize,
    }


class StoredIntegers(nn.Module):
    """A weight or bias as integers; its forward ignores the float tensor it replaces."""

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
        """Return the dequantized values."""
        out: Tensor = torch.ops.micronet.dequantize(self.q, self.scale, self.zero_point, self.axis)
        return out


class ActivationQDQ(nn.Module):
    """An activation quantizer in ONNX's terms: a clip if the grid is narrower than its integer type, then Q/DQ.

    For ONNX Runtime the integers are unsigned, because its x86 kernels are fast with them; a signed grid is shifted by
    half its range, which leaves the values unchanged. TensorRT only supports int8 with zero point 0.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, qparams: QParams, bits: int, name: str, *, signed: bool = False) -> None:
        super().__init__()
        self.name = name
        if signed:
            require_int8(qparams, name)
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
        """Return ``x`` rounded to the grid."""
        if self.bounds is not None:
            x = x.clamp(*self.bounds)
        out: Tensor = torch.ops.micronet.quantize_dequantize(x, self.scale, self.zero_point, self.name)
        return out


def require_int8(qparams: QParams, name: str) -> None:
    """Raise MicronetError if TensorRT does not support a quantizer's zero point or range."""
    limits = torch.iinfo(torch.int8)
    if bool((qparams.zero_point != 0).any()):
        raise MicronetError(f"{name} has a nonzero zero point, which TensorRT does not support; {FOR_TENSORRT}")
    if qparams.qmin < limits.min or qparams.qmax > limits.max:
        raise MicronetError(
            f"{name} uses integers from {qparams.qmin} to {qparams.qmax}, but TensorRT only supports int8; "
            f"{FOR_TENSORRT}"
        )


class Sign(nn.Module):
    """A binary activation. Its values are exact in float, so no integers are stored."""

    def forward(self, x: Tensor) -> Tensor:
        """Return +1 for x >= 0 and -1 otherwise."""
        return torch.where(x >= 0, 1.0, -1.0)


class BiasScales(NamedTuple):
    """The scale of a weight, widened if its bias would not fit int32 otherwise, and the scale of the bias."""

    weight: Tensor
    bias: Tensor


def bias_scales(weight_scale: Tensor, input_scale: Tensor, bias: Tensor) -> BiasScales:
    """Return scales, (C,) or a scalar, with which a bias (C,) fits int32: round(bias / (input_scale * weight_scale)).

    Only a channel with tiny weights and a large bias is widened. Its weights then matter less than the rounding of its
    bias to float32.
    """
    needed = bias.abs().double() / (input_scale.double() * INT32_MAX * 0.999)
    widened = torch.maximum(weight_scale.double(), needed).float()
    if weight_scale.dim() == 0:
        widened = widened.max()
    return BiasScales(widened, (widened * input_scale).expand_as(bias).contiguous())
