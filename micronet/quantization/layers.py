"""Quantized layers: float layers with slots for quantizers.

A quantized layer is a new module that shares the parameters, buffers, submodules and hooks of the float layer it
replaces, so optimizers and state-dict keys stay valid. Slots: ``input_quantizer`` (first input), ``weight_quantizer``,
``bias_quantizer`` (export only) and ``output_quantizer``. An activation's quantizer sits in the output slot of the
module that produces it, so all readers share it; the input slot serves the network's input and networks that cannot be
traced.
"""

import copy
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from micronet.graph import ops
from micronet.models.uncompiled import uncompiled
from micronet.quantization.functional import broadcast
from micronet.quantization.quantizer import Quantizer

SLOTS = ("input_quantizer", "weight_quantizer", "bias_quantizer", "output_quantizer")
ACTIVATION_SLOTS = ("input_quantizer", "output_quantizer")


class Quantized(nn.Module):
    """Base of quantized modules: the slots, and a forward that applies the input's and the output's quantizer."""

    is_leaf = True  # one node of the traced graph, as the float module was

    input_quantizer: nn.Module | None
    weight_quantizer: nn.Module | None
    bias_quantizer: nn.Module | None
    output_quantizer: nn.Module | None
    norm: nn.Module | None  # the batch norm that a convolution folds while training

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """Compute the float module's output, with the first input and the output quantized."""
        if self.input_quantizer is not None:
            if inputs:
                inputs = (self.input_quantizer(inputs[0]), *inputs[1:])
            else:
                name = next(iter(options))  # fc(input=x)
                options = {**options, name: self.input_quantizer(options[name])}
        out = self._compute(*inputs, **options)
        return out if self.output_quantizer is None else self.output_quantizer(out)

    def _compute(self, *inputs: Any, **options: Any) -> Any:
        return super().forward(*inputs, **options)

    def extra_repr(self) -> str:
        """Add the names of the slots in use to the float module's description."""
        used = [slot for slot in SLOTS if getattr(self, slot) is not None]
        return ", ".join([super().extra_repr(), *used])


class _QuantizedConv(Quantized):
    """A convolution that folds its ``norm``, if it has one, into the weight before the weight is quantized.

    Jacob et al. 2017, section 3.2; Krishnamoorthi 2018, section 3.2.2. While the norm trains, one convolution is
    computed with the folded weight; its output, divided by the running factor, gives the batch statistics, so at 32
    bits the result is that of a convolution and a batch norm. In eval mode the folded weight and bias are used.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Override torch's private hook, which every ``ConvNd.forward`` calls; the only way to keep its padding."""
        convolve: Any = super()._conv_forward  # type: ignore[misc]
        if self.norm is None:
            return _with_quantized(self, partial(convolve, input), weight, bias)
        return self._convolve_and_normalize(partial(convolve, input), weight, bias)

    @uncompiled  # it updates the running statistics that its own weight was computed from
    def _convolve_and_normalize(self, convolve: Any, weight: Tensor, bias: Tensor | None) -> Tensor:
        norm: Any = self.norm
        factor = norm_factor(norm, nonzero=norm.training)
        folded_weight = weight * broadcast(factor, weight, 0)
        if not norm.training:
            folded_bias = norm.bias - norm.running_mean * factor
            folded_bias = folded_bias if bias is None else folded_bias + bias * factor
            return _with_quantized(self, convolve, folded_weight, folded_bias)
        raw = _with_quantized(self, convolve, folded_weight, None) / _per_channel(factor, weight)
        normalized: Tensor = norm(raw if bias is None else raw + _per_channel(bias, weight))
        return normalized


class _QuantizedConvTranspose(Quantized):
    def _compute(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        layer: Any = self
        dimensions = len(layer.kernel_size)
        padding = layer._output_padding(  # private in torch, and the only rule for output_size
            input, output_size, layer.stride, layer.padding, layer.kernel_size, dimensions, layer.dilation
        )
        weight, bias = _quantized_parameters(layer, layer.weight, layer.bias)
        convolve = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[dimensions]
        return convolve(input, weight, bias, layer.stride, layer.padding, padding, layer.groups, layer.dilation)


class _QuantizedLinear(Quantized):
    def _compute(self, input: Tensor) -> Tensor:
        layer: Any = self
        return _with_quantized(layer, partial(F.linear, input), layer.weight, layer.bias)


class _QuantizedReLU(Quantized):
    """A ReLU whose output quantizer clamps at 0 itself if its grid begins there."""

    def forward(self, input: Tensor) -> Tensor:
        relu: Any = self
        quantizer = relu.output_quantizer
        clamps = isinstance(quantizer, Quantizer) and not relu.inplace and relu.input_quantizer is None
        out: Tensor = quantizer(input, rectified=True) if clamps else super().forward(input)
        return out


def quantized(module: nn.Module) -> Any:
    """Return a quantized module with empty slots that shares all state of a float one; a quantized one is returned.

    Replace the float module with it by ``replace_modules``.
    """
    if isinstance(module, Quantized):
        return module
    kind = _quantized_class(type(module))  # type: ignore[arg-type]  # mypy: a class is hashable
    other = kind.__new__(kind)
    other.__dict__.update(module.__dict__)
    for registry in ("_parameters", "_buffers", "_modules"):  # the tensors are shared, the tables are not
        other.__dict__[registry] = module.__dict__[registry].copy()
    for name in (*SLOTS, "norm"):
        other.register_module(name, None)
    return other


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Return the network with modules replaced wherever they are used, lists and other plain attributes included.

    Parameters and buffers are shared with ``model``.
    """
    if not replacements:
        return model
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    memo |= {id(old): new for old, new in replacements.items()}
    for new in replacements.values():  # whose children may be replaced too, but not the norm that a layer has taken
        for name, child in new._modules.items():
            if child is not None and name != "norm" and not replacements.keys().isdisjoint(child.modules()):
                new._modules[name] = copy.deepcopy(child, memo)
    return copy.deepcopy(model, memo)  # looks each object up in the memo before it copies it


def norm_factor(norm: Any, *, nonzero: bool) -> Tensor:
    """Return gamma / sqrt(running_var + eps), (channels,); ``nonzero``: with a tiny gamma in place of 0."""
    gamma = norm.weight
    if nonzero:
        tiny = torch.finfo(gamma.dtype).eps
        gamma = torch.where(gamma.abs() < tiny, tiny, gamma)
    factor: Tensor = gamma / (norm.running_var + norm.eps).sqrt()
    return factor


def _per_channel(values: Tensor, weight: Tensor) -> Tensor:
    """Shape one value per output channel (C,) for arithmetic with the output of the layer with this weight."""
    return values.view(-1, *[1] * (weight.dim() - 2))


def effective_weight(layer: Any) -> Tensor:
    """Return the weight that a layer's quantizer reads: multiplied by the norm's running factor if there is a norm."""
    weight: Tensor = layer.weight
    norm = getattr(layer, "norm", None)
    return weight if norm is None else weight * broadcast(norm_factor(norm, nonzero=False), weight, 0)


def give_bias(layer: Any) -> None:
    """Give a layer without a bias one of zeros, in place."""
    if layer.bias is None:
        channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        layer.bias = nn.Parameter(layer.weight.detach().new_zeros(channels))


@torch.no_grad()
def drop_parametrizations(layer: nn.Module) -> None:
    """Make computed parameters of a quantized layer (weight norm and the like) plain ones, in place."""
    if parametrize.is_parametrized(layer):
        values = {name: getattr(layer, name).clone() for name in layer.parametrizations}  # type: ignore[union-attr]
        kinds = (*ops.CONVOLUTIONS, nn.Linear)
        layer.__class__ = _quantized_class(next(kind for kind in type(layer).__mro__ if kind in kinds))
        del layer.parametrizations
        for name, value in values.items():
            layer.register_parameter(name, nn.Parameter(value))


def has_weight_slot(module: nn.Module) -> bool:
    """Return True if this package can quantize the module's weight."""
    kind = isinstance(module, (*ops.CONVOLUTIONS, _QuantizedLinear)) or type(module) is nn.Linear
    return kind and not is_complex(module)


def is_complex(layer: nn.Module) -> bool:
    """Return True if a layer's own parameters are complex numbers, which no grid rounds."""
    return any(parameter.is_complex() for parameter in layer.parameters(recurse=False))


def channel_axis(layer: nn.Module) -> int:
    """Return the weight's axis of output channels (transposed convolutions: the output channels of one group)."""
    return 1 if getattr(layer, "transposed", False) else 0


def _quantized_parameters(layer: Any, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if layer.weight_quantizer is not None:
        weight = layer.weight_quantizer(weight)
    if bias is not None and layer.bias_quantizer is not None:
        bias = layer.bias_quantizer(bias)
    return weight, bias


def _with_quantized(
    layer: Any, compute: Callable[[Tensor, Tensor | None], Tensor], weight: Tensor, bias: Tensor | None
) -> Tensor:
    """Return ``compute(weight, bias)`` with both quantized.

    Weights of -1, 0 and 1 are multiplied by their scale after ``compute``, as integer runtimes do. With signs as
    inputs, the sums are then exact, so a sum of zero stays zero and no rounding error decides the next sign.
    """
    weight, bias = _quantized_parameters(layer, weight, bias)
    quantizer = layer.weight_quantizer
    if not isinstance(quantizer, Quantizer) or not quantizer.unit_levels or quantizer.recorder is not None:
        return compute(weight, bias)
    scale = weight.detach().abs().flatten(1).amax(1)
    scale = torch.where(scale == 0, 1.0, scale)
    out = compute(weight / broadcast(scale, weight, 0), None)
    scale = _per_channel(scale, weight).to(out.dtype)
    return out * scale if bias is None else torch.addcmul(_per_channel(bias, weight).to(out.dtype), out, scale)


@cache
def _quantized_class(float_class: Any) -> type[nn.Module]:
    base = Quantized
    if float_class is nn.Linear:
        base = _QuantizedLinear
    elif issubclass(float_class, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        base = _QuantizedConvTranspose
    elif issubclass(float_class, ops.CONVOLUTIONS):
        base = _QuantizedConv
    elif float_class is nn.ReLU:
        base = _QuantizedReLU
    return type(f"Quantized{float_class.__name__}", (base, float_class), {"__module__": __name__})
