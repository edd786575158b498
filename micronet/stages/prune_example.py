"""The inputs along which ``prune`` follows channels: they should reach every layer."""

from typing import Any

from torch import Tensor, nn, no_grad
from torch.utils._pytree import tree_leaves

from micronet.artifact.artifact import Artifact
from micronet.data.batches import eval_batches
from micronet.data.dataset import DataSpec
from micronet.data.memory import MemoryData
from micronet.data.samples import example_of
from micronet.data.split import random_subset
from micronet.errors import MicronetError
from micronet.models.device import Example, as_inputs, contiguous
from micronet.models.modes import eval_mode, state_kept
from micronet.stages.config import DataConfig
from micronet.stages.inputs import example_input, open_data

MANY = 64  # samples, which reach all experts of a mixture more likely than two do


def pruning_example(artifact: Artifact, data: DataConfig, input_shape: str | None) -> Example:
    """Return inputs for a network: two of them, or more if some layers compute nothing from two.

    Experts in a mixture compute only from the samples that are routed to them. Those of the data are taken if there
    are any, for random ones may all be routed alike.
    """
    if isinstance(data.data, MemoryData):
        example: Example = data.data.inputs(artifact.model, 1)[0]
        return example
    two = example_input(artifact, input_shape)
    described = DataSpec.from_json(artifact.data).inputs
    if described is None or input_shape is not None or _reaches_all(artifact.model, two):
        return two
    try:
        opened = open_data(data, artifact)
        batches = eval_batches(random_subset(opened.train, MANY, opened.spec.seed), opened.spec, MANY)
        chosen: Example = contiguous(next(iter(batches))[0])
        return chosen
    except (MicronetError, StopIteration):  # the data may have been moved since
        return example_of(described, MANY)


def _reaches_all(model: nn.Module, example: Example) -> bool:
    """Return True unless a layer with weights is never called, or only without samples."""
    waiting = {module for module in model.modules() if any(True for _ in module.parameters(recurse=False))}

    def note(module: nn.Module, given: tuple[Any, ...]) -> None:
        if all(x.numel() for x in tree_leaves(given) if isinstance(x, Tensor)):
            waiting.discard(module)

    hooks = [module.register_forward_pre_hook(note) for module in waiting]
    try:
        with state_kept(model), eval_mode(model), no_grad():
            model(*as_inputs(model, example))
    except Exception:  # the user's forward may raise anything; tracing says it better
        return True
    finally:
        for hook in hooks:
            hook.remove()
    return not waiting
