"""Which channel sits where in every layer of a network, found by running the traced forward on channel ids.

Running the forward again with other widths shows where each channel sits in the pruned network.
"""

from collections.abc import Mapping

from micronet.pruning.follow import Follower
from micronet.pruning.group_table import ChannelGroup, GroupTable
from micronet.pruning.own_tensors import OwnTensors, TensorChannels, sizes_for
from micronet.pruning.traced_network import TracedNetwork


class ChannelMap:
    """The channel ids at every layer of a network.

    Attributes:
        network: The network.
        groups: The groups of channels that must be cut together, by root.
        table: All groups, including those merged into others.
        layers: Convolutions and linear layers by name.
        norms: Modules with one value per channel by name.
        attributes: Integers of the user's modules that these widths need to be others.
        functions: Layers with weights that the forward computes, and why they stay whole.
        tensors: Parameters and buffers that the forward reads, with one value per channel, by name.
        reshapes: By graph and operation, how it takes channels in equal parts.
        scalars: By graph and node, channels and the plain numbers that they are combined with.
    """

    def __init__(
        self,
        network: TracedNetwork,
        widths: Mapping[int, int] | None = None,
        pinned: Mapping[int, str] | None = None,
        sizes: Mapping[str, tuple[int, int]] | None = None,
    ) -> None:
        """Run the forward on ids, with ``widths`` of groups in place of the layers' own; never cut those ``pinned``.

        ``sizes``: the size along one axis of tensors that the forward itself reads, for those widths.
        """
        called = [str(node.target) for graph in network.graphs for node in graph.nodes if node.op == "call_module"]
        numbers = {name: number for number, name in enumerate(dict.fromkeys(called))}
        self.network = network
        self.table: GroupTable = GroupTable(numbers, widths or {}, pinned or {})
        own = OwnTensors(network.model, self.table, sizes or {})
        found = Follower(network, self.table, own, numbers.keys())
        self.layers, self.norms, self.reshapes = found.layers, found.norms, found.reshapes
        self.attributes, self.scalars, self.functions = found.attributes, found.scalars, found.functions
        self.tensors: dict[str, TensorChannels] = own.settle()
        self._settle(found.unsupported)
        self.groups: dict[int, ChannelGroup] = self.table.groups()

    @property
    def pinned(self) -> dict[int, str]:
        """The groups that are never cut, and why."""
        return {group: found.pinned for group, found in self.groups.items() if found.pinned}

    def with_widths(self, widths: Mapping[int, int]) -> "ChannelMap":
        """Return the map of the same network with other widths for its groups."""
        every = self.table.scaled(widths)
        return ChannelMap(self.network, every, self.pinned, sizes_for(self.tensors, self.table.widths, every))

    def _settle(self, unsupported: Mapping[str, str]) -> None:
        """Pin what is not supported, and replace every group by its root."""
        table = self.table
        for name, why in unsupported.items():
            ends = self.layers[name].ends if name in self.layers else []
            for ids in [self.norms[name]] if name in self.norms else ends:
                table.pin(ids, f"{name} {why}")
        for layer in self.layers.values():
            layer.inputs = None if layer.inputs is None else table.canonical(layer.inputs)
            layer.outputs = table.canonical(layer.outputs)
        self.norms = {name: table.canonical(ids) for name, ids in self.norms.items()}
        self.tensors = {name: each._replace(ids=table.canonical(each.ids)) for name, each in self.tensors.items()}
        self.reshapes = {key: each._replace(ids=table.canonical(each.ids)) for key, each in self.reshapes.items()}
        self.scalars = {key: (table.canonical(ids), plain) for key, (ids, plain) in self.scalars.items()}
