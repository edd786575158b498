"""NaN and infinity, in a network's tensors and in its outputs: nothing measured with them means anything."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from micronet.errors import FailedError, count


def check_finite(model: nn.Module, source: str) -> None:
    """Raise FailedError that names a network's first parameter or buffer with NaN or infinity.

    Buffers of zeros and infinities are attention masks, and pass; so do quantizers that have seen no data.

    Args:
        source: What the error calls the network, such as its file.
    """
    parameters = dict(model.named_parameters())
    unset = {id(each) for owner in model.modules() if getattr(owner, "empty", False) for each in _tensors(owner)}
    for name, tensor in [*parameters.items(), *model.named_buffers()]:
        if id(tensor) in unset or not tensor.is_floating_point():
            continue
        wrong = ~tensor.detach().isfinite()
        is_mask = name not in parameters and not bool((tensor.isnan() | (~wrong & (tensor != 0))).any())
        if bool(wrong.any()) and not is_mask:
            raise FailedError(
                f"{source} has NaN or infinity in {name} ({int(wrong.sum()):,} of {count(wrong.numel(), 'value')}); "
                "train or import it again"
            )


def check_outputs(outputs: Any, source: str = "the network") -> None:
    """Raise FailedError if an output, of tensors nested in any way, holds NaN or infinity."""
    leaves = [each for each in tree_leaves(outputs) if isinstance(each, Tensor)]
    for index, each in enumerate(leaves):
        wrong = int((~each.isfinite()).sum())
        if wrong:
            which = f"output {index + 1} of {len(leaves)}" if len(leaves) > 1 else "its output"
            raise FailedError(
                f"{source} computes NaN or infinity: {wrong:,} of {count(each.numel(), 'value')} in {which}; check "
                "the range of its inputs and weights"
            )


def _tensors(module: nn.Module) -> Iterable[Tensor]:
    return [*module.parameters(), *module.buffers()]
