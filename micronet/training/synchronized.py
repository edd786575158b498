"""Batch norms whose statistics are of the whole batch, not of one process's part of it.

torch's SyncBatchNorm is for GPUs alone and would replace the modules; here the modules stay, whatever else they are
(quantized, folded into a convolution while training), and take one more base class for the time of a training.
The statistics are combined by Chan et al.'s rule (1979, "Updating formulae"), so nothing cancels.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from micronet.training import distributed


@contextmanager
def synchronized(model: nn.Module) -> Iterator[None]:
    """Let every batch norm of a model normalise by the statistics of all processes, inside this context."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if distributed.world_size() == 1:
        norms = []
    classes = [type(norm) for norm in norms]
    for norm, own in zip(norms, classes, strict=True):
        norm.__class__ = _with_others(own)  # type: ignore[arg-type]  # mypy: a class is hashable
    try:
        yield
    finally:
        for norm, own in zip(norms, classes, strict=True):
            norm.__class__ = own


@cache
def _with_others(norm_class: Any) -> Any:
    """Return the class with its forward's last step replaced: ``_Synchronized`` lies right before ``_BatchNorm``."""
    return type(norm_class.__name__, (norm_class, _Synchronized), {"__module__": __name__})


class _Synchronized(_BatchNorm):
    """A batch norm that, while it trains, asks the other processes."""

    eager = ("forward",)

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        mean, var, count = _statistics(input)
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            with torch.no_grad():
                self.running_mean.lerp_(mean, share)
                self.running_var.lerp_(var * count / (count - 1).clamp(min=1), share)
        out: Tensor = _Normalize.apply(input, self.weight, self.bias, mean, var, count, self.eps)
        return out


@torch.no_grad()
def _statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (channels,) mean and biased variance of all processes' (N, C, ...), and () how many values a channel."""
    var, mean = torch.var_mean(_wide(x), _other_axes(x), correction=0)
    count = mean.new_tensor([x.numel() // x.shape[1]])
    own = torch.cat([mean, var, count])
    each = [torch.empty_like(own) for _ in range(distributed.world_size())]
    dist.all_gather(each, own)
    means, variances, counts = torch.split(torch.stack(each), [len(mean), len(var), 1], dim=1)
    share = counts / counts.sum()
    mean = (means * share).sum(0)
    var = ((variances + (means - mean).square()) * share).sum(0)
    return mean, var, counts.sum()


class _Normalize(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) * weight + bias, where mean and var depend on x in every process."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor,
                count: Tensor, eps: float) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt(), count)
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """The gradient of batch normalisation (Ioffe and Szegedy 2015, section 3), its two means over all processes."""
        x, weight, mean, scale, count = ctx.saved_tensors
        gradient, axes = _wide(gradients[0]), _other_axes(x)
        normal = (_wide(x) - _per_channel(mean, x)) * _per_channel(scale, x)
        own = torch.stack([gradient.sum(axes), (gradient * normal).sum(axes)])
        means = distributed.sum_over_ranks(own) / count
        inner = gradient - _per_channel(means[0], x) - normal * _per_channel(means[1], x)
        factor = scale if weight is None else scale * weight
        back = (inner * _per_channel(factor, x)).to(x.dtype)
        if weight is None:
            return back, None, None, None, None, None, None
        return back, own[1], own[0], None, None, None, None


def _wide(x: Tensor) -> Tensor:
    """Return ``x`` in 32 bits at least: sums in 16 would be of nothing."""
    return x if x.dtype == torch.float64 else x.float()


def _other_axes(x: Tensor) -> list[int]:
    return [axis for axis in range(x.dim()) if axis != 1]


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (x.dim() - 2))
