"""Is a cut network the whole one with its cut channels silenced? Its outputs are held against it, and every layer's."""

import copy
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from micronet.errors import FailedError, MicronetError, first_line
from micronet.models.inputs import Example, as_inputs
from micronet.models.transformer import splittable_attentions
from micronet.pruning.cut import positions
from micronet.pruning.flow import Flow
from micronet.pruning.numbering import FIXED, STRIDE, Ids

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # relative, of sums in another order

PreHook = Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]


@dataclass
class _Seen:
    """What a forward gave: the network's outputs, and each layer's with the scale that its rounding errors have."""

    outputs: list[Tensor]
    layers: list[tuple[str, Tensor, float]]


@torch.no_grad()
def check(pruned: nn.Module, old: Flow, new: Flow, kept: dict[int, list[int]], ex: Example) -> None:
    """Raise FailedError where the cut network's output is not that of the whole one with cut channels silenced.

    ``old``, ``new``: the flow of channels before and after. ``kept``: group -> old channel of each new. The forward
    of training is held against the whole one's too, where it is another and does not draw at random.
    """
    model = old.network.model
    uncalled = {f"{name}.out_proj" for name in splittable_attentions(pruned)}  # an attention left whole calls no layers
    called = dict(pruned.named_modules()).keys() - uncalled
    silencers = {name: _silence(layer.inputs, kept) for name, layer in old.layers.items() if layer.inputs is not None}
    places = {
        name: positions(layer.outputs, new.layers[name].outputs, kept)
        for name, layer in old.layers.items()
        if name in called
    }
    everything = {name: torch.arange(len(new.layers[name].outputs)) for name in places}
    dtype = torch.float64
    for training in [False, True][: len(old.network.graphs)]:
        try:
            wanted = _run(model, ex, dtype, training, places, silencers)
        except RuntimeError:  # a forward that casts to float32 does not run in float64
            dtype = torch.float32
            wanted = _run(model, ex, dtype, training, places, silencers)
        if training and _differ(wanted, _run(model, ex, dtype, training, places, silencers), dtype):
            continue
        try:
            found = _run(pruned, ex, dtype, training, everything, {})
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            raise FailedError(f"the pruned network does not run, which is a bug: {first_line(error)}") from error
        if not all(bool(leaf.isfinite().all()) for leaf in wanted.outputs):
            raise MicronetError(
                "the network gives NaN or infinity, so nothing of it can be judged; look at its weights"
            )
        if at := _differ(wanted, found, dtype):
            raise FailedError(
                f"the pruned network does not compute what it should ({at} differs), which is a bug; "
                "nothing was written; go on with --exclude and that layer's name"
            )


def _differ(wanted: _Seen, found: _Seen, dtype: torch.dtype) -> str:
    """Return what is not the same in two forwards, or an empty string."""
    for (name, want, scale), (other, have, _) in zip(wanted.layers, found.layers, strict=True):
        if name != other or want.shape != have.shape or not (have - want).norm() <= TOLERANCE[dtype] * scale:
            return name
    for want, have in zip(wanted.outputs, found.outputs, strict=True):
        if want.shape != have.shape or not (have - want).norm() <= TOLERANCE[dtype] * want.norm():
            return "the output"
    return ""


def _run(
    model: nn.Module,
    example: Example,
    dtype: torch.dtype,
    training: bool,
    places: dict[str, Tensor],
    silencers: dict[str, PreHook],
) -> _Seen:
    """Run a copy of a network; only one such copy lives at a time."""
    exact = copy.deepcopy(model).to(dtype).train(training)
    layers: list[tuple[str, Tensor, float]] = []
    for module in exact.modules():  # batch statistics and dropout would hide what is compared
        module.training &= not module.__module__.startswith("torch.nn.")
    for name, silence in silencers.items():
        exact.get_submodule(name).register_forward_pre_hook(silence)
    for name, at in places.items():
        exact.get_submodule(name).register_forward_hook(_note(name, at, layers))
    inputs = as_inputs(exact, example)
    leaves = [leaf for leaf in tree_leaves(exact(*inputs)) if isinstance(leaf, Tensor)]
    return _Seen([leaf.to(dtype) for leaf in leaves], layers)


def _note(name: str, places: Tensor, layers: list[tuple[str, Tensor, float]]) -> Callable[..., None]:
    """Return a hook that notes a layer's output at some channels, and how large its sums' terms are."""

    def hook(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        scale = 0.0
        with suppress(AttributeError):  # weights that a hook or a parametrization makes need not be there
            scale = float(module.weight.norm() * inputs[0].norm())
        axis = output.dim() - 1 if isinstance(module, nn.Linear) else 1
        kept = output.index_select(axis, places.to(output.device))
        layers.append((name, kept, scale + float(kept.norm())))

    return hook


def _silence(ids: Ids, kept: dict[int, list[int]]) -> PreHook:
    """Return a hook that zeroes the channels of a layer's input that are cut."""
    staying = {group: set(channels) for group, channels in kept.items()}
    mask = torch.tensor([i == FIXED or i % STRIDE in staying[i // STRIDE] for i in ids.tolist()])

    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x = inputs[0]
        shape = [-1] if isinstance(module, nn.Linear) else [1, -1, *[1] * (x.dim() - 2)]
        return (x * mask.to(x).view(shape), *inputs[1:])

    return hook
