"""Cutting channels out of weights for real, and rebuilding the same smaller layers from a record."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from micronet.pruning.flow import Flow
from micronet.pruning.numbering import FIXED, STRIDE, Ids
from micronet.pruning.step import Layer

Sizes = dict[str, int]
_VECTORS = ("weight", "bias", "running_mean", "running_var")


def resize(module: Any, sizes: Sizes) -> None:
    """Give a layer other sizes, by its attributes' names, and new tensors of the shapes that follow, unfilled.

    Raises AttributeError or ValueError where the layer has no such sizes.
    """
    for name, size in sizes.items():
        if not isinstance(getattr(module, name), int) or size < 1:
            raise ValueError(f"{name} of {type(module).__name__} cannot be {size}")
        setattr(module, name, size)
    for name in _VECTORS:
        old: Tensor | None = getattr(module, name, None)
        if old is None:
            continue
        new = torch.empty(_shape(module, name), dtype=old.dtype, device=old.device)
        if isinstance(old, nn.Parameter):
            setattr(module, name, nn.Parameter(new, requires_grad=old.requires_grad))
        else:
            setattr(module, name, new)


def changed_layers(old: Flow, new: Flow) -> list[str]:
    """Return the convolutions and linear layers that have fewer inputs or outputs in a new flow."""
    return [name for name, layer in old.layers.items() if _lengths(layer) != _lengths(new.layers[name])]


def _lengths(layer: Layer) -> tuple[int, int | None]:
    return len(layer.outputs), None if layer.inputs is None else len(layer.inputs)


@torch.no_grad()
def cut(model: nn.Module, old: Flow, new: Flow, kept: dict[int, list[int]]) -> dict[str, Sizes]:
    """Cut every layer of a model to the channels kept, in place; return the new sizes of those that changed.

    ``old``, ``new``: the flow of channels before and with the new widths. ``kept``: group -> old channel of each new.
    """
    changed: dict[str, Sizes] = {}
    for name in changed_layers(old, new):
        layer = old.layers[name]
        module: Any = model.get_submodule(name)
        outputs = positions(layer.outputs, new.layers[name].outputs, kept)
        inputs = None
        if layer.inputs is not None and (after := new.layers[name].inputs) is not None:
            inputs = positions(layer.inputs, after, kept)
        whole = old.loses_groups(name)
        weight = _columns(module, outputs, inputs, whole)
        bias = None if module.bias is None else module.bias[outputs]
        changed[name] = _sizes(module, len(outputs), None if inputs is None else len(inputs), whole)
        resize(module, changed[name])
        module.weight.copy_(weight)
        if bias is not None:
            module.bias.copy_(bias)
    for name, ids in old.norms.items():
        norm: Any = model.get_submodule(name)
        places = positions(ids, new.norms[name], kept)
        if len(places) < len(ids):
            vectors = {key: getattr(norm, key)[places] for key in _VECTORS if getattr(norm, key, None) is not None}
            changed[name] = {_vector_size(norm): len(places)}
            resize(norm, changed[name])
            for key, vector in vectors.items():
                getattr(norm, key).copy_(vector)
    return changed


def _columns(module: Any, rows: Tensor, inputs: Tensor | None, whole_groups: bool) -> Tensor:
    """Return a weight's rows with the input channels kept; in a grouped convolution each group's own."""
    groups = getattr(module, "groups", 1)
    if getattr(module, "transposed", False):  # (inputs, outputs / groups, ...)
        whole: Tensor = module.weight if inputs is None else module.weight[inputs]
        return whole[:, rows] if groups == 1 else whole
    weight: Tensor = module.weight[rows]
    if inputs is None:
        return weight
    if groups == 1:
        return weight[:, inputs]
    if groups == module.in_channels or whole_groups:  # a row keeps its columns, which are its own
        return weight
    width = module.in_channels // groups
    pieces = zip(weight.chunk(groups), inputs.chunk(groups), strict=True)
    return torch.cat([piece[:, columns - group * width] for group, (piece, columns) in enumerate(pieces)])


def positions(old: Ids, new: Ids, kept: dict[int, list[int]]) -> Tensor:
    """Return where in the old tensor each channel of the new one is; ``kept``: group -> old channel of each new."""
    places: dict[int, list[int]] = {}
    for position, number in enumerate(old.tolist()):
        places.setdefault(number, []).append(position)
    seen: dict[int, int] = {}
    found = []
    for number in new.tolist():
        group, channel = divmod(number, STRIDE)
        was = FIXED if number == FIXED else group * STRIDE + kept[group][channel]
        occurrence = seen.get(was, 0)  # a channel that was flattened has several positions, in order
        seen[was] = occurrence + 1
        found.append(places[was][occurrence])
    return torch.from_numpy(np.array(found, dtype=np.int64))


def _sizes(module: Any, outputs: int, inputs: int | None, whole_groups: bool) -> Sizes:
    """Return the sizes of a layer that change."""
    if isinstance(module, nn.Linear):
        wanted = {"in_features": inputs or module.in_features, "out_features": outputs}
    else:
        wanted = {"in_channels": inputs or module.in_channels, "out_channels": outputs}
        if module.groups == module.in_channels > 1:
            wanted["groups"] = wanted["in_channels"]
        if whole_groups:
            wanted["groups"] = wanted["in_channels"] // (module.in_channels // module.groups)
    return {name: size for name, size in wanted.items() if getattr(module, name) != size}


def _vector_size(norm: nn.Module) -> str:
    return "num_parameters" if isinstance(norm, nn.PReLU) else "num_features"


def _shape(module: Any, name: str) -> tuple[int, ...]:
    if isinstance(module, nn.Linear):
        return (module.out_features, module.in_features) if name == "weight" else (module.out_features,)
    if isinstance(module, nn.modules.conv._ConvNd):
        if name == "bias":
            return (module.out_channels,)
        ends = module.out_channels, module.in_channels // module.groups
        if module.transposed:
            ends = module.in_channels, module.out_channels // module.groups
        return (*ends, *module.kernel_size)
    return (getattr(module, _vector_size(module)),)
