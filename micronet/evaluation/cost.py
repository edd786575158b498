"""What a network costs: multiply-accumulates (MACs)."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from micronet.models.device import Example, as_inputs
from micronet.models.modes import eval_mode, layers_called


def count_macs(model: nn.Module, example: Example) -> int:
    """Count the multiply-accumulates of one forward pass in eval mode.

    Counted are all matrix products and convolutions, in modules or functional calls, also torchvision's deformable
    ones; biases, activations, norms and pools are not. Zero padding and masked attention count in full, as in
    ``torch.utils.flop_counter``.

    A quantized layer counts like its float layer. ``example``: the input, or a tuple of the inputs, of one sample; a
    batch counts as a whole.
    """
    formulas: dict[Any, Any] = {torch.ops.aten.mkldnn_rnn_layer: _rnn_layer_flops}
    if hasattr(torch.ops.torchvision, "deform_conv2d"):  # torchvision is imported
        formulas[torch.ops.torchvision.deform_conv2d] = _deform_conv_flops
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    with eval_mode(model), _constant_parameters(model), torch.no_grad(), _countable_kernels(), counter:
        model(*as_inputs(model, example))
    return counter.get_total_flops() // 2


@contextmanager
def _constant_parameters(model: nn.Module) -> Iterator[None]:
    """Let no parameter require gradients: the counter would wait for those of parameters that are a module's input."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter.is_leaf]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def _countable_kernels() -> Iterator[None]:
    """Run attention and recurrent layers as matrix products: the counter does not know their fused kernels."""
    with layers_called(), sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False):
        yield


def _rnn_layer_flops(x: list[int], input_weight: list[int], hidden_weight: list[int], *_: Any, **__: Any) -> int:
    """Return the FLOPs of oneDNN's LSTM layer, by shapes; ``x``: (steps, N, features)."""
    return 2 * x[0] * x[1] * (math.prod(input_weight) + math.prod(hidden_weight))


def _deform_conv_flops(_x: list[int], weight: list[int], *_: Any, out_shape: list[int], **__: Any) -> int:
    """Return the FLOPs of a deformable convolution, by shapes; the values between pixels count nothing."""
    return 2 * math.prod(out_shape) * math.prod(weight[1:])
