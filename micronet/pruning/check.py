"""Checking that a pruned network computes what the whole network computes with the cut channels set to zero."""

from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn

from micronet.errors import MicronetError, first_line
from micronet.graph.graph_module import GraphModule
from micronet.graph.uncompiled import uncompiled_modules
from micronet.models.device import Example, as_inputs, first_of_large
from micronet.models.modes import copy_model, random_kept
from micronet.models.outputs import tensors_in
from micronet.models.transformer import splittable_attentions
from micronet.pruning.channel_map import ChannelMap
from micronet.pruning.cut import Keep, positions
from micronet.pruning.ids import FIXED, STRIDE, Ids
from micronet.pruning.traced_network import TracedNetwork, trace_network

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # relative; sums are added up in another order
OUTPUT = "the output"
FAILS = "does not run"

PreHook = Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]
Computed = tuple[str, Tensor, float]  # a layer's name or ``OUTPUT``, its values and the scale of their rounding errors


def check_cut(pruned: nn.Module, old: ChannelMap, new: ChannelMap, keep: Keep, example: Example) -> str:
    """Compare a pruned network (``new``) with the whole one (``old``), by layer; return what it does wrong or "".

    The forward in training mode is compared as well if it differs from the one in eval mode and is not random. Large
    inputs are compared by one sample, unless the networks need more. Raises MicronetError if the whole network outputs
    NaN or infinity.
    """
    first = first_of_large(example)
    wrong = FAILS if first is None else _check(pruned, old, new, keep, first)
    return _check(pruned, old, new, keep, example) if wrong.startswith(FAILS) else wrong


@torch.no_grad()
def _check(pruned: nn.Module, old: ChannelMap, new: ChannelMap, keep: Keep, example: Example) -> str:
    whole = old.network
    try:
        traced = trace_network(pruned, example) if whole.plain else None
    except MicronetError as error:
        return _does_not_run(error)
    uncalled = {f"{name}.out_proj" for name in splittable_attentions(pruned)}  # torch's attention calls no layers
    called = dict((pruned if traced is None else traced.model).named_modules()).keys() - uncalled
    masks = {name: _zero_cut(layer.inputs, keep) for name, layer in old.layers.items() if layer.inputs is not None}
    layers = {name: (layer, new.layers[name]) for name, layer in old.layers.items() if name in called}
    places = {name: positions(before.outputs, after.outputs, keep) for name, (before, after) in layers.items()}
    everything = {name: torch.arange(len(after.outputs)) for name, (_, after) in layers.items()}
    for training in [False, True][: len(whole.graphs)]:
        model = _in_mode(whole, training)
        plain = pruned if traced is None else _in_mode(traced, training)
        if training and _is_random(model, example, places, masks):
            continue
        for dtype in (torch.float64, torch.float32):  # a forward that casts to float32 does not run in float64
            try:
                expected = _run(model, example, dtype, training, places, masks)
                actual = _run(plain, example, dtype, training, everything, {})
                own = _run(pruned, example, dtype, training, {}, {}) if plain is not pruned else []
                outputs = [computed for computed in actual if computed[0] == OUTPUT]
                if dtype == torch.float32 or not own or not _difference(outputs, own, dtype):
                    break  # in float64, a recording may differ from its network: see ``_in_mode``
            except (RuntimeError, ValueError, TypeError, AssertionError) as error:
                if dtype == torch.float32:
                    return _does_not_run(error)
        if not all(bool(values.isfinite().all()) for name, values, _ in expected if name == OUTPUT):
            raise MicronetError(
                "the network outputs NaN or infinity for the example input, so the pruned network cannot be "
                "verified; check its weights for NaN or very large values"
            )
        if at := _difference(expected, actual, dtype) or (own and _difference(outputs, own, dtype)):
            return f"computes wrong values (first difference: {at})"
    return ""


def _in_mode(network: TracedNetwork, training: bool) -> nn.Module:
    """Return a network whose layers all have names, in a mode: itself, or a trace of it with plain layers.

    A recording fixes types as they were in float32, such as that of a detector's anchors: it is less exact in float64.
    """
    if not network.plain:
        return network.given
    if not training or len(network.graphs) == 1:
        return network.model
    return GraphModule(network.model, network.graphs[1])


def _is_random(model: nn.Module, example: Example, places: dict[str, Tensor], masks: dict[str, PreHook]) -> bool:
    """Return True if the whole network draws random numbers in training mode, or does not run there."""
    before = torch.get_rng_state()
    try:
        first, second = (_run(model, example, torch.float32, True, places, masks) for _ in range(2))
    except Exception:  # a user's forward may raise anything
        return True
    drawn = not torch.equal(before, torch.get_rng_state())  # two draws may be equal
    return drawn or any(not torch.equal(x, y) for (_, x, _), (_, y, _) in zip(first, second, strict=True))


def _does_not_run(error: Exception) -> str:
    return f"{FAILS} ({first_line(error)})"


def _difference(expected: list[Computed], actual: list[Computed], dtype: torch.dtype) -> str:
    """Return the name of the first thing that differs between two forwards, or ""."""
    for (name, want, scale), (other, have, _) in zip(expected, actual, strict=True):
        if name != other or want.shape != have.shape or not (have - want).norm() <= TOLERANCE[dtype] * scale:
            return name
    return ""


def _run(
    model: nn.Module,
    example: Example,
    dtype: torch.dtype,
    training: bool,
    places: dict[str, Tensor],
    masks: dict[str, PreHook],
) -> list[Computed]:
    """Run a copy of a network, so that only one copy exists at a time."""
    exact = _in_precision(copy_model(model), dtype).train(training)
    records: list[Computed] = []
    for module in exact.modules():  # batch statistics and dropout would hide differences
        module.training &= not module.__module__.startswith("torch.nn.")
    for name, mask in masks.items():
        exact.get_submodule(name).register_forward_pre_hook(mask)
    for name, channels in places.items():
        exact.get_submodule(name).register_forward_hook(_record(name, channels, records))
    with uncompiled_modules(), nullcontext() if training else random_kept(model):
        if not training:  # noise in eval mode, as of a variational autoencoder: the same for every network
            torch.manual_seed(0)
        outputs = exact(*as_inputs(exact, example))
    leaves = [(torch.view_as_real(leaf) if leaf.is_complex() else leaf).to(dtype) for leaf in tensors_in(outputs)]
    return records + [(OUTPUT, leaf, float(leaf.norm())) for leaf in leaves]


def _in_precision(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a network with all its numbers in one precision; ``Module.to`` would make complex ones real."""
    tensors = [*model.parameters(), *model.buffers()]
    if not any(tensor.is_complex() for tensor in tensors):
        return model.to(dtype)
    for tensor in tensors:
        if tensor.is_complex() or tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype.to_complex() if tensor.is_complex() else dtype)
    return model


def _record(name: str, channels: Tensor, records: list[Computed]) -> Callable[..., None]:
    """Return a hook that stores some channels of a layer's output, and the size of the terms that it adds up."""

    def hook(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        scale = 0.0
        with suppress(AttributeError):  # a hook or a parametrization may compute the weight
            scale = float(module.weight.norm() * inputs[0].norm())
        axis = output.dim() - 1 if isinstance(module, nn.Linear) else 1
        selected = output.index_select(axis, channels.to(output.device))
        records.append((name, selected, scale + float(selected.norm())))

    return hook


def _zero_cut(ids: Ids, keep: Keep) -> PreHook:
    """Return a hook that sets the channels of a layer's input that are cut to zero."""
    staying = {group: set(channels) for group, channels in keep.items()}
    mask = torch.tensor([i == FIXED or i % STRIDE in staying[i // STRIDE] for i in ids.tolist()])

    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x = inputs[0]
        shape = [-1] if isinstance(module, nn.Linear) else [1, -1, *[1] * (x.dim() - 2)]
        return (x * mask.to(x).view(shape), *inputs[1:])

    return hook
