"""What a recorded forward does in training mode: its records in both modes, compared.

The law: in training mode, the graph computes what the network computes there, and draws the same random numbers, or it
refuses to be trained. Where the records differ by noise, such as stochastic depth, by an operation of one mode, such as
a softmax in eval mode, or by a number, the graph gets modules that follow the network's mode. A graph that differs in
more is for eval mode only.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

from torch import Tensor, fx, nn

from micronet.graph.graph_module import GraphModule
from micronet.graph.ops import writes_in_place
from micronet.graph.recorder import CONSTANT, DROPOUTS, Recorder
from micronet.graph.size import is_size
from micronet.models.layers import Chosen, EvalOnly, ModeCall, ModeValue, Noise
from micronet.models.modes import same_bits


def follow_mode(evaluating: Recorder, training: Recorder | None) -> None:
    """Make the graph recorded in eval mode, and its root, do in training mode what was recorded there.

    Without a record of training mode, or if the records differ in more than this module knows, it is marked as for
    eval mode only: it raises MicronetError when it is trained.
    """
    both = None if training is None or training.reads else _Pairing(evaluating, training)
    if both is None or not both.complete():
        _guard(evaluating)
    else:
        both.apply()


class _Different(Exception):
    """Two nodes compute different things."""


@dataclass(frozen=True)
class _Region:
    """A value in eval mode, and what training mode makes of it."""

    value: fx.Node
    result: fx.Node


@dataclass(frozen=True)
class _Number:
    """A number that depends on the mode."""

    evaluating: Any
    training: Any


@dataclass
class _Pairing:
    """Nodes of a graph in eval mode (``before``) and those of training mode that compute the same (``pairs``)."""

    before: Recorder
    after: Recorder
    pairs: dict[fx.Node, fx.Node] = field(default_factory=dict)
    arguments: dict[fx.Node, Any] = field(default_factory=dict)  # with regions and numbers in them
    only_eval: list[fx.Node] = field(default_factory=list)
    regions: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)  # a region's result -> its nodes, in order

    def complete(self) -> bool:
        """Pair all nodes; return False if one mode does more than this module knows."""
        waiting = [node for node in self.after.graph.nodes if not _is_free(node)]
        for node in self.before.graph.nodes:
            if _is_free(node):
                continue
            found = next((other for other in waiting if self._pair(node, other)), None)
            if found is not None:
                waiting = waiting[waiting.index(found) + 1 :]
            elif not self._skip(node):
                return False
        used = {*self.pairs.values(), *(node for nodes in self.regions.values() for node in nodes)}
        return not any(writes_in_place(node) for node in self.after.graph.nodes if node not in used)

    def _pair(self, node: fx.Node, other: fx.Node) -> bool:
        if node.op != other.op or not self._same_target(node, other):
            return False
        try:
            arguments = _zip((node.args, dict(node.kwargs)), (other.args, dict(other.kwargs)), self._compare)
        except _Different:
            return False
        self.pairs[node], self.arguments[node] = other, arguments
        return True

    def _same_target(self, node: fx.Node, other: fx.Node) -> bool:
        if node.target == other.target and not str(node.target).startswith("recorded_dropout"):
            return True
        if node.op != "call_module":
            return node.op in ("placeholder", "output")
        own, its = _module(self.before.root, node), _module(self.after.root, other)
        return type(own) is type(its) and getattr(own, "p", None) == getattr(its, "p", 0)

    def _skip(self, node: fx.Node) -> bool:
        """Take an operation for one of eval mode alone, which training mode leaves out."""
        if node.op in ("placeholder", "output"):
            return False
        source = node.args[0] if node.args else None
        layer = node.op == "call_module" and _has_parameters(_module(self.before.root, node))
        if not isinstance(source, fx.Node) or source not in self.pairs or layer or writes_in_place(node):
            return not node.users and not writes_in_place(node)
        self.pairs[node] = self.pairs[source]
        self.only_eval.append(node)
        return True

    def _compare(self, own: Any, other: Any) -> Any:
        """Return what takes an argument's place, or raise _Different."""
        if isinstance(own, fx.Node) and isinstance(other, fx.Node):
            if self._same(own, other):
                return own
            if own in self.pairs and self._is_region(self.pairs[own], other):
                return _Region(own, other)
        elif type(own) is type(other) and (own == other or own != own):
            return own
        elif _are_numbers(own, other):
            return _Number(own, other)
        raise _Different

    def _same(self, own: fx.Node, other: fx.Node) -> bool:
        if own in self.pairs:
            return self.pairs[own] is other
        if own.op == other.op == "get_attr":
            mine, its = (_tensor(root, node) for root, node in ((self.before.root, own), (self.after.root, other)))
            return mine is its or (_is_constant(own) and _is_constant(other) and same_bits(mine, its))
        if not is_size(own) or not is_size(other) or own.target != other.target:
            return False
        try:
            _zip((own.args, dict(own.kwargs)), (other.args, dict(other.kwargs)), self._compare_sizes)
        except _Different:
            return False
        return True

    def _compare_sizes(self, own: Any, other: Any) -> Any:
        nodes = isinstance(own, fx.Node) and isinstance(other, fx.Node)
        if (self._same(own, other)) if nodes else (type(own) is type(other) and own == other):
            return own
        raise _Different

    def _is_region(self, source: fx.Node, result: fx.Node) -> bool:
        """Return True if training mode computes a result from a value by operations without layers of its own."""
        paired, nodes, waiting, reached = set(self.pairs.values()), set[fx.Node](), [result], False
        while waiting:
            node = waiting.pop()
            reached |= node is source
            if node in paired or node in nodes or _is_free(node):
                continue
            if node.op == "call_module" and _has_parameters(_module(self.after.root, node)):
                return False
            nodes.add(node)
            waiting += node.all_input_nodes
        self.regions[result] = [node for node in self.after.graph.nodes if node in nodes]
        return reached

    def apply(self) -> None:
        """Change the graph in eval mode, and its root."""
        graph, names, made = self.before.graph, count(), dict[fx.Node, fx.Node]()
        images = {other: own for own, other in reversed(self.pairs.items())}

        def module(made: nn.Module, arguments: tuple[fx.Node, ...]) -> fx.Node:
            name = f"recorded_mode_{next(names)}"
            made.training = self.before.root.training
            self.before.root.add_module(name, made)
            return graph.create_node("call_module", name, arguments)  # call_module looks for it in the graph's owner

        def image(node: fx.Node) -> fx.Node:
            """Return the node in eval mode's graph of one in training mode's: paired, a tensor, or a size."""
            if node in images:
                return images[node]
            if node.op == "get_attr":
                if not _is_constant(node):
                    return graph.create_node("get_attr", str(node.target))  # get_attr looks for it in the graph's owner
                name = f"{CONSTANT}training_{next(names)}"
                self.before.root.register_buffer(name, _tensor(self.after.root, node), persistent=False)
                return graph.create_node("get_attr", name)
            return graph.node_copy(node, image)

        def replace(value: Any) -> Any:
            if isinstance(value, _Number):
                return module(ModeValue(value.evaluating, value.training), ())
            if isinstance(value, _Region) and value.result not in made:
                noise, inputs = self._noise(value)
                made[value.result] = module(noise, (value.value, *map(image, inputs)))
            return made[value.result] if isinstance(value, _Region) else value

        for node, arguments in self.arguments.items():
            with graph.inserting_before(node):
                node.args, node.kwargs = _zip(arguments, arguments, lambda own, _: replace(own))
        for node in self.only_eval:
            with graph.inserting_after(node):
                chosen = module(Chosen(), (node, node.args[0]))  # type: ignore[arg-type]
            node.replace_all_uses_with(chosen, delete_user_cb=partial(operator.is_not, chosen))

    def _noise(self, region: _Region) -> tuple[Noise, list[fx.Node]]:
        """Return a region as a module of the value, and the nodes of what else it reads."""
        nodes, source = self.regions[region.result], self.pairs[region.value]
        inputs = (read for node in nodes for read in node.all_input_nodes)
        reads = dict.fromkeys(read for read in inputs if read not in nodes and read is not source)
        graph = fx.Graph()
        values = {read: graph.placeholder(f"input_{number}") for number, read in enumerate([source, *reads])}
        for node in nodes:
            values[node] = graph.node_copy(node, values.__getitem__)
        graph.output(values[region.result])
        return Noise(GraphModule(self.after.root, graph)), list(reads)


def outline_mode_calls(model: fx.GraphModule, keys: dict[str, str | int]) -> None:
    """Turn calls of functions with a ``training`` argument, at these keys, into modules that follow the mode."""
    for node in list(model.graph.nodes):
        if node.name not in keys:
            continue
        name, kind = f"{node.name}_mode", DROPOUTS.get(node.target)
        if kind is None:
            made: nn.Module = ModeCall(node.target, keys[node.name])
        else:
            made = kind(node.args[1] if len(node.args) > 1 else node.kwargs.get("p", 0.5))
            node.args, node.kwargs = (node.args[0] if node.args else node.kwargs["input"],), {}
        made.training = model.training
        model.add_submodule(name, made)
        node.target, node.op = name, "call_module"


def _are_numbers(own: Any, other: Any) -> bool:
    """Return True for two numbers, also for an integer and a float, as in ``0.1 if self.training else 0``."""
    kinds = {type(own), type(other)}
    return kinds == {bool} or kinds <= {int, float}


def _guard(recorder: Recorder) -> None:
    """Refuse to train a record: its first output goes through a module that says so."""
    output = next(node for node in reversed(recorder.graph.nodes) if node.op == "output")
    tensors = [node for node in output.all_input_nodes if not is_size(node)]
    if tensors:
        recorder.root.add_module("recorded_eval", EvalOnly())
        recorder.root.recorded_eval.training = recorder.root.training
        with recorder.graph.inserting_before(output):
            output.replace_input_with(
                tensors[0], recorder.graph.create_node("call_module", "recorded_eval", (tensors[0],))
            )


def _is_free(node: fx.Node) -> bool:
    """Return True if a node is compared only where another reads it."""
    return node.op == "get_attr" or is_size(node)


def _is_constant(node: fx.Node) -> bool:
    return str(node.target).startswith(CONSTANT)


def _tensor(root: nn.Module, node: fx.Node) -> Tensor:
    owner, _, name = str(node.target).rpartition(".")
    tensor: Tensor = getattr(root.get_submodule(owner), name)
    return tensor


def _module(root: nn.Module, node: fx.Node) -> nn.Module | None:
    """Return the module that a node calls; None for a plain layer, which the root does not have yet."""
    try:
        return root.get_submodule(str(node.target))
    except AttributeError:
        return None


def _has_parameters(module: nn.Module | None) -> bool:
    return module is None or any(True for _ in module.parameters())


def _zip(own: Any, other: Any, leaf: Callable[[Any, Any], Any]) -> Any:
    """Return a structure of what ``leaf`` makes of two equal structures' leaves; raise _Different for others."""
    if isinstance(own, (tuple, list)) and isinstance(other, (tuple, list)):
        if len(own) != len(other):
            raise _Different
        return type(own)(_zip(x, y, leaf) for x, y in zip(own, other, strict=True))
    if isinstance(own, dict) and isinstance(other, dict):
        if own.keys() != other.keys():
            raise _Different
        return {key: _zip(own[key], other[key], leaf) for key in own}
    if isinstance(own, slice) and isinstance(other, slice):
        mine, its = ((x.start, x.stop, x.step) for x in (own, other))
        return slice(*_zip(mine, its, leaf))
    return leaf(own, other)
