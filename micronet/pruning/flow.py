"""Channel numbers flowing through a network: which channel sits at which position of every layer.

The traced forward is run on numbers in the place of values: tensors of the same shapes whose elements say which channel
they belong to. A convolution or linear layer numbers its output channels anew; what only moves values (views,
permutations, shuffles, concatenations, splits) is run on the numbers as it is; what adds or multiplies values makes
their channels equals. Run again with other widths, the same flow tells where each channel of the pruned network
sits, whatever lies between. What is not understood pins its channels.
"""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from micronet.pruning import operations as ops
from micronet.pruning.combining import combine_all
from micronet.pruning.heads import follow_heads
from micronet.pruning.network import Network, Shape, owners
from micronet.pruning.numbering import FIXED, STRIDE, Ids, Numbering
from micronet.pruning.step import (
    Layer,
    Reshaped,
    Step,
    distinct,
    fixed,
    is_whole_group,
    reshaped,
    shuffled,
    spread,
    varies,
    vector,
)


class Flow:
    """The numbers at every layer of a network.

    ``layers``: convolutions and linear layers by name. ``norms``: modules with one value a channel.
    ``widths``: channels of each group. ``pinned``: group -> why it is never cut. ``names``: the layers that make it.
    ``units``: group -> what its width must be a multiple of, where that is not 1; ``follow`` finds them. ``blocks``:
    group -> how many neighbours go or stay together, as a head's do. ``grouped``: (channels, number) that a grouped
    layer takes in equal pieces. ``reshaped``, and ``scalars`` (channels, numbers they meet): by graph and node.
    """

    def __init__(
        self,
        network: Network,
        widths: Mapping[int, int] | None = None,
        like: "Flow | None" = None,
        pinned: Mapping[int, str] | None = None,
    ) -> None:
        """Number the channels; ``widths`` of the groups of another flow it is ``like``; ``pinned`` from the start."""
        self.layers: dict[str, Layer] = {}
        self.norms: dict[str, Ids] = {}
        self.grouped: list[tuple[Ids, int]] = []
        self.reshaped: dict[tuple[int, str], Reshaped] = {}
        self.scalars: dict[tuple[int, str], tuple[Ids, list[float]]] = {}
        self.units: dict[int, int] = {}
        self.network = network
        self._numbering: Numbering = Numbering(widths, None if like is None else like._numbering, pinned)
        self.blocks: dict[int, int] = {}
        self._in_blocks: set[str] = set()
        self._together: list[tuple[int, int]] = []  # (group, channels that go or stay together)
        self._opaque: dict[str, str] = {}  # modules that are used in some way that cannot be followed, and why
        self._modules = dict(network.model.named_modules())
        self._owners = owners(network.model)
        for index, graph in enumerate(network.graphs):
            self._run(index, graph)
        self._settle()

    def _run(self, index: int, graph: fx.Graph) -> None:
        values: dict[fx.Node, Any] = {}
        for node in graph.nodes:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            step = Step(node, (index, node.name), list(args), dict(kwargs), self.network.results)
            values[node] = self._visit(step)

    def _visit(self, step: Step) -> Any:
        node = step.node
        if node.op == "placeholder":
            return step.blank()
        if node.op == "get_attr":
            owner, _, attribute = str(node.target).rpartition(".")
            self._opaque[owner] = f"its {attribute} is read by the forward itself"
            return step.blank()
        if node.op == "output":
            return self._give_up(step, "its channels are the network's output")
        if not step.numbers:
            return step.blank() if node.op == "call_module" else tree_map(fixed, step.call())
        if node.op == "call_module":
            return self._visit_module(step, str(node.target), self._modules[str(node.target)])
        return self._visit_call(step)

    def _visit_module(self, step: Step, name: str, module: Any) -> Any:
        if module._forward_hooks or module._forward_pre_hooks:
            self._opaque[name] = "a hook may change what it reads and gives"
            self._visit_kind(step, name, module)
            return self._give_up(step, f"{name} has a hook")
        return self._visit_kind(step, name, module)

    def _visit_kind(self, step: Step, name: str, module: Any) -> Any:
        if isinstance(module, nn.modules.conv._ConvNd):
            return self._convolve(step, name, module)
        if isinstance(module, nn.Linear):
            return self._multiply(step, name, module)
        if isinstance(module, nn.modules.batchnorm._NormBase):
            return self._normalise(step, name, module.affine or module.track_running_stats)
        if isinstance(module, nn.PReLU):
            return self._normalise(step, name, module.num_parameters > 1)
        if isinstance(module, (*ops.POINTWISE_MODULES, *ops.COMBINING_MODULES)):
            return self._combine(step)
        if isinstance(module, ops.POOLS):
            return self._pool(step)
        if isinstance(module, nn.Softmax):
            return self._reduce(step, module.dim)
        if isinstance(module, ops.SHUFFLES):
            return self._move(step, lambda x: shuffled(x, module.groups), module.groups)
        if isinstance(module, ops.MOVING_MODULES):
            return self._move(step, module)
        self._opaque[name] = what = f"{type(module).__name__} {ops.why_whole(module)}"
        return self._give_up(step, f"{name}: {what}")

    def _visit_call(self, step: Step) -> Any:
        kind = ops.kind(step.node)
        if kind == "telling":
            return step.call()
        if step.node.target is operator.getitem and any(isinstance(x, Tensor) for x in tree_leaves(step.args[1])):
            return self._give_up(step, "it is indexed by a tensor in its forward")
        if kind == "moving":
            return self._move(step)
        if ops.writes_part(step.node):
            return self._give_up(step, "a part of it is written in place")
        if step.node.target is F.pad and len(step.args[1]) // 2 <= step.numbers[0].dim() - 2:
            kind = "pooling"
        follow = {
            "combining": self._combine, "attending": self._attend, "reducing": self._reduce, "pooling": self._pool,
        }.get(kind)  # fmt: skip
        why = ops.why_whole(step.node.target)
        return follow(step) if follow else self._give_up(step, f"{step.name} in its forward {why}")

    def _convolve(self, step: Step, name: str, conv: Any) -> Tensor:
        x = step.numbers[0]
        read = vector(x, 1) if x.dim() == len(conv.kernel_size) + 2 else None
        if x.dim() != len(conv.kernel_size) + 2:
            self._opaque[name] = "it reads one image without a batch"
        depthwise = conv.groups == conv.in_channels > 1
        if depthwise and read is not None and FIXED not in read:
            out: Ids = np.repeat(read, conv.out_channels // conv.in_channels)
        else:
            out = self._numbering.new(name, conv.out_channels)
            if depthwise or (conv.transposed and conv.groups > 1):
                self._opaque[name] = f"{type(conv).__name__} with groups reads what cannot be cut"
            elif name in self.network.blocks and read is not None and is_whole_group(read, len(out)):
                self._numbering.unify(read, out)  # a group's inputs and outputs go together
                self._in_blocks.add(name)
                self._together.append((int(out[0]) // STRIDE, self.network.blocks[name]))
            elif conv.groups > 1:
                self.grouped += [(ids, conv.groups) for ids in (out, read) if ids is not None]
        self._note(step, name, read, out)
        return spread(out, 1, (x.shape[0], len(out), *step.result[2:]))

    def _multiply(self, step: Step, name: str, linear: nn.Linear) -> Tensor:
        x = step.numbers[0]
        out = self._numbering.new(name, linear.out_features)
        self._note(step, name, vector(x, -1), out)
        return spread(out, x.dim() - 1, (*x.shape[:-1], len(out)))

    def _attend(self, step: Step) -> Any:
        found = follow_heads(step, self._numbering.widths)
        if found is None:
            return self._give_up(step, f"the heads of {step.node.name} in its forward cannot be followed")
        for heads in found.tied:
            self._numbering.unify(found.tied[0].ravel(), heads.ravel())
        self._together.append((int(heads[0, 0]) // STRIDE, heads.shape[1]))
        return found.numbers

    def _note(self, step: Step, name: str, read: Ids | None, out: Ids) -> None:
        if read is None:
            self._pin(step.numbers, f"{name} reads it in another shape")
        if name not in self._owners:
            self._opaque[name] = "it shares its weight, or makes it anew"
        if name not in self.layers:
            self.layers[name] = Layer(read, out)
            return
        known = self.layers[name]  # called again: both inputs must be cut alike
        if known.inputs is None or read is None:
            self._opaque[name] = "it also reads what cannot be followed"
        else:
            self._numbering.unify(known.inputs, read)
        self._numbering.unify(known.outputs, out)

    def _normalise(self, step: Step, name: str, has_values: bool) -> Any:
        x = step.numbers[0]
        fits = ops.rank(self._modules[name]) in (None, x.dim())
        if fits and not has_values:
            return x
        ids = vector(x, 1) if fits and x.dim() > 1 else None
        if ids is None or name not in self._owners:
            self._opaque[name] = "it reads what cannot be followed"
            return self._give_up(step, f"{name} reads it in another shape")
        self._numbering.unify(self.norms.setdefault(name, ids), ids)
        return x

    def _move(self, step: Step, call: Callable[..., Any] | None = None, pieces: int = 1) -> Any:
        try:
            moved = step.call(call)
        except (RuntimeError, IndexError, TypeError, ValueError):  # sizes that are written down and no longer fit
            return self._give_up(step, "its forward writes sizes down")
        if (found := reshaped(step.numbers, moved, pieces)) is not None:
            self.reshaped[step.key] = found
        return moved

    def _pool(self, step: Step) -> Any:
        x, ids = step.numbers[0], vector(step.numbers[0], 1)
        shapes = [leaf for leaf in tree_leaves(step.result) if isinstance(leaf, Shape)]
        of = self._modules[str(step.node.target)] if step.node.op == "call_module" else step.node.target
        fits = ops.rank(of) in (None, x.dim()) and len(shapes) == 1 and len(shapes[0]) == x.dim()
        if ids is None or not fits:
            return self._give_up(step, f"{step.node.name} is over its channels, or not over images of a batch")
        return spread(ids, 1, (x.shape[0], len(ids), *shapes[0][2:]))

    def _reduce(self, step: Step, dims: Any = None) -> Any:
        """Follow what makes one value of those along some axes, or shares of their sum."""
        x, dims = step.numbers[0], step.argument(1, "dim", step.kwargs.get("axis", dims))
        axes = list(range(x.dim())) if dims is None else [dims] if isinstance(dims, int) else list(dims)
        if step.node.users and any(varies(x, axis % x.dim()) for axis in axes):
            return self._give_up(step, f"{step.node.name} is over its channels")
        keep = bool(step.argument(2, "keepdim", False))
        return x if ops.is_softmax(step.node) else torch.amin(x, axes, keepdim=keep)

    def _combine(self, step: Step) -> Any:
        plain = [leaf for leaf in tree_leaves((step.args, step.kwargs)) if isinstance(leaf, (int, float))]
        self.scalars[step.key] = (np.concatenate([distinct(ids) for ids in step.numbers]), plain)
        try:
            out, met = combine_all(step.numbers)
        except RuntimeError:  # at other widths they no longer fit one another
            return self._give_up(step, "its forward writes sizes down")
        for pair in met:
            for ids, why in pair.alone:
                self._pin([ids], why)
            self._numbering.unify(*pair.equals)
        return out

    def _give_up(self, step: Step, why: str) -> Any:
        self._pin(step.numbers, why)
        return step.blank()

    def _pin(self, tensors: Sequence[Tensor], why: str) -> None:
        for ids in tensors:
            self._numbering.pin(distinct(ids), why)

    def with_widths(self, widths: Mapping[int, int]) -> "Flow":
        """Return the flow of the same network with other widths of its groups."""
        return Flow(self.network, widths, self, self.pinned)

    def loses_groups(self, name: str) -> bool:
        """Tell whether a grouped convolution loses whole groups."""
        return name in self._in_blocks

    def pieces(self, name: str) -> int:
        """Return in how many groups a layer takes its channels; 1 where none need stay in one."""
        module: Any = self._modules[name]
        groups: int = getattr(module, "groups", 1)
        return 1 if groups == getattr(module, "in_channels", 0) or self.loses_groups(name) else groups

    @property
    def known(self) -> set[int]:
        """Return every group, those that others stand for included."""
        return self._numbering.groups

    def root(self, group: int) -> int:
        """Return the group that stands for all those a group's channels are added to."""
        return self._numbering.root(group)

    def _settle(self) -> None:
        """Name every channel by its group's root."""
        numbering = self._numbering
        for name, why in self._opaque.items():
            layer = self.layers.get(name)
            for ids in (self.norms.get(name), *([layer.inputs, layer.outputs] if layer else [])):
                numbering.pin(ids, f"{name}: {why}")
        for layer in self.layers.values():
            layer.inputs = None if layer.inputs is None else numbering.canonical(layer.inputs)
            layer.outputs = numbering.canonical(layer.outputs)
        self.norms = {name: numbering.canonical(ids) for name, ids in self.norms.items()}
        self.grouped = [(numbering.canonical(ids), number) for ids, number in self.grouped]
        self.reshaped = {key: move._replace(ids=numbering.canonical(move.ids)) for key, move in self.reshaped.items()}
        for group, size in self._together:
            root = numbering.root(group)
            self.blocks[root] = math.lcm(self.blocks.get(root, 1), size)
        self.names = numbering.names()
        self.widths = {group: numbering.widths[group] for group in self.names}
        self.pinned = {numbering.root(group): why for group, why in reversed(numbering.pinned.items())}
