"""NaN and infinity, in a network's tensors and in its outputs: nothing measured with them means anything."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from micronet.errors import FailedError, count


def check_finite(model: nn.Module, source: str) -> None:
    """Raise FailedError that names a network's first parameter or buffer with NaN or infinity, or negative variance.

    Buffers may hold -infinity, as attention masks do, and quantizers that have seen no data are not checked.

    Args:
        source: What the error calls the network, such as its file.
    """
    parameters = dict(model.named_parameters())
    unset = {id(each) for owner in model.modules() if _is_unset(owner) for each in _tensors(owner)}
    for name, tensor in [*parameters.items(), *model.named_buffers()]:
        if id(tensor) in unset or not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        values = tensor.detach().float() if tensor.element_size() == 1 else tensor.detach()
        wrong = ~values.isfinite()
        if name not in parameters and not values.is_complex():
            wrong &= ~values.isneginf()
        if bool(wrong.any()):
            raise FailedError(
                f"{source} has NaN or infinity in {name} ({int(wrong.sum()):,} of {count(wrong.numel(), 'value')}); "
                "train or import it again"
            )
        if name.rpartition(".")[2] == "running_var" and bool((values < 0).any()):
            raise FailedError(f"{source} has a negative variance in {name}; train or import it again")


def check_no_nan(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise FailedError that names the first tensor of a file with NaN; ranges that are unset hold infinity."""
    for name, tensor in tensors.items():
        if bool((tensor.float() if tensor.element_size() == 1 else tensor).isnan().any()):
            raise FailedError(f"{source} has NaN in {name}; recreate it")


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


def _is_unset(module: nn.Module) -> bool:
    """Return True for a quantizer of ours, or its observer, that has no range yet."""
    return type(module).__module__.startswith("micronet.") and getattr(module, "empty", False) is True


def _tensors(module: nn.Module) -> Iterable[Tensor]:
    return [*module.parameters(), *module.buffers()]
