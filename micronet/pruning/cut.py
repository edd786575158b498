"""Removing channels from weights, and rebuilding the same smaller layers from a record."""

from collections import defaultdict, deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from micronet.graph import ops
from micronet.pruning.channel_map import ChannelMap
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
            raise ValueError(f"{name} of {type(module).__name__} cannot be set to {size}")
        setattr(module, name, size)
    for name in _TENSORS:
        old: Tensor | None = getattr(module, name, None)
        if old is None:
            continue
        new = torch.empty(_shape(module, name), dtype=old.dtype, device=old.device)
        setattr(module, name, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)


def changed_layers(old: ChannelMap, new: ChannelMap) -> list[str]:
    """Return the convolutions and linear layers that have fewer inputs or outputs in a new map."""
    ends = {name: (layer.ends, new.layers[name].ends) for name, layer in old.layers.items()}
    return [name for name, (before, after) in ends.items() if list(map(len, before)) != list(map(len, after))]


@torch.no_grad()
def cut_channels(model: nn.Module, old: ChannelMap, new: ChannelMap, keep: Keep) -> dict[str, Sizes]:
    """Cut every layer of a network in place, from ``old`` to ``new`` widths; return the new sizes of changed layers."""
    changed: dict[str, Sizes] = {}
    for name in changed_layers(old, new):
        before, after = old.layers[name], new.layers[name]
        module: Any = model.get_submodule(name)
        outputs, inputs = positions(before.outputs, after.outputs, keep), None
        if before.inputs is not None and after.inputs is not None:
            inputs = positions(before.inputs, after.inputs, keep)
        tensors = {"weight": _cut_weight(module, outputs, inputs, before.parts)}
        if module.bias is not None:
            tensors["bias"] = module.bias[outputs]
        changed[name] = _sizes(module, outputs, inputs, before.parts)
        _fill(module, changed[name], tensors)
    for name, ids in old.norms.items():
        norm: Any = model.get_submodule(name)
        places = positions(ids, new.norms[name], keep)
        if len(places) < len(ids):
            changed[name] = {_width_attribute(norm): len(places)}
            tensors = {key: getattr(norm, key)[places] for key in _TENSORS if getattr(norm, key, None) is not None}
            _fill(norm, changed[name], tensors)
    return changed


def positions(old: Ids, new: Ids, keep: Keep) -> Tensor:
    """Return the position in the old tensor of each channel of the new one, int64."""
    places: dict[int, deque[int]] = defaultdict(deque)  # a flattened channel has several positions, in order
    for position, channel_id in enumerate(old.tolist()):
        places[channel_id].append(position)
    found = []
    for channel_id in new.tolist():
        group, channel = divmod(channel_id, STRIDE)
        source = FIXED if channel_id == FIXED else group * STRIDE + keep[group][channel]
        found.append(places[source].popleft())
    return torch.tensor(found, dtype=torch.int64)


def _cut_weight(module: Any, rows: Tensor, inputs: Tensor | None, parts: int) -> Tensor:
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
    if parts == 1:  # a row's columns belong to its own group
        return weight
    width = module.in_channels // groups
    pieces = zip(weight.chunk(groups), inputs.chunk(groups), strict=True)
    return torch.cat([piece[:, columns - group * width] for group, (piece, columns) in enumerate(pieces)])


def _sizes(module: Any, outputs: Tensor, inputs: Tensor | None, parts: int) -> Sizes:
    """Return the sizes of a layer that change."""
    kind = "features" if isinstance(module, nn.Linear) else "channels"
    before = getattr(module, f"in_{kind}")
    new = {f"in_{kind}": before if inputs is None else len(inputs), f"out_{kind}": len(outputs)}
    if parts == 1 < getattr(module, "groups", 1):  # whole groups go
        new["groups"] = new["in_channels"] // (before // module.groups)
    return {name: size for name, size in new.items() if getattr(module, name) != size}


def _fill(module: Any, sizes: Sizes, tensors: Mapping[str, Tensor]) -> None:
    resize(module, sizes)
    for name, tensor in tensors.items():
        getattr(module, name).copy_(tensor)


def _width_attribute(norm: nn.Module) -> str:
    return "num_parameters" if isinstance(norm, nn.PReLU) else "num_features"


def _shape(module: Any, name: str) -> tuple[int, ...]:
    if isinstance(module, nn.Linear):
        return (module.out_features, module.in_features)[: 2 if name == "weight" else 1]
    if not isinstance(module, ops.CONVOLUTIONS):
        return (getattr(module, _width_attribute(module)),)
    if name == "bias":
        return (module.out_channels,)
    ends = module.out_channels, module.in_channels // module.groups
    if module.transposed:
        ends = module.in_channels, module.out_channels // module.groups
    return (*ends, *module.kernel_size)
