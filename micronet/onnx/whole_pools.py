"""Pools over all of a tensor, ``F.avg_pool2d(x, x.shape[2:])``, as means and maxima while torch exports a network.

The kernel of a pool is a number in ONNX, so torch would fix the sizes that it is computed from.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import SymInt, Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_AXES = {function: number for number in (1, 2, 3) for function in (
    getattr(F, f"avg_pool{number}d"), getattr(F, f"max_pool{number}d")
)}  # fmt: skip


class WholePools(TorchFunctionMode):
    """Inside this context, pools whose kernel is all of their input are means and maxima over its axes."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function of torch, or what computes the same without a kernel."""
        kwargs = kwargs or {}
        found = _without_kernel(func, *args, **kwargs) if func in _AXES else None
        return func(*args, **kwargs) if found is None else found


def _without_kernel(
    func: Callable[..., Any], input: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, *rest: Any,
    return_indices: bool = False, divisor_override: int | None = None, **__: Any,
) -> Tensor | None:  # fmt: skip
    """Return what a pool over all of the last axes computes, None if it is another one.

    The stride does not matter, since there is one output. ``func``: a pool of ``_AXES``; all else: its arguments.
    """
    number = _AXES[func]
    kernel, padded = _per_axis(kernel_size, number), _per_axis(padding, number)
    unusual = return_indices or divisor_override is not None or any(padded) or len(rest) > 2  # these two come last
    if unusual or not _are_free(kernel, input.shape[-number:]):
        return None
    axes = tuple(range(-number, 0))
    return input.mean(axes, keepdim=True) if "avg" in func.__name__ else input.amax(axes, keepdim=True)


def _per_axis(value: Any, number: int) -> list[Any]:
    several = [value] if isinstance(value, (int, SymInt)) else [*value]
    return several * number if len(several) == 1 else several


def _are_free(kernel: Sequence[Any], sizes: Sequence[Any]) -> bool:
    """Return True if a kernel has the sizes of a tensor, some of them free; to compare their values would fix them."""
    own, others = ([getattr(getattr(x, "node", None), "expr", x) for x in each] for each in (kernel, sizes))
    return own == others and any(isinstance(x, SymInt) for x in kernel)
