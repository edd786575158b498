"""The arithmetic of uniform affine grids, in ONNX's convention.

q = clamp(round_half_even(x / scale) + zero_point, qmin, qmax), x' = (q - zero_point) * scale.

Jacob et al. 2017, arXiv:1712.05877, equation 1 and section 3.1 (zero is exactly representable). Signed weights use
the narrow range -(2^(b-1) - 1) .. 2^(b-1) - 1, so that a fold by a negative factor can flip their integers.
"""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Ste = Literal["ste", "saturate", "soft"]
CACHED_ELEMENTS = 1 << 19  # two megabytes of float32
SMALLEST_SCALE = 2.0**-60  # an all-zero tensor's; the product of two such scales is still a normal float32


class QParams(NamedTuple):
    """A grid: ``scale`` and ``zero_point`` broadcast against the tensor on ``axis`` (None: one for all of it).

    scale: float32, > 0. zero_point: float32 holding an integer in [qmin, qmax].
    """

    scale: Tensor
    zero_point: Tensor
    qmin: int
    qmax: int
    axis: int | None


def integer_range(bits: int, *, signed: bool, narrow: bool) -> tuple[int, int]:
    """Return (qmin, qmax) of a grid with at most 2^bits levels."""
    if not signed:
        return 0, 2**bits - 1
    largest = 2 ** (bits - 1) - 1
    return (-largest if narrow else -largest - 1), largest


def symmetric_qparams(low: Tensor, high: Tensor, qmax: int) -> tuple[Tensor, Tensor]:
    """Return (scale, zero point 0) such that the largest magnitude of [low, high] lies on qmax."""
    scale = (torch.maximum(low.abs(), high.abs()) / qmax).clamp(min=SMALLEST_SCALE)
    return scale, torch.zeros_like(scale)


def affine_qparams(low: Tensor, high: Tensor, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
    """Return (scale, zero point) of the grid over [low, high], widened to contain 0."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / (qmax - qmin)).clamp(min=SMALLEST_SCALE)
    zero_point = (qmin - low / scale).round().clamp(qmin, qmax)
    return scale, zero_point


def quantize(x: Tensor, qparams: QParams) -> Tensor:
    """Return the integers of ``x``, as float32."""
    q = (x / broadcast(qparams.scale, x, qparams.axis)).round_()
    return q.add_(broadcast(qparams.zero_point, x, qparams.axis)).clamp_(qparams.qmin, qparams.qmax)


def dequantize(q: Tensor, qparams: QParams) -> Tensor:
    """Return the values of integers ``q``."""
    return (q - broadcast(qparams.zero_point, q, qparams.axis)) * broadcast(qparams.scale, q, qparams.axis)


UNSATURATED = 64  # 2 * 255 * 64 < 2^15: two products of 8-bit activations fit an int16


def stored(qparams: QParams) -> QParams:
    """Return a weight's grid as int8 stores it: of 7 bits or fewer, times the largest power of two within 64.

    Beyond 64 the 16-bit sums of x86 without VNNI saturate. The values are the same to the last bit. The unit of the
    layer's sums, input scale times weight scale, is as much finer, so that a bias rounded to it stays put.
    """
    largest = max(abs(qparams.qmin), abs(qparams.qmax))
    factor = 2 ** max(0, (UNSATURATED // largest).bit_length() - 1)
    return QParams(
        qparams.scale / factor, qparams.zero_point * factor, qparams.qmin * factor, qparams.qmax * factor, qparams.axis
    )


def fake_quantize(x: Tensor, qparams: QParams, *, rectified: bool = False) -> Tensor:
    """Return ``x`` on its grid; straight-through gradient: 1 where the integer needed no clamp, else 0.

    ``rectified``: of relu(x) and with its gradient, on a grid whose lowest level is 0.
    """
    out: Tensor = _FakeQuantize.apply(x, qparams, rectified)
    return out


def learned_step(x: Tensor, qparams: QParams, gradient_scale: float, *, rectified: bool = False) -> Tensor:
    """Return ``x`` on a symmetric grid whose scale is learned (Esser et al. 2020, arXiv:1902.08153, equations 1 to 3).

    The scale's gradient, times ``gradient_scale``, is q - x/scale inside the grid, qmin below it, qmax above it.
    """
    out: Tensor = _LearnedStep.apply(x, qparams.scale, qparams, gradient_scale, rectified)
    return out


def sign(x: Tensor, ste: Ste) -> Tensor:
    """Return +1 where x >= 0, else -1.

    Gradient: 1 (``ste``), 1 where |x| <= 1 (``saturate``), max(0, 1 - |x|) (``soft``). Hubara et al. 2016,
    arXiv:1602.02830, equations 1 and 4.
    """
    out: Tensor = _Sign.apply(x, ste)
    return out


def broadcast(values: Tensor, like: Tensor, axis: int | None) -> Tensor:
    """Shape per-channel ``values`` (C,) for arithmetic with ``like``, channels on ``axis``."""
    if axis is None:
        return values
    shape = [1] * like.dim()
    shape[axis] = -1
    return values.view(shape)


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cut tensors of equal shape along their first axis into pieces that a processor's cache holds."""
    x = tensors[0]
    if x.device.type != "cpu" or x.dim() < 2 or x.numel() <= CACHED_ELEMENTS:
        yield tensors
        return
    rows = max(1, CACHED_ELEMENTS // x[0].numel())
    yield from zip(*(torch.split(tensor, rows) for tensor in tensors), strict=True)


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Return the sum of products of two tensors of equal shape, in one pass where both lie in memory alike."""
    if left.dim() == 4 and left.is_contiguous(memory_format=torch.channels_last):
        left, right = left.permute(0, 2, 3, 1), right.permute(0, 2, 3, 1)
    return torch.dot(left.reshape(-1), right.reshape(-1))


def _on_grid(x: Tensor, qparams: QParams) -> Tensor:
    """Return ``dequantize(quantize(x))``; a large tensor with one scale piece by piece, in half the time."""
    if qparams.axis is not None:
        return dequantize(quantize(x, qparams), qparams)
    out, shift = torch.empty_like(x), qparams.zero_point
    shifted = bool(shift.any())
    for part, into in _pieces(x, out):
        torch.div(part, qparams.scale, out=into)
        into.round_()
        if shifted:
            into.add_(shift)
        into.clamp_(qparams.qmin, qparams.qmax)
        if shifted:
            into.sub_(shift)
        into.mul_(qparams.scale)
    return out


def _open_interval(lowest: Tensor, highest: Tensor, x: Tensor, *, rectified: bool) -> tuple[Tensor, Tensor]:
    """Return the bounds of the open interval that holds [lowest, highest]; ``rectified``: (lowest, highest].

    One floating-point number farther out, because ``hardtanh_backward``, which masks in one pass, excludes its bounds.
    """
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32  # half precision is compared in float32
    lowest, highest = lowest.to(exact), highest.to(exact)
    infinity = torch.full_like(highest, torch.inf)
    return lowest if rectified else lowest.nextafter(-infinity), highest.nextafter(infinity)


def _mask_gradient(gradient: Tensor, x: Tensor, low: Tensor, high: Tensor, axis: int | None) -> Tensor:
    """Return the gradient where low < x < high, else 0."""
    if axis is None:
        out: Tensor = torch.ops.aten.hardtanh_backward(gradient, x, float(low), float(high))
        return out
    return gradient * ((x > broadcast(low, x, axis)) & (x < broadcast(high, x, axis)))


class _FakeQuantize(torch.autograd.Function):
    """Saves its input and the grid, nothing of the size of the output; recomputes the mask in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, qparams: QParams, rectified: bool) -> Tensor:
        ctx.save_for_backward(x, qparams.scale, qparams.zero_point)
        ctx.grid = qparams.qmin, qparams.qmax, qparams.axis, rectified
        return _on_grid(x, qparams)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        x, scale, zero_point = ctx.saved_tensors
        qmin, qmax, axis, rectified = ctx.grid
        # The integer is clamped where x lies more than half a step beyond the outermost level.
        lowest = (qmin - (0 if rectified else 0.5) - zero_point) * scale
        highest = (qmax + 0.5 - zero_point) * scale
        bounds = _open_interval(lowest, highest, x, rectified=rectified)
        return _mask_gradient(gradients[0], x, *bounds, axis), None, None


def straight_through(x: Tensor, value: Tensor) -> Tensor:
    """Return ``value`` exactly, with the gradient of ``x`` (Bengio et al. 2013, arXiv:1308.3432)."""
    out: Tensor = _StraightThrough.apply(x, value)
    return out


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _LearnedStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, qparams: QParams, gradient_scale: float, rectified: bool) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.grid = qparams.qmin, qparams.qmax, qparams.axis, gradient_scale, rectified
        return _on_grid(x, qparams)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, scale = ctx.saved_tensors
        qmin, qmax, axis, gradient_scale, rectified = ctx.grid
        upstream = gradients[0]
        low, high = _open_interval(qmin * scale.detach(), qmax * scale.detach(), x, rectified=rectified)
        # Inside the slope is q - x / scale, outside q: in all sum(g q) - sum(passed x) / scale.
        if axis is None:
            passed, total = torch.empty_like(x), torch.zeros_like(scale)
            for part, given, into in _pieces(x, upstream, passed):
                torch.ops.aten.hardtanh_backward(given, part, float(low), float(high), grad_input=into)
                q = (part / scale).round_().clamp_(qmin, qmax)
                total += _dot(q, given) - _dot(into, part) / scale
            return passed, total * gradient_scale, None, None, None
        passed = _mask_gradient(upstream, x, low, high, axis)
        q = (x / broadcast(scale, x, axis)).round_().clamp_(qmin, qmax)
        sums = [part.transpose(0, axis).flatten(1).sum(1) for part in (q.mul_(upstream), passed * x)]
        return passed, (sums[0] - sums[1] / scale) * gradient_scale, None, None, None


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ste: Ste) -> Tensor:
        ctx.save_for_backward(x)
        ctx.ste = ste
        return x.sign().add_(0.5).sign_()  # 0 counts as above; a tenth of the time of torch.where on a CPU

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        if ctx.ste == "ste":
            return gradients[0], None
        if ctx.ste == "saturate":
            above = 1 + torch.finfo(x.dtype).eps  # the next number, since hardtanh_backward excludes its bounds
            return torch.ops.aten.hardtanh_backward(gradients[0], x, -above, above), None
        return gradients[0] * (1 - x.abs()).clamp_(min=0), None
