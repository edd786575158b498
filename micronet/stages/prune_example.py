"""The inputs along which ``prune`` follows channels: they should reach every layer."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, no_grad
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from micronet.artifact.artifact import Artifact
from micronet.data.batches import eval_batches
from micronet.data.dataset import DataSpec
from micronet.data.memory import MemoryData
from micronet.data.samples import example_of
from micronet.data.split import random_subset
from micronet.errors import MicronetError
from micronet.graph import ops
from micronet.models.device import Example, as_inputs, contiguous, head
from micronet.models.modes import eval_mode, state_kept
from micronet.stages.config import DataConfig
from micronet.stages.inputs import example_input, open_data

COUNTS = 8, 16, 32, 64  # samples, which more probably reach all experts of a mixture than two do


def pruning_example(artifact: Artifact, data: DataConfig, input_shape: str | None) -> Example:
    """Return inputs for a network: two of them, or more if its forward selects none of two by a mask.

    Experts in a mixture compute only from the samples that are routed to them. Those of the data are taken if there
    are any, for random ones may all be routed alike.
    """
    if isinstance(data.data, MemoryData):
        first: Example = data.data.inputs(artifact.model, 1)[0]
        return first
    two, described = example_input(artifact, input_shape), DataSpec.from_json(artifact.data).inputs
    if described is None or input_shape is not None or not _selects_none(artifact, two):
        return two
    try:
        opened = open_data(data, artifact)
        batches = eval_batches(random_subset(opened.train, COUNTS[-1], opened.spec.seed), opened.spec, COUNTS[-1])
        many: Example = contiguous(next(iter(batches))[0])
    except (MicronetError, StopIteration):  # the data may have been moved since
        many = example_of(described, COUNTS[-1])
    fewer: Iterator[Example] = (head(many, count) for count in COUNTS)
    return next((some for some in fewer if not _selects_none(artifact, some)), many)


def _selects_none(artifact: Artifact, example: Example) -> bool:
    """Return True if a network's forward selects elements by a mask, and there are none."""
    model, watching = artifact.model, _Selections()
    try:
        with state_kept(model), eval_mode(model), no_grad(), watching:
            model(*as_inputs(model, example))
    except Exception:  # the user's forward may raise anything; tracing says it better
        return False
    return watching.none


class _Selections(TorchFunctionMode):
    """Notes whether a mask selects nothing."""

    none = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function, and look at what it selects."""
        result, name = func(*args, **(kwargs or {})), getattr(func, "__name__", "")
        if name in ops.SELECTS.methods or (name == "__getitem__" and _holds_tensors(args[1])):
            self.none |= any(isinstance(x, Tensor) and not x.numel() for x in tree_leaves(result))
        return result


def _holds_tensors(index: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in tree_leaves(index))
