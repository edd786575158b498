"""Which channel sits where in every layer of a network, found by running the traced forward on channel ids.

Each tensor is replaced by one of the same shape whose elements say which channel they belong to. A convolution or
linear layer assigns new ids to its outputs. Operations that only move values (views, permutations, shuffles,
concatenations, splits) run on the ids unchanged. Operations that combine values, such as additions, merge the groups of
their channels. Running the forward again with other widths shows where each channel sits in the pruned network. An
operation that is not supported pins its channels: they are never cut.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from micronet.graph import ops
from micronet.graph.trace import weight_owners
from micronet.pruning.call_kinds import batched_rank, call_kind, is_softmax, why_pinned, writes_part
from micronet.pruning.combining import combine_all
from micronet.pruning.group_table import ChannelGroup, GroupTable, LayerChannels
from micronet.pruning.heads import attend_ids
from micronet.pruning.ids import (
    FIXED,
    Ids,
    distinct,
    expand_from_axis,
    ids_along,
    is_whole_group,
    shuffle_channels,
    varies,
    without_ids,
)
from micronet.pruning.node_call import NodeCall, Reshape, find_reshape
from micronet.pruning.traced_network import Shape, TracedNetwork

_FIXED_SIZES = "the forward uses fixed sizes"


class ChannelMap:
    """The channel ids at every layer of a network.

    Attributes:
        network: The network.
        groups: The groups of channels that must be cut together, by root.
        table: All groups, including those merged into others.
        layers: Convolutions and linear layers by name.
        norms: Modules with one value per channel by name.
        grouped: (channels, n) of each layer that takes channels in n equal parts.
        reshapes: Reshapes by graph and node.
        scalars: By graph and node, channels and the plain numbers that they are combined with.
    """

    def __init__(
        self,
        network: TracedNetwork,
        widths: Mapping[int, int] | None = None,
        like: "ChannelMap | None" = None,
        pinned: Mapping[int, str] | None = None,
    ) -> None:
        """Run the forward on ids, with the ``widths`` of the groups of ``like``; ``pinned``: groups never to cut."""
        self.network = network
        self.layers: dict[str, LayerChannels] = {}
        self.norms: dict[str, Ids] = {}
        self.grouped: list[tuple[Ids, int]] = []
        self.reshapes: dict[tuple[int, str], Reshape] = {}
        self.scalars: dict[tuple[int, str], tuple[Ids, list[float]]] = {}
        self.table: GroupTable = GroupTable(widths, None if like is None else like.table, pinned)
        self._whole_group_layers: set[str] = set()
        self._unsupported: dict[str, str] = {}  # module -> why its channels are pinned
        self._modules = dict(network.model.named_modules())
        self._owners = weight_owners(network.model)
        for index, graph in enumerate(network.graphs):
            self._run(index, graph)
        self.groups: dict[int, ChannelGroup] = self._settle()

    @property
    def pinned(self) -> dict[int, str]:
        """The groups that are never cut, and why."""
        return {group: found.pinned for group, found in self.groups.items() if found.pinned}

    def with_widths(self, widths: Mapping[int, int]) -> "ChannelMap":
        """Return the map of the same network with other widths for its groups."""
        return ChannelMap(self.network, widths, self, self.pinned)

    def loses_whole_groups(self, name: str) -> bool:
        """Return True if a grouped convolution loses whole groups, not some channels of each group."""
        return name in self._whole_group_layers

    def parts(self, name: str) -> int:
        """Return the number of equal parts in which a layer takes its channels; 1 if channels may change parts."""
        module: Any = self._modules[name]
        groups: int = getattr(module, "groups", 1)
        return 1 if groups == getattr(module, "in_channels", 0) or self.loses_whole_groups(name) else groups

    def _run(self, index: int, graph: fx.Graph) -> None:
        values: dict[fx.Node, Any] = {}
        for node in graph.nodes:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            call = NodeCall(node, (index, node.name), list(args), dict(kwargs), self.network.results)
            values[node] = self._visit(call)

    def _visit(self, call: NodeCall) -> Any:
        node = call.node
        if node.op == "placeholder":
            return call.fixed_result()
        if node.op == "get_attr":
            owner, _, attribute = str(node.target).rpartition(".")
            self._unsupported[owner] = f"the forward reads its {attribute} directly"
            return call.fixed_result()
        if node.op == "output":
            return self._give_up(call, "its channels are the network's output")
        if not call.tensors:
            return call.fixed_result() if node.op == "call_module" else tree_map(without_ids, call.run())
        if node.op == "call_module":
            return self._visit_hooked(call, str(node.target), self._modules[str(node.target)])
        return self._visit_call(call)

    def _visit_hooked(self, call: NodeCall, name: str, module: Any) -> Any:
        result = self._visit_module(call, name, module)
        if not (module._forward_hooks or module._forward_pre_hooks):
            return result
        self._unsupported[name] = "a hook may change its input or its output"
        return self._give_up(call, f"{name} has a hook")

    def _visit_module(self, call: NodeCall, name: str, module: Any) -> Any:
        if isinstance(module, ops.CONVOLUTIONS):
            return self._convolve(call, name, module)
        if isinstance(module, nn.Linear):
            return self._multiply(call, name, module)
        if isinstance(module, (*ops.BATCH_NORMS, *ops.INSTANCE_NORMS)):
            return self._scale(call, name, module.affine or module.track_running_stats)
        if isinstance(module, nn.PReLU):
            return self._scale(call, name, module.num_parameters > 1)
        if isinstance(module, ops.MATCHES_CHANNELS.modules):
            return self._combine(call)
        if isinstance(module, ops.POOLS_CHANNELS.modules):
            return self._pool(call)
        if isinstance(module, nn.Softmax):
            return self._reduce(call, module.dim)
        if isinstance(module, ops.SHUFFLES):
            return self._move(call, lambda x: shuffle_channels(x, module.groups), module.groups)
        if isinstance(module, ops.MOVES_CHANNELS.modules):
            return self._move(call, module)
        self._unsupported[name] = reason = f"{type(module).__name__} {why_pinned(module)}"
        return self._give_up(call, f"{name}: {reason}")

    def _visit_call(self, call: NodeCall) -> Any:
        kind, target = call_kind(call.node), call.node.target
        if kind == "metadata":
            return call.run()
        if target is operator.getitem and any(isinstance(x, Tensor) for x in tree_leaves(call.args[1])):
            return self._give_up(call, "the forward indexes it with a tensor")
        if kind == "moving":
            return self._move(call)
        if writes_part(call.node):
            return self._give_up(call, "the forward writes into part of it")
        if target is F.pad and len(call.args[1]) // 2 <= call.tensors[0].dim() - 2:
            kind = "pooling"
        visit = {
            "combining": self._combine, "attending": self._attend, "reducing": self._reduce, "pooling": self._pool,
        }.get(kind)  # fmt: skip
        return visit(call) if visit else self._give_up(call, f"{call.name} in the forward {why_pinned(target)}")

    def _convolve(self, call: NodeCall, name: str, conv: Any) -> Tensor:
        x = call.tensors[0]
        batched = x.dim() == len(conv.kernel_size) + 2
        read = ids_along(x, 1) if batched else None
        if not batched:
            self._unsupported[name] = "its input has no batch axis"
        depthwise = conv.groups == conv.in_channels > 1
        if depthwise and read is not None and FIXED not in read:
            out: Ids = np.repeat(read, conv.out_channels // conv.in_channels)
        else:
            out = self.table.assign(name, conv.out_channels)
            if depthwise or (conv.transposed and conv.groups > 1):
                self._unsupported[name] = f"it is a {type(conv).__name__} with groups whose input cannot be cut"
            elif name in self.network.blocks and read is not None and is_whole_group(read, len(out)):
                self.table.merge(read, out)  # a convolution group's inputs and outputs go together
                self._whole_group_layers.add(name)
                self.table.add_block(out, self.network.blocks[name])
            elif conv.groups > 1:
                self.grouped += [(ids, conv.groups) for ids in (out, read) if ids is not None]
        self._record(call, name, read, out)
        return expand_from_axis(out, 1, (x.shape[0], len(out), *call.result[2:]))

    def _multiply(self, call: NodeCall, name: str, linear: nn.Linear) -> Tensor:
        x = call.tensors[0]
        out = self.table.assign(name, linear.out_features)
        self._record(call, name, ids_along(x, -1), out)
        return expand_from_axis(out, x.dim() - 1, (*x.shape[:-1], len(out)))

    def _attend(self, call: NodeCall) -> Any:
        found = attend_ids(call, self.table.widths)
        if found is None:
            return self._give_up(call, f"the attention heads of {call.node.name} cannot be identified")
        for heads in found.tied:
            self.table.merge(found.tied[0].ravel(), heads.ravel())
        self.table.add_block(heads, heads.shape[1])
        return found.ids

    def _record(self, call: NodeCall, name: str, read: Ids | None, out: Ids) -> None:
        if read is None:
            self._pin(call.tensors, f"{name} reads it with channels on more than one axis")
        if self._modules[name] not in self._owners:
            self._unsupported[name] = "its weight is shared or computed"
        if name not in self.layers:
            self.layers[name] = LayerChannels(read, out)
            return
        known = self.layers[name]  # called again: both inputs must be cut alike
        if known.inputs is None or read is None:
            self._unsupported[name] = "another of its inputs cannot be cut"
        else:
            self.table.merge(known.inputs, read)
        self.table.merge(known.outputs, out)

    def _scale(self, call: NodeCall, name: str, has_values: bool) -> Any:
        """Follow a module with one value per channel, or none at all."""
        x = call.tensors[0]
        fits = batched_rank(self._modules[name]) in (None, x.dim())
        if fits and not has_values:
            return x
        ids = ids_along(x, 1) if fits and x.dim() > 1 else None
        if ids is None or self._modules[name] not in self._owners:
            self._unsupported[name] = "its input cannot be cut"
            return self._give_up(call, f"{name} reads it with channels on another axis")
        self.table.merge(self.norms.setdefault(name, ids), ids)
        return x

    def _move(self, call: NodeCall, function: Callable[..., Any] | None = None, pieces: int = 1) -> Any:
        try:
            moved = call.run(function)
        except (RuntimeError, IndexError, TypeError, ValueError):  # fixed sizes that do not fit these widths
            return self._give_up(call, _FIXED_SIZES)
        if (found := find_reshape(call.tensors, moved, pieces)) is not None:
            self.reshapes[call.key] = found
        return moved

    def _pool(self, call: NodeCall) -> Any:
        x, ids = call.tensors[0], ids_along(call.tensors[0], 1)
        shapes = [leaf for leaf in tree_leaves(call.result) if isinstance(leaf, Shape)]
        operation = self._modules[str(call.node.target)] if call.node.op == "call_module" else call.node.target
        fits = batched_rank(operation) in (None, x.dim()) and len(shapes) == 1 and len(shapes[0]) == x.dim()
        if ids is None or not fits:
            return self._give_up(call, f"{call.node.name} pools over its channels, or its input has no batch axis")
        return expand_from_axis(ids, 1, (x.shape[0], len(ids), *shapes[0][2:]))

    def _reduce(self, call: NodeCall, dims: Any = None) -> Any:
        """Follow a reduction or a softmax over some axes."""
        x, dims = call.tensors[0], call.argument(1, "dim", call.kwargs.get("axis", dims))
        axes = list(range(x.dim())) if dims is None else [dims] if isinstance(dims, int) else list(dims)
        if call.node.users and any(varies(x, axis % x.dim()) for axis in axes):
            return self._give_up(call, f"{call.node.name} reduces over its channels")
        keepdim = bool(call.argument(2, "keepdim", False))
        return x if is_softmax(call.node) else torch.amin(x, axes, keepdim=keepdim)

    def _combine(self, call: NodeCall) -> Any:
        plain = [leaf for leaf in tree_leaves((call.args, call.kwargs)) if isinstance(leaf, (int, float))]
        self.scalars[call.key] = (np.concatenate([distinct(x) for x in call.tensors]), plain)
        try:
            out, combined = combine_all(call.tensors)
        except RuntimeError:  # fixed sizes that do not fit these widths
            return self._give_up(call, _FIXED_SIZES)
        for pair in combined:
            for x, why in pair.unmatched:
                self._pin([x], why)
            self.table.merge(*pair.equal)
        return out

    def _give_up(self, call: NodeCall, why: str) -> Any:
        self._pin(call.tensors, why)
        return call.fixed_result()

    def _pin(self, tensors: Sequence[Tensor], why: str) -> None:
        for x in tensors:
            self.table.pin(distinct(x), why)

    def _settle(self) -> dict[int, ChannelGroup]:
        """Replace every group by its root and return the groups."""
        table = self.table
        for name, why in self._unsupported.items():
            layer = self.layers.get(name)
            for ids in (self.norms.get(name), *([layer.inputs, layer.outputs] if layer else [])):
                table.pin(ids, f"{name}: {why}")
        for layer in self.layers.values():
            layer.inputs = None if layer.inputs is None else table.canonical(layer.inputs)
            layer.outputs = table.canonical(layer.outputs)
        self.norms = {name: table.canonical(ids) for name, ids in self.norms.items()}
        self.grouped = [(table.canonical(ids), parts) for ids, parts in self.grouped]
        self.reshapes = {key: found._replace(ids=table.canonical(found.ids)) for key, found in self.reshapes.items()}
        return table.groups()
