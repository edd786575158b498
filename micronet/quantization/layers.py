"""A quantized layer is the float layer with slots for quantizers, swapped in place: same object, same parameters.

Slots: ``input_quantizer`` (of the first input), ``weight_quantizer``, ``bias_quantizer`` (export only) and
``output_quantizer``. An activation's quantizer sits in the output slot of the module that produces it, so that all its
readers share it; the input slot serves the network's input and networks that cannot be traced.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from micronet.quantization.quantizer import Quantizer

SLOTS = ("input_quantizer", "weight_quantizer", "bias_quantizer", "output_quantizer")


class Quantized(nn.Module):
    """What a quantized module adds to its float class; mixed in by ``attach``, never built directly."""

    is_leaf = True  # a node of the traced graph, as the float module was

    input_quantizer: nn.Module | None
    weight_quantizer: nn.Module | None
    bias_quantizer: nn.Module | None
    output_quantizer: nn.Module | None
    norm: nn.Module | None  # of a convolution that folds it while training

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """Compute what the float module computes, with the slots' quantizers around and inside it."""
        if self.input_quantizer is not None:
            if inputs:
                inputs = (self.input_quantizer(inputs[0]), *inputs[1:])
            else:
                name = next(iter(options))  # fc(input=x)
                options = {**options, name: self.input_quantizer(options[name])}
        out = super().forward(*inputs, **options)
        return out if self.output_quantizer is None else self.output_quantizer(out)

    def extra_repr(self) -> str:
        """Name the slots in use."""
        used = [slot for slot in SLOTS if getattr(self, slot) is not None]
        return ", ".join([super().extra_repr(), *used])


class _QuantizedConv(Quantized):
    """A convolution of any dimension: torch calls this with the weight it should use.

    With a ``norm`` its batch norm is folded into the weight before that is quantized (Jacob et al. 2017, section 3.2;
    Krishnamoorthi 2018, section 3.2.2). While the norm trains, the one convolution's output, with the running factor
    taken out again, gives the batch's statistics, so 32 bits compute what a convolution and a batch norm do; in eval
    mode, or frozen, the folded weight and bias are all there is.
    """

    eager = ("_convolve_and_normalise",)  # torch.compile goes around it: it moves statistics that its weight came from

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        convolve: Any = super()._conv_forward  # type: ignore[misc]
        if self.norm is None:
            plain: Tensor = convolve(input, *_parameters(self, weight, bias))
            return plain
        return self._convolve_and_normalise(convolve, input, weight, bias)

    def _convolve_and_normalise(self, convolve: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        norm: Any = self.norm
        factor = norm_factor(norm, safe=norm.training)
        weight, _ = _parameters(self, weight * per_row(factor, weight), None)
        if not norm.training:
            folded = norm.bias - norm.running_mean * factor
            out: Tensor = convolve(input, weight, folded if bias is None else folded + bias * factor)
            return out
        raw = convolve(input, weight, None) / per_channel(factor, input)
        if bias is not None:
            raw = raw + per_channel(bias, input)
        normal: Tensor = norm(raw)
        return normal


class _QuantizedConvTranspose(Quantized):
    """A transposed convolution of any dimension."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        layer: Any = self
        if layer.input_quantizer is not None:
            input = layer.input_quantizer(input)
        dimensions = len(layer.kernel_size)
        padding = layer._output_padding(
            input, output_size, layer.stride, layer.padding, layer.kernel_size, dimensions, layer.dilation
        )
        weight, bias = _parameters(layer, layer.weight, layer.bias)
        convolve = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[dimensions]
        out: Tensor = convolve(input, weight, bias, layer.stride, layer.padding, padding, layer.groups, layer.dilation)
        return out if layer.output_quantizer is None else layer.output_quantizer(out)


class _QuantizedReLU(Quantized):
    """A ReLU, which the grid of its output may do the work of."""

    def forward(self, input: Tensor) -> Tensor:
        relu: Any = self
        quantizer = relu.output_quantizer
        if relu.inplace or relu.input_quantizer is not None or not isinstance(quantizer, Quantizer):
            plain: Tensor = super().forward(input)
            return plain
        out: Tensor = quantizer(input, rectified=True)
        return out


class _LinearCompute(nn.Linear):
    """Linear with its weight and bias taken through their slots."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, *_parameters(self, self.weight, self.bias))


class _QuantizedLinear(Quantized, _LinearCompute):
    """A linear layer."""


def norm_factor(norm: Any, *, safe: bool) -> Tensor:
    """Return gamma / sqrt(running_var + eps); ``safe``: never 0, so that one can divide by it."""
    gamma = norm.weight
    if safe:
        tiny = torch.finfo(gamma.dtype).eps
        gamma = torch.where(gamma.abs() < tiny, torch.full_like(gamma, tiny), gamma)
    factor: Tensor = gamma / (norm.running_var + norm.eps).sqrt()
    return factor


def per_row(values: Tensor, weight: Tensor) -> Tensor:
    """Shape one value an output channel for arithmetic with a convolution's weight."""
    return values.view(-1, *[1] * (weight.dim() - 1))


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """Shape one value a channel for arithmetic with a tensor (N, C, ...)."""
    return values.view(1, -1, *[1] * (x.dim() - 2))


def take_norm(layer: Any, norm: nn.Module) -> None:
    """Give a convolution its batch norm, to be folded while it trains."""
    _make_quantized(layer)
    layer.norm = norm


def effective_weight(layer: Any) -> Tensor:
    """Return the weight that a layer's quantizer sees: with the norm's running factor where it has taken its norm."""
    weight: Tensor = layer.weight
    norm = getattr(layer, "norm", None)
    return weight if norm is None else weight * per_row(norm_factor(norm, safe=False), weight)


def attach(module: nn.Module, slot: str, quantizer: nn.Module) -> None:
    """Put a quantizer into a slot of a module, which becomes a quantized module if it is not one."""
    _make_quantized(module)
    setattr(module, slot, quantizer)


def _make_quantized(module: nn.Module) -> None:
    if not isinstance(module, Quantized):
        module.__class__ = _quantized_class(type(module))  # type: ignore[arg-type]  # mypy: a class is hashable
        for name in (*SLOTS, "norm"):
            module.register_module(name, None)


def has_weight_slot(module: nn.Module) -> bool:
    """Tell whether a module's weight can be quantized here."""
    return isinstance(module, _ConvNd) or type(module) in (nn.Linear, _QuantizedLinear)


def channel_axis(layer: nn.Module) -> int:
    """Return the axis of a layer's weight that its output channels are on; transposed, those of one group."""
    return 1 if getattr(layer, "transposed", False) else 0


def _parameters(module: Any, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if module.weight_quantizer is not None:
        weight = module.weight_quantizer(weight)
    if bias is not None and module.bias_quantizer is not None:
        bias = module.bias_quantizer(bias)
    return weight, bias


@cache
def _quantized_class(float_class: Any) -> type[nn.Module]:
    if float_class is nn.Linear:
        return _QuantizedLinear
    base: type[Quantized] = Quantized
    if issubclass(float_class, _ConvTransposeNd):
        base = _QuantizedConvTranspose
    elif issubclass(float_class, _ConvNd):
        base = _QuantizedConv
    elif float_class is nn.ReLU:
        base = _QuantizedReLU
    return type(f"Quantized{float_class.__name__}", (base, float_class), {"__module__": __name__})
