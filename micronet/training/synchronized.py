"""Batch normalization over the whole batch when several processes each hold a part of it.

torch's SyncBatchNorm works only on GPUs and replaces the modules. Here the modules stay as they are (quantized, folded
into a convolution, called as a function): a torch function mode intercepts the batch-norm call itself. Statistics of
the ranks are combined by Chan et al.'s rule (1979, "Updating formulae"), which does not cancel.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from micronet.models.uncompiled import uncompiled
from micronet.training import distributed


def synchronized_batch_norm() -> AbstractContextManager[Any]:
    """Return a context in which batch norms normalize by the statistics of all ranks, if they use their batch's.

    Every rank must make the same calls in the same order.
    """
    return _SynchronizedBatchNorm() if distributed.world_size() > 1 else nullcontext()


class _SynchronizedBatchNorm(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        synchronized = {F.batch_norm: _batch_norm, torch.batch_norm: _torch_batch_norm}
        return synchronized.get(func, func)(*args, **(kwargs or {}))


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
    var, mean = torch.var_mean(_at_least_float32(x), [0, *range(2, x.dim())], correction=0)
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
        axes, per_channel = [0, *range(2, x.dim())], (-1, *[1] * (x.dim() - 2))
        gradient = _at_least_float32(gradients[0])
        normal = (_at_least_float32(x) - mean.view(per_channel)) * scale.view(per_channel)
        own = torch.stack([gradient.sum(axes), (gradient * normal).sum(axes)])
        means = (distributed.sum_over_ranks(own) / count).view(2, *per_channel)
        factor = scale if weight is None else scale * weight
        back = (gradient - means[0] - normal * means[1]) * factor.view(per_channel)
        of_weight = own[1] if ctx.needs_input_grad[1] else None
        of_bias = own[0] if ctx.needs_input_grad[2] else None
        return back.to(x.dtype), of_weight, of_bias, None, None, None, None


def _at_least_float32(x: Tensor) -> Tensor:
    """Return ``x`` in float32 or float64: sums in half precision lose accuracy."""
    return x if x.dtype == torch.float64 else x.float()
