"""Following channel ids through a traced forward, node by node.

A convolution or linear layer assigns new ids to its outputs. Operations that only move values (views, permutations,
shuffles, concatenations, splits) run on the ids unchanged. Operations that combine values, such as additions, merge the
groups of their channels. An operation that is not supported pins its channels: they are never cut.
"""

import operator
from collections.abc import Set
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from micronet.graph import ops
from micronet.models.computed import weight_owners
from micronet.models.layers import FrozenBatchNorm
from micronet.pruning.attributes import Attributes
from micronet.pruning.axes import reduce_ids, tied_along
from micronet.pruning.channelwise import channelwise_ids
from micronet.pruning.einsum import einsum_ids
from micronet.pruning.group_norms import tie_normalized, weights_of
from micronet.pruning.group_table import GroupTable
from micronet.pruning.heads import attend_ids
from micronet.pruning.ids import (
    FIXED,
    Ids,
    LayerChannels,
    combine,
    distinct,
    ids_along,
    is_empty,
    is_whole_group,
    spread,
    without_ids,
)
from micronet.pruning.node_call import OUTPUTS, NodeCall, Reshape, reads_shape
from micronet.pruning.own_tensors import OwnTensors
from micronet.pruning.sizes import channels_counted, fit_sizes, shapes, split_sizes
from micronet.pruning.traced_network import TracedNetwork

_FIXED_SIZES = "forward() uses fixed sizes"


class Follower:
    """Runs a network's graphs on ids and keeps what it finds.

    Attributes:
        layers: Convolutions and linear layers by name.
        norms: Modules with one value per channel by name.
        reshapes: By graph and operation, how it takes channels in equal parts.
        scalars: By graph and node, channels and the plain numbers that they are combined with.
        attributes: Integers of the user's modules, for the widths at hand.
        functions: Layers with weights that the forward computes, and why they are not cut.
        unsupported: Module -> what is wrong with it, as a verb phrase.
    """

    def __init__(self, network: TracedNetwork, table: GroupTable, own: OwnTensors, called: Set[str]) -> None:
        """Run every graph. ``own``: the tensors that the forward itself reads; ``called``: the modules it calls."""
        self.layers: dict[str, LayerChannels] = {}
        self.norms: dict[str, Ids] = {}
        self.reshapes: dict[tuple[int, str], Reshape] = {}
        self.scalars: dict[tuple[int, str], tuple[Ids, list[float]]] = {}
        self.attributes = Attributes()
        self.unsupported: dict[str, str] = {}
        self.functions: dict[str, str] = {}
        self.table, self._network, self._own, self._called = table, network, own, called
        self._values: dict[fx.Node, Any] = {}  # of the graph at hand
        self._modules: dict[str, Any] = dict(network.model.named_modules())
        frozen = {norm for norm in self._modules.values() if isinstance(norm, FrozenBatchNorm) and not norm._parameters}
        self._owners = weight_owners(network.model) | frozen
        for index, graph in enumerate(network.graphs):
            self._run(index, graph)

    def _run(self, index: int, graph: fx.Graph) -> None:
        self._values = {}
        for node in graph.nodes:
            given = fx.node.map_arg((node.args, node.kwargs), self._values.__getitem__)
            args, kwargs = self.attributes.resolve(given)
            module = self._modules[str(node.target)] if node.op == "call_module" else None
            key = index, node.name
            fixed, before_heads = self._network.results[key], key in self._network.before_heads
            self._values[node] = self._visit(NodeCall(node, key, module, args, kwargs, fixed, given, before_heads))
            self.attributes.read(given)

    def _visit(self, call: NodeCall) -> Any:
        node, module = call.node, call.module
        if node.op == "output":
            return self._give_up(call, OUTPUTS)
        if node.op == "get_attr" and not all(map(reads_shape, node.users)):
            owner, _, attribute = str(node.target).rpartition(".")
            self.unsupported[owner] = f"has a {attribute} that forward() accesses directly"
            return call.fixed if owner in self._called else self._own.read(str(node.target), call.fixed)
        if node.op in ("placeholder", "get_attr"):
            return call.fixed
        weights = weights_of(call)
        inputs = [x for x in call.tensors if not any(x is weight for weight in weights)]
        if not call.keeps_elements and any(map(self._own.holds, inputs)):
            call = replace(call, args=self._own.without(call.args), kwargs=self._own.without(call.kwargs))
        if not call.tensors:
            own = {name: value for name, value in call.kwargs.items() if name != "dtype"}  # that of ids may not do
            return call.fixed if module is not None else tree_map(without_ids, replace(call, kwargs=own).run())
        if module is None:
            return self._visit_operation(call)
        result = self._visit_module(call, str(node.target), module)
        if not (module._forward_hooks or module._forward_pre_hooks):
            return result
        self.unsupported[str(node.target)] = "has a hook, which may change its input or its output"
        return self._give_up(call, f"{node.target} has a hook")

    def _visit_module(self, call: NodeCall, name: str, module: Any) -> Any:
        if isinstance(module, ops.CONVOLUTIONS):
            return self._convolve(call, name, module)
        if isinstance(module, nn.Linear):
            return self._multiply(call, name, module)
        if isinstance(module, (*ops.BATCH_NORMS, *ops.INSTANCE_NORMS)):
            return self._scale(call, name, module.affine or module.track_running_stats)
        if isinstance(module, nn.PReLU):
            return self._scale(call, name, module.num_parameters > 1)
        if isinstance(module, nn.GroupNorm):
            return self._normalize(call, name)
        return self._visit_operation(call)

    def _visit_operation(self, call: NodeCall) -> Any:
        kind, target = call.kind, call.node.target
        if kind in ("metadata", "creating"):
            return tree_map(without_ids, call.run())
        indexes = target is operator.getitem and any(isinstance(x, Tensor) for x in tree_leaves(call.args[1]))
        if kind == "moving" and not indexes:
            return self._move(call)
        if is_empty((call.tensors, call.fixed)):
            return self._give_up(call, f"{call.node.name} in forward() has an empty tensor for the example input")
        if indexes:
            return self._probe(call, "forward() indexes it with a tensor")
        if call.writes_part:
            return self._give_up(call, "forward() overwrites part of it")
        if target is F.group_norm:
            return self._normalize(call)
        if target is F.pad and len(call.args[1]) // 2 <= call.tensors[0].dim() - 2:
            kind = "pooling"
        visit = {
            "combining": self._combine, "gating": self._gate, "attending": self._attend, "reducing": self._reduce,
            "pooling": self._pool,
        }.get(kind)  # fmt: skip
        return visit(call) if visit else self._probe(call, call.why_pinned)

    def _probe(self, call: NodeCall, why: str) -> Any:
        """Follow an operation that turns out to compute each channel from itself alone; give up any other."""
        ids = channelwise_ids(call, self._network, self.table)
        if ids is None:
            if ops.WEIGHTED_FUNCTIONS.matches(call.node):
                self.functions[call.node.name] = call.why_whole
            return self._give_up(call, why)
        self.scalars[call.key] = (call.ids, call.numbers)
        return ids

    def _convolve(self, call: NodeCall, name: str, conv: Any) -> Tensor:
        x, parts = call.tensors[0], conv.groups
        batched = x.dim() == len(conv.kernel_size) + 2
        read = tied_along(x, 1, self.table) if batched else None
        if not batched:
            self.unsupported[name] = "takes an input without a batch axis"
        depthwise = conv.groups == conv.in_channels > 1
        if depthwise and read is not None and FIXED not in read:
            out: Ids = np.repeat(read, conv.out_channels // conv.in_channels)
        else:
            out = self.table.assign(name, conv.out_channels)
            if depthwise or (conv.transposed and conv.groups > 1):
                self.unsupported[name] = f"is a grouped {type(conv).__name__} whose input cannot be pruned"
            elif name in self._network.blocks and read is not None and is_whole_group(read, len(out)):
                self.table.merge(read, out)  # a convolution group's inputs and outputs go together
                self.table.add_block(out, self._network.blocks[name])
                parts = 1
            elif conv.groups > 1:
                for end, ids in (("inputs", read), ("outputs", out)):
                    if ids is not None:
                        self.reshapes[call.key[0], f"{call.node.name} {end}"] = Reshape(ids, (conv.groups,))
        self._record(call, name, LayerChannels(read, out, 1 if depthwise else parts))
        return spread(out, 1, (x.shape[0], len(out), *call.fixed.shape[2:]))

    def _multiply(self, call: NodeCall, name: str, linear: nn.Linear) -> Tensor:
        x = call.tensors[0]
        out = self.table.assign(name, linear.out_features)
        self._record(call, name, LayerChannels(tied_along(x, -1, self.table), out))
        return spread(out, x.dim() - 1, (*x.shape[:-1], len(out)))

    def _attend(self, call: NodeCall) -> Any:
        ids = (einsum_ids if ops.EINSUM.matches(call.node) else attend_ids)(call, self.table)
        why = f"{call.node.name} combines its channels, and it is not attention whose heads can be told apart"
        return self._probe(call, why) if ids is None else ids

    def _record(self, call: NodeCall, name: str, layer: LayerChannels) -> None:
        if layer.inputs is None:
            self.table.pin(call.ids, f"{name} uses it with channels on more than one axis")
        if is_empty(call.tensors):
            self.unsupported[name] = "takes an empty tensor for the example input"
        if call.module not in self._owners:
            self.unsupported[name] = "has a weight that is shared or computed"
        known = self.layers.setdefault(name, layer)
        if known is layer:
            return
        if known.inputs is None or layer.inputs is None:  # called again: both inputs must be cut alike
            self.unsupported[name] = "also takes an input that cannot be pruned"
        else:
            self.table.merge(known.inputs, layer.inputs)
        self.table.merge(known.outputs, layer.outputs)

    def _scale(self, call: NodeCall, name: str, has_values: bool) -> Any:
        """Follow a module with one value per channel, or none at all."""
        x = call.tensors[0]
        fits = call.batched_rank in (None, x.dim())
        if fits and not has_values:
            if isinstance(call.module, ops.INSTANCE_NORMS) and (own := ids_along(x, 1)) is not None:
                self.norms.setdefault(name, own)  # it warns if it does not know the number of channels
            return x
        ids = tied_along(x, 1, self.table) if fits and x.dim() > 1 else None
        if ids is None or call.module not in self._owners:
            self.unsupported[name] = "takes an input that cannot be pruned"
            return self._give_up(call, f"{name} uses it with channels on another axis")
        self.table.merge(self.norms.setdefault(name, ids), ids)
        return x

    def _normalize(self, call: NodeCall, name: str = "") -> Any:
        """Follow a group norm; ``name``: that of its module, if it is one."""
        x, weights = call.argument(0, "input"), weights_of(call)
        ids = tied_along(x, 1, self.table)
        why = tie_normalized(call, ids, self._network, self.table, self.attributes)
        owned = call.module in self._owners or not getattr(call.module, "affine", False)
        if not owned or not all(map(self._own.holds, weights)):
            why = f"{call.subject} has a weight that is shared or computed"
        if ids is None or why:
            self._own.without(weights)  # they stay whole
            return self._give_up(call, why)
        if call.module is not None:
            self.table.merge(self.norms.setdefault(name, ids), ids)
        for weight in weights:
            x = self._own.follow(weight.reshape(-1, *[1] * (x.dim() - 2)), x)
        return x

    def _move(self, call: NodeCall) -> Any:
        call = fit_sizes(call, self.attributes)
        try:
            moved = call.run()
        except (RuntimeError, IndexError, TypeError, ValueError):  # fixed sizes that do not fit these widths
            return self._misfit(call)
        if (call.ids == FIXED).all() and shapes(moved) != shapes(call.fixed):  # it resizes what cannot be cut
            return self._misfit(call)
        if not any(map(self._own.holds, call.tensors)):
            self.reshapes |= {call.key: found} if (found := call.reshape(moved, split_sizes(call.node))) else {}
        return moved

    def _pool(self, call: NodeCall) -> Any:
        x, found = call.tensors[0], [tied_along(y, 1, self.table) for y in call.tensors]  # a second: a pool's indices
        known = [ids for ids in found if ids is not None]
        ranks = {y.dim() for y in tree_leaves(call.fixed)} | {call.batched_rank or x.dim()}
        if len(known) < len(found) or ranks != {x.dim()}:
            return self._give_up(call, f"{call.node.name} pools across channels, or its input has no batch axis")
        self.table.merge(known[0], known[-1])
        return tree_map(lambda y: spread(known[0], 1, (x.shape[0], len(known[0]), *y.shape[2:])), call.fixed)

    def _reduce(self, call: NodeCall) -> Any:
        ids = reduce_ids(call, self.table)
        return self._give_up(call, call.why_pinned) if ids is None else ids

    def _combine(self, call: NodeCall) -> Any:
        own, channels = ([x for x in call.tensors if self._own.holds(x) is held] for held in (True, False))
        if own and not channels:
            return own[0] if len(own) == 1 else call.fixed
        out, *others = channels
        self.scalars[call.key] = (call.ids, call.numbers)
        try:
            torch.broadcast_shapes(*(x.shape for x in call.tensors))  # type: ignore[no-untyped-call]
        except RuntimeError:  # fixed sizes that do not fit these widths
            return self._misfit(call)
        for other in others:
            out, equal, unmatched = combine(out, other)
            for x, why in unmatched:
                self.table.pin(distinct(x), why)
            self.table.merge(*equal)
        for x in own:
            out = self._own.follow(x, out)
        return out

    def _gate(self, call: NodeCall) -> Any:
        """Follow a gated linear unit: channels at the same place of both halves are cut together."""
        axis = call.argument(1, "dim", getattr(call.module, "dim", -1))
        return self._combine(replace(call, args=tuple(call.tensors[0].chunk(2, axis)), kwargs={}, module=None))

    def _misfit(self, call: NodeCall) -> Any:
        """Give up a call whose sizes do not fit these widths, and the channels whose number is among the sizes."""
        self.table.pin(channels_counted(call, self._values, self._network.results), _FIXED_SIZES)
        return self._give_up(call, _FIXED_SIZES)

    def _give_up(self, call: NodeCall, why: str) -> Any:
        self.table.pin(call.ids, why)
        return call.fixed
