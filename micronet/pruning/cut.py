"""Removing channels from weights, and rebuilding the same smaller layers from a record."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from micronet.graph import ops
from micronet.pruning.channel_map import ChannelMap
from micronet.pruning.group_table import LayerChannels
from micronet.pruning.ids import FIXED, STRIDE, Ids

Sizes = dict[str, int]
Keep = Mapping[int, list[int]]  # group -> the old channel of each new one
_TENSORS = ("weight", "bias", "running_mean", "running_var")


def resize(module: Any, sizes: Sizes) -> None:
    """Give a layer other sizes (attribute, for example ``in_channels``, -> size) and new tensors without values.

    Raises AttributeError or ValueError if the layer has no such sizes, or a size is below 1.
    """
    for name, size in sizes.items():
        if not isinstance(getattr(module, name), int) or size < 1:
            raise ValueError(f"{name} of {type(module).__name__} cannot be {size}")
        setattr(module, name, size)
    for name in _TENSORS:
        old: Tensor | None = getattr(module, name, None)
        if old is None:
            continue
        new = torch.empty(_shape(module, name), dtype=old.dtype, device=old.device)
        if isinstance(old, nn.Parameter):
            setattr(module, name, nn.Parameter(new, requires_grad=old.requires_grad))
        else:
            setattr(module, name, new)


def changed_layers(old: ChannelMap, new: ChannelMap) -> list[str]:
    """Return the convolutions and linear layers that have fewer inputs or outputs in a new map."""
    return [name for name, layer in old.layers.items() if _lengths(layer) != _lengths(new.layers[name])]


def _lengths(layer: LayerChannels) -> tuple[int, int | None]:
    return len(layer.outputs), None if layer.inputs is None else len(layer.inputs)


@torch.no_grad()
def cut_channels(model: nn.Module, old: ChannelMap, new: ChannelMap, keep: Keep) -> dict[str, Sizes]:
    """Cut every layer of a network in place, from ``old`` to ``new`` widths; return the new sizes of changed layers."""
    changed: dict[str, Sizes] = {}
    for name in changed_layers(old, new):
        layer = old.layers[name]
        module: Any = model.get_submodule(name)
        outputs = positions(layer.outputs, new.layers[name].outputs, keep)
        inputs = None
        if layer.inputs is not None and (after := new.layers[name].inputs) is not None:
            inputs = positions(layer.inputs, after, keep)
        whole_groups = old.loses_whole_groups(name)
        weight = _cut_weight(module, outputs, inputs, whole_groups)
        bias = None if module.bias is None else module.bias[outputs]
        changed[name] = _sizes(module, len(outputs), None if inputs is None else len(inputs), whole_groups)
        resize(module, changed[name])
        module.weight.copy_(weight)
        if bias is not None:
            module.bias.copy_(bias)
    for name, ids in old.norms.items():
        norm: Any = model.get_submodule(name)
        places = positions(ids, new.norms[name], keep)
        if len(places) < len(ids):
            vectors = {key: getattr(norm, key)[places] for key in _TENSORS if getattr(norm, key, None) is not None}
            changed[name] = {_width_attribute(norm): len(places)}
            resize(norm, changed[name])
            for key, vector in vectors.items():
                getattr(norm, key).copy_(vector)
    return changed


def positions(old: Ids, new: Ids, keep: Keep) -> Tensor:
    """Return the position in the old tensor of each channel of the new one, int64."""
    places: dict[int, list[int]] = {}
    for position, channel_id in enumerate(old.tolist()):
        places.setdefault(channel_id, []).append(position)
    seen: dict[int, int] = {}
    found = []
    for channel_id in new.tolist():
        group, channel = divmod(channel_id, STRIDE)
        source = FIXED if channel_id == FIXED else group * STRIDE + keep[group][channel]
        occurrence = seen.get(source, 0)  # a flattened channel has several positions, in order
        seen[source] = occurrence + 1
        found.append(places[source][occurrence])
    return torch.from_numpy(np.array(found, dtype=np.int64))


def _cut_weight(module: Any, rows: Tensor, inputs: Tensor | None, whole_groups: bool) -> Tensor:
    """Return some rows of a weight with the input channels that stay; in a grouped convolution group by group."""
    groups = getattr(module, "groups", 1)
    if getattr(module, "transposed", False):  # (inputs, outputs / groups, ...)
        read: Tensor = module.weight if inputs is None else module.weight[inputs]
        return read[:, rows] if groups == 1 else read
    weight: Tensor = module.weight[rows]
    if inputs is None:
        return weight
    if groups == 1:
        return weight[:, inputs]
    if groups == module.in_channels or whole_groups:  # a row's columns belong to its own group
        return weight
    width = module.in_channels // groups
    pieces = zip(weight.chunk(groups), inputs.chunk(groups), strict=True)
    return torch.cat([piece[:, columns - group * width] for group, (piece, columns) in enumerate(pieces)])


def _sizes(module: Any, outputs: int, inputs: int | None, whole_groups: bool) -> Sizes:
    """Return the sizes of a layer that change."""
    if isinstance(module, nn.Linear):
        new = {"in_features": inputs or module.in_features, "out_features": outputs}
    else:
        new = {"in_channels": inputs or module.in_channels, "out_channels": outputs}
        if module.groups == module.in_channels > 1:
            new["groups"] = new["in_channels"]
        if whole_groups:
            new["groups"] = new["in_channels"] // (module.in_channels // module.groups)
    return {name: size for name, size in new.items() if getattr(module, name) != size}


def _width_attribute(norm: nn.Module) -> str:
    return "num_parameters" if isinstance(norm, nn.PReLU) else "num_features"


def _shape(module: Any, name: str) -> tuple[int, ...]:
    if isinstance(module, nn.Linear):
        return (module.out_features, module.in_features) if name == "weight" else (module.out_features,)
    if isinstance(module, ops.CONVOLUTIONS):
        if name == "bias":
            return (module.out_channels,)
        ends = module.out_channels, module.in_channels // module.groups
        if module.transposed:
            ends = module.in_channels, module.out_channels // module.groups
        return (*ends, *module.kernel_size)
    return (getattr(module, _width_attribute(module)),)
