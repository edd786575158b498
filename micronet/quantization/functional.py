"""Arithmetic of uniform affine grids, in ONNX's convention.

q = clamp(round_half_even(x / scale) + zero_point, qmin, qmax), x' = (q - zero_point) * scale.

Jacob et al. 2017, arXiv:1712.05877, equation 1 and section 3.1 (zero is exactly representable). Signed weights use
the narrow range -(2^(b-1) - 1) .. 2^(b-1) - 1, so that folding a negative factor can negate their integers.
"""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Ste = Literal["ste", "saturate", "soft"]
LARGEST_UNSATURATED = 64  # 2 * 255 * 64 < 2^15: two products with 8-bit activations fit an int16
CACHED_ELEMENTS = 1 << 19  # 2 MiB of float32, which fits a processor's cache
SMALLEST_SCALE = 2.0**-60  # for an all-zero tensor; the product of two such scales is still a normal float32


class QParams(NamedTuple):
    """A grid: the values (q - zero_point) * scale for the integers q from qmin to qmax."""

    scale: Tensor  # float32, > 0; () or one per channel, (C,)
    zero_point: Tensor  # float32 that holds an integer in [qmin, qmax]; same shape
    qmin: int
    qmax: int
    axis: int | None  # the tensor's channel axis, or None for a single scale


def integer_range(bits: int, *, signed: bool, narrow: bool) -> tuple[int, int]:
    """Return (qmin, qmax) of a grid with at most 2^bits levels."""
    if not signed:
        return 0, 2**bits - 1
    largest = 2 ** (bits - 1) - 1
    return (-largest if narrow else -largest - 1), largest


def range_qparams(low: Tensor, high: Tensor, qmin: int, qmax: int, *, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Return (scale, zero point) of the grid over [low, high].

    A symmetric grid puts the largest magnitude on qmax, with zero point 0. For any other, the range is widened to
    contain 0.
    """
    if symmetric:
        scale = (torch.maximum(low.abs(), high.abs()) / qmax).clamp(min=SMALLEST_SCALE)
        return scale, torch.zeros_like(scale)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / (qmax - qmin)).clamp(min=SMALLEST_SCALE)
    return scale, (qmin - low / scale).round().clamp(qmin, qmax)


def to_integers(x: Tensor, qparams: QParams) -> Tensor:
    """Return the integers of ``x``, stored as floats."""
    q = (x / broadcast(qparams.scale, x, qparams.axis)).round_()
    return q.add_(broadcast(qparams.zero_point, x, qparams.axis)).clamp_(qparams.qmin, qparams.qmax)


def dequantize(q: Tensor, qparams: QParams) -> Tensor:
    """Return the values that the integers ``q`` stand for."""
    return (q - broadcast(qparams.zero_point, q, qparams.axis)) * broadcast(qparams.scale, q, qparams.axis)


def int8_grid(qparams: QParams) -> QParams:
    """Return the grid of a weight as stored in int8: integers multiplied by a power of two, up to a magnitude of 64.

    The values do not change. The unit of the layer's sums, input scale times weight scale, becomes finer, and so does
    the rounding of the bias. Magnitudes above 64 would saturate the 16-bit sums of x86 processors without VNNI.
    """
    largest = max(abs(qparams.qmin), abs(qparams.qmax))
    factor = 2 ** max(0, (LARGEST_UNSATURATED // largest).bit_length() - 1)
    scale, zero_point, qmin, qmax, axis = qparams
    return QParams(scale / factor, zero_point * factor, qmin * factor, qmax * factor, axis)


def fake_quantize(x: Tensor, qparams: QParams, *, rectified: bool = False) -> Tensor:
    """Return ``x`` rounded to its grid, with a straight-through gradient: 1 up to the clamp bounds, 0 outside.

    The clamp bounds lie half a step beyond the outermost levels. ``rectified``: apply a ReLU first, for free; the
    grid must begin at 0.
    """
    return _FakeQuantize.apply(x, qparams, rectified)  # type: ignore[no-any-return]


def learned_step(x: Tensor, qparams: QParams, gradient_scale: float, *, rectified: bool = False) -> Tensor:
    """Return ``x`` on a symmetric grid with a learned scale (Esser et al. 2020, arXiv:1902.08153, equations 1 to 3).

    The gradient of x is 1 from the lowest to the highest level, else 0. The scale's gradient is q - x/scale there,
    qmin below and qmax above, times ``gradient_scale``. ``rectified``: as for ``fake_quantize``.
    """
    return _LearnedStep.apply(x, qparams.scale, qparams, gradient_scale, rectified)  # type: ignore[no-any-return]


def sign(x: Tensor, ste: Ste) -> Tensor:
    """Return +1 where x >= 0, else -1.

    The gradient is 1 (``ste``), 1 where |x| <= 1 (``saturate``), max(0, 1 - |x|) (``soft``). Hubara et al. 2016,
    arXiv:1602.02830, equations 1 and 4.
    """
    return _Sign.apply(x, ste)  # type: ignore[no-any-return]


def broadcast(values: Tensor, like: Tensor, axis: int | None) -> Tensor:
    """Reshape per-channel ``values`` (C,) to broadcast against ``like``, whose channels are on ``axis``."""
    if axis is None:
        return values
    shape = [1] * like.dim()
    shape[axis] = -1
    return values.view(shape)


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split tensors of equal shape along their first axis into chunks that fit a processor's cache."""
    x = tensors[0]
    if x.device.type != "cpu" or x.dim() < 2 or x.numel() <= CACHED_ELEMENTS:
        yield tensors
        return
    rows = max(1, CACHED_ELEMENTS // x[0].numel())
    yield from zip(*(torch.split(tensor, rows) for tensor in tensors), strict=True)


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Return the dot product of two tensors of equal shape, without a copy if their memory layouts match.

    In float32 at least: torch's dot product of 16-bit floats is many times slower, and sums in 16 bits.
    """
    if left.dim() == 4 and left.is_contiguous(memory_format=torch.channels_last):
        left, right = left.permute(0, 2, 3, 1), right.permute(0, 2, 3, 1)
    exact = torch.promote_types(left.dtype, torch.float32)
    return torch.dot(left.reshape(-1).to(exact), right.reshape(-1).to(exact))


def _round_to_grid(x: Tensor, qparams: QParams) -> Tensor:
    """Return ``dequantize(to_integers(x))``; with a single scale chunk by chunk, which halves the time."""
    if qparams.axis is not None:
        return dequantize(to_integers(x, qparams), qparams)
    out, shift = torch.empty_like(x), qparams.zero_point
    shifted = bool(shift.any())
    for part, into in _chunks(x, out):
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
    """Saves its input and the grid, and recomputes the mask in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, qparams: QParams, rectified: bool) -> Tensor:
        ctx.save_for_backward(x, qparams.scale, qparams.zero_point)
        ctx.grid = qparams.qmin, qparams.qmax, qparams.axis, rectified
        return _round_to_grid(x, qparams)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        x, scale, zero_point = ctx.saved_tensors
        qmin, qmax, axis, rectified = ctx.grid
        # An integer is clamped if x lies more than half a step beyond the outermost level.
        lowest = (qmin - (0 if rectified else 0.5) - zero_point) * scale
        highest = (qmax + 0.5 - zero_point) * scale
        bounds = _open_interval(lowest, highest, x, rectified=rectified)
        return _mask_gradient(gradients[0], x, *bounds, axis), None, None


def straight_through(x: Tensor, value: Tensor) -> Tensor:
    """Return ``value``, with the gradient of ``x`` (Bengio et al. 2013, arXiv:1308.3432)."""
    return _StraightThrough.apply(x, value)  # type: ignore[no-any-return]


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
        return _round_to_grid(x, qparams)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, scale = ctx.saved_tensors
        qmin, qmax, axis, gradient_scale, rectified = ctx.grid
        upstream = gradients[0]
        low, high = _open_interval(qmin * scale.detach(), qmax * scale.detach(), x, rectified=rectified)
        # The slope is q - x / scale inside and q outside, so the sum is sum(upstream * q) - sum(masked * x) / scale.
        if axis is None:
            masked, total = torch.empty_like(x), torch.zeros_like(scale)
            for part, given, into in _chunks(x, upstream, masked):
                torch.ops.aten.hardtanh_backward(given, part, float(low), float(high), grad_input=into)
                q = (part / scale).round_().clamp_(qmin, qmax)
                total += _dot(q, given) - _dot(into, part) / scale
            return masked, total * gradient_scale, None, None, None
        masked = _mask_gradient(upstream, x, low, high, axis)
        q = (x / broadcast(scale, x, axis)).round_().clamp_(qmin, qmax)
        sums = [part.transpose(0, axis).flatten(1).sum(1) for part in (q.mul_(upstream), masked * x)]
        return masked, (sums[0] - sums[1] / scale) * gradient_scale, None, None, None


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ste: Ste) -> Tensor:
        ctx.save_for_backward(x)
        ctx.ste = ste
        return x.sign().add_(0.5).sign_()  # sign(0) is +1; takes a tenth of the time of torch.where on a CPU

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        if ctx.ste == "ste":
            return gradients[0], None
        if ctx.ste == "saturate":
            above = 1 + torch.finfo(x.dtype).eps  # the next number, since hardtanh_backward excludes its bounds
            return torch.ops.aten.hardtanh_backward(gradients[0], x, -above, above), None
        return gradients[0] * (1 - x.abs()).clamp_(min=0), None
