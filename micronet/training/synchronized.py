"""Batch normalization over the whole batch when several processes each hold a part of it.

torch's SyncBatchNorm works only on GPUs and replaces the modules. Here the modules stay as they are (quantized, folded
into a convolution, called as a function): a torch function mode intercepts the batch-norm call itself. Statistics of
the ranks are combined by Chan et al.'s rule (1979, "Updating formulae"), which does not cancel.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from micronet.models.uncompiled import uncompiled
from micronet.training import distributed


@contextmanager
def synchronized_batch_norm() -> Iterator[None]:
    """Inside this context, normalize by the statistics of all ranks wherever a batch norm uses its batch's.

    Every rank must make the same calls in the same order.
    """
    if distributed.world_size() == 1:
        yield
        return
    with _SynchronizedBatchNorm():
        yield


class _SynchronizedBatchNorm(TorchFunctionMode):
    """Replace ``F.batch_norm`` and ``torch.batch_norm``, called with ``training=True``."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm:
            return _batch_norm(*args, **kwargs)
        if func is torch.batch_norm:
            return _torch_batch_norm(*args, **kwargs)
        return func(*args, **kwargs)


@uncompiled  # it communicates
def _batch_norm(input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
                bias: Tensor | None = None, training: bool = False, momentum: float = 0.1,
                eps: float = 1e-5) -> Tensor:  # fmt: skip
    """Compute ``F.batch_norm`` with the statistics of all ranks. input: (N, C, ...); the rest: (C,) or None."""
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    mean, var, count = _statistics(input)
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean, momentum)
            running_var.lerp_(var * count / (count - 1).clamp(min=1), momentum)
    out: Tensor = _Normalize.apply(input, weight, bias, mean, var, count, eps)
    return out


def _torch_batch_norm(input: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
                      running_var: Tensor | None, training: bool, momentum: float, eps: float,
                      cudnn_enabled: bool) -> Tensor:  # fmt: skip
    """Compute ``torch.batch_norm``, whose arguments come in another order."""
    return _batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


@torch.no_grad()
def _statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (C,) mean and biased variance over all ranks of (N, C, ...), and () the number of values per channel."""
    var, mean = torch.var_mean(_at_least_float32(x), _other_axes(x), correction=0)
    count = mean.new_tensor([x.numel() // x.shape[1]])
    own = torch.cat([mean, var, count])
    gathered = [torch.empty_like(own) for _ in range(distributed.world_size())]
    dist.all_gather(gathered, own)
    means, variances, counts = torch.split(torch.stack(gathered), [len(mean), len(var), 1], dim=1)
    share = counts / counts.sum()
    mean = (means * share).sum(0)
    var = ((variances + (means - mean).square()) * share).sum(0)
    return mean, var, counts.sum()


class _Normalize(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) * weight + bias, where mean and var depend on x of every rank."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor,
                count: Tensor, eps: float) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt(), count)
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Return batch normalization's gradient (Ioffe and Szegedy 2015, section 3), its two means over all ranks."""
        x, weight, mean, scale, count = ctx.saved_tensors
        gradient, axes = _at_least_float32(gradients[0]), _other_axes(x)
        normal = (_at_least_float32(x) - _per_channel(mean, x)) * _per_channel(scale, x)
        own = torch.stack([gradient.sum(axes), (gradient * normal).sum(axes)])
        means = distributed.sum_over_ranks(own) / count
        inner = gradient - _per_channel(means[0], x) - normal * _per_channel(means[1], x)
        factor = scale if weight is None else scale * weight
        back = (inner * _per_channel(factor, x)).to(x.dtype)
        of_weight = own[1] if ctx.needs_input_grad[1] else None
        of_bias = own[0] if ctx.needs_input_grad[2] else None
        return back, of_weight, of_bias, None, None, None, None


def _at_least_float32(x: Tensor) -> Tensor:
    """Return ``x`` in float32 or float64: sums in half precision lose accuracy."""
    return x if x.dtype == torch.float64 else x.float()


def _other_axes(x: Tensor) -> list[int]:
    return [axis for axis in range(x.dim()) if axis != 1]


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (x.dim() - 2))
