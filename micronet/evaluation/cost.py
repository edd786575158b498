"""What a network costs: multiply-accumulates."""

from typing import Any

import torch
from torch import Tensor, nn


def count_macs(model: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """Count the multiply-accumulates of convolutions and linear layers, attention's own included, for one image."""
    total = 0

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Any], output: Any) -> None:
        nonlocal total
        if isinstance(module, nn.MultiheadAttention):  # its four projections are no layers of their own
            read = [*inputs[:3], *(named[name] for name in ("query", "key", "value") if name in named)]
            total += sum(x.numel() for x in (*read, output[0])) * module.embed_dim
        elif isinstance(module, nn.Linear):
            total += output.numel() * module.in_features
        elif isinstance(module, nn.modules.conv._ConvNd):
            positions = inputs[0] if module.transposed else output
            total += positions.numel() * module.weight[0].numel()

    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in model.modules()]
    training = model.training
    device = next(model.parameters()).device
    try:
        with torch.inference_mode():
            model.eval()(torch.zeros(1, *image_shape, device=device))
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return total
