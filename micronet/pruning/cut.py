"""Removing channels from weights, and rebuilding the same smaller layers from a record."""

from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from micronet.graph import ops
from micronet.graph.plain import PlainLayer, bound
from micronet.pruning.attributes import set_attribute, set_attributes
from micronet.pruning.channel_map import ChannelMap
from micronet.pruning.ids import FIXED, STRIDE, Ids

Sizes = dict[str, int]
Keep = Mapping[int, list[int]]  # group -> the old channel of each new one
_TENSORS = ("weight", "bias", "running_mean", "running_var")


def resize(module: Any, sizes: Sizes) -> None:
    """Give a layer other sizes (attribute, for example ``in_channels``, -> size) and new tensors without values.

    Raises AttributeError or ValueError if the layer has no such sizes, or a size is below 1.
    """
    _set_sizes(module, sizes)
    for name in _TENSORS:
        if (old := getattr(module, name, None)) is not None:
            setattr(module, name, _empty(old, _shape(module, name)))


def _set_sizes(module: Any, sizes: Mapping[str, int]) -> None:
    for name, size in sizes.items():
        if not isinstance(getattr(module, name), int) or size < 1:
            raise ValueError(f"{name} of {type(module).__name__} cannot be set to {size}")
        setattr(module, name, size)


def _empty(old: Tensor, shape: Sequence[int]) -> Tensor:
    if len(shape) != old.dim() or any(not 0 < size <= whole for size, whole in zip(shape, old.shape, strict=True)):
        raise ValueError(f"a tensor of shape {tuple(old.shape)} cannot be cut to {tuple(shape)}")
    new = torch.empty(tuple(shape), dtype=old.dtype, device=old.device)
    return nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new


@contextmanager
def _names_kept(model: nn.Module) -> Iterator[None]:
    """Let all names of a parameter, as in a list of parameters beside the layers, name the one that replaces it."""
    names: dict[nn.Parameter, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[parameter].append(name)
    yield
    for old, several in ((old, each) for old, each in names.items() if len(each) > 1):
        now = {name: attrgetter(name)(model) for name in several}
        new = next((parameter for parameter in now.values() if parameter is not old), old)
        for name in (name for name, parameter in now.items() if parameter is old is not new):
            owner, _, own = name.rpartition(".")
            setattr(model.get_submodule(owner), own, new)


def changed_layers(old: ChannelMap, new: ChannelMap) -> list[str]:
    """Return the convolutions and linear layers that have fewer inputs or outputs in a new map."""
    ends = {name: (layer.ends, new.layers[name].ends) for name, layer in old.layers.items()}
    return [name for name, (before, after) in ends.items() if list(map(len, before)) != list(map(len, after))]


@torch.no_grad()
def cut_channels(
    model: nn.Module, old: ChannelMap, new: ChannelMap, keep: Keep, *, attributes: bool = True
) -> dict[str, Any]:
    """Cut every layer of a network in place, from ``old`` to ``new`` widths; return the result that a record keeps.

    ``attributes``: also set those of the user's modules that hold a size of a layer written by hand.
    """
    cutter = _Cutter(model, old.network.plain, attributes)
    with _names_kept(model):
        _cut_tensors(model, cutter, old, new, keep)
    for owner, values in set_attributes(model, new.attributes.changed).items():
        cutter.result.setdefault("attributes", {}).setdefault(owner, {}).update(values)
    return cutter.result


def _cut_tensors(model: nn.Module, cutter: "_Cutter", old: ChannelMap, new: ChannelMap, keep: Keep) -> None:
    for name in changed_layers(old, new):
        before, after = old.layers[name], new.layers[name]
        module = cutter.layer(name)
        outputs, inputs = positions(before.outputs, after.outputs, keep), None
        if before.inputs is not None and after.inputs is not None:
            inputs = positions(before.inputs, after.inputs, keep)
        tensors = {"weight": _cut_weight(module, outputs, inputs, before.parts)}
        if module.bias is not None:
            tensors["bias"] = module.bias[outputs]
        cutter.fill(name, module, _sizes(module, outputs, inputs, before.parts), tensors)
    for name, ids in old.norms.items():
        norm = cutter.layer(name)
        places = positions(ids, new.norms[name], keep)
        if len(places) < len(ids):
            tensors = {key: getattr(norm, key)[places] for key in _TENSORS if getattr(norm, key, None) is not None}
            cutter.fill(name, norm, _norm_sizes(norm, len(places)), tensors)
    for name, (axis, ids) in old.tensors.items():
        places = positions(ids, new.tensors[name].ids, keep)
        if len(places) < len(ids):
            tensor = attrgetter(name)(model)
            cutter.fill_tensor(name, tensor.index_select(axis, places.to(tensor.device)))


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


class _Cutter:
    """Finds a network's layers, plain ones included, and gives them their new sizes and values.

    ``result``: the new ``sizes`` of torch's layers; for layers written otherwise, the shapes of the user's ``tensors``
    and those integer ``attributes`` of their modules that hold such a size.
    """

    def __init__(self, model: nn.Module, plain: Mapping[str, PlainLayer], attributes: bool) -> None:
        self.result: dict[str, Any] = {"sizes": {}}
        self._model, self._plain, self._attributes = model, plain, attributes

    def layer(self, name: str) -> Any:
        return bound(self._plain[name], self._model) if name in self._plain else self._model.get_submodule(name)

    def fill(self, name: str, module: Any, sizes: Sizes, tensors: Mapping[str, Tensor]) -> None:
        resize(module, sizes)
        for key, tensor in tensors.items():
            getattr(module, key).copy_(tensor)
        if name not in self._plain:
            self.result["sizes"][name] = sizes
            return
        layer = self._plain[name]
        for place in (layer.tensors[key] for key in tensors):
            owner_name, _, _ = place.rpartition(".")
            owner = self._model.get_submodule(owner_name)
            own = {key: new for key, new in sizes.items() if getattr(owner, key, None) == getattr(layer.module, key)}
            if own and self._attributes:
                _set_sizes(owner, own)
                self.result.setdefault("attributes", {}).setdefault(owner_name, {}).update(own)
        for key in tensors:
            self.fill_tensor(layer.tensors[key], getattr(module, key))

    def fill_tensor(self, place: str, tensor: Tensor) -> None:
        """Replace a parameter or buffer of the user's."""
        owner, _, name = place.rpartition(".")
        old = attrgetter(place)(self._model)
        if isinstance(old, nn.Parameter) and not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, old.requires_grad)
        setattr(self._model.get_submodule(owner), name, tensor)
        self.result.setdefault("tensors", {})[place] = list(tensor.shape)


def restore_cut(model: nn.Module, result: Mapping[str, Any]) -> None:
    """Give a network's layers the sizes that a record's result describes, without values.

    Raises AttributeError or ValueError if the network has no such layers, tensors or sizes.
    """
    with _names_kept(model):
        for name, sizes in result["sizes"].items():
            resize(model.get_submodule(name), sizes)
        for place, shape in result.get("tensors", {}).items():
            owner, _, name = place.rpartition(".")
            setattr(model.get_submodule(owner), name, _empty(attrgetter(place)(model), shape))
    for owner, values in result.get("attributes", {}).items():
        for name, value in values.items():
            set_attribute(model.get_submodule(owner), name, value)


def _norm_sizes(norm: nn.Module, width: int) -> Sizes:
    """Return the sizes of a module with one value per channel for another number of channels."""
    sizes = {_width_attribute(norm): width}
    if isinstance(norm, nn.GroupNorm):  # whole groups go
        sizes["num_groups"] = width * norm.num_groups // norm.num_channels
    return sizes


def _width_attribute(norm: nn.Module) -> str:
    names = {nn.PReLU: "num_parameters", nn.GroupNorm: "num_channels"}
    return next((name for kind, name in names.items() if isinstance(norm, kind)), "num_features")


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
