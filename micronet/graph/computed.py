"""Weights that a forward computes from stored tensors alone: standardized ones, sums with a low-rank part, filters.

In eval mode they are constants, so a network can store their values as plain weights instead.
"""

from collections.abc import Collection, Mapping, Set
from itertools import chain, count
from typing import Any

import torch
from torch import Tensor, fx, nn

from micronet.graph.layer_calls import CALLS, arguments_of
from micronet.graph.ops import writes_in_place
from micronet.graph.products import calls_t
from micronet.models.modes import eval_mode

IS_COMPUTED = "is computed"  # the mark of a read of a tensor that was computed, in its node's ``meta``


class Values(dict[str, nn.Parameter]):
    """The values of computed weights, by name.

    Attributes:
        kept: The names of weights that the forward goes on computing; they are not stored.
        sources: The names of the tensors that the others are computed from.
        transposed: The names of those that are stored matrices, which the forward only transposes.
    """

    def __init__(self, kept: Collection[str] = ()) -> None:
        """Start empty."""
        super().__init__()
        self.kept, self.sources, self.transposed = kept, set[str](), set[str]()


def may_compute_weights(model: nn.Module) -> bool:
    """Return False if only torch's own layers hold weights, which they use as they are."""
    return any(
        not type(module).__module__.startswith("torch.nn")
        and any(tensor.dim() > 1 for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)))
        for module in model.modules()
    )


def computed_from(call: fx.Node) -> list[str]:
    """Return the names of the stored tensors that a function's weight is computed from, if from nothing else."""
    return _read(_computation(arguments_of(call)["weight"])) if call.target in CALLS else []


def computes_more(call: fx.Node) -> bool:
    """Return True if a function's weight or bias is computed from stored tensors, but not only transposed."""
    given = [_computation(arguments_of(call)[name]) for name in ("weight", "bias")] if call.target in CALLS else []
    return not all(map(_only_transposes, given))


@torch.no_grad()
def store_weight(
    call: fx.Node,
    model: nn.Module,
    stored: Mapping[str, Tensor],
    values: Values,
    taken: dict[str, str],
    *,
    transposes: bool = False,
) -> None:
    """Let a layer's function read a weight or bias that is computed from stored tensors as a stored one; others stay.

    Args:
        call: The call of one of the functions in ``CALLS``.
        model: The network.
        stored: Its tensors by name.
        values: The weights by name. A weight that is not among them yet is added: it takes the name of a tensor of its
            shape that it is computed from.
        taken: The names that this graph's calls have got, and how each weight is computed. A weight that is computed in
            another way gets a name of its own.
        transposes: Whether a matrix that is only read transposed keeps its name.
    """
    if _computation(call):
        return  # a call without an input is a step towards a weight
    for tensor in ("weight", "bias"):
        source = arguments_of(call)[tensor]
        nodes = _computation(source)
        if not nodes or any(map(writes_in_place, nodes)):
            continue
        with eval_mode(model):
            value = _evaluate(nodes, model)
        name = _name(nodes, value, stored, stored.keys() - values.keys(), taken, transposes=transposes)
        if name in values.kept:
            continue
        values.setdefault(name, nn.Parameter(value))
        values.sources.update(_read(nodes))
        if _only_transposes(nodes):
            values.transposed.add(name)
        with call.graph.inserting_before(call):
            read = call.graph.create_node("get_attr", name)
            read.meta[IS_COMPUTED] = True
        call.replace_input_with(source, read)
        for node in reversed(nodes):
            if not node.users:
                call.graph.erase_node(node)


def _name(
    nodes: list[fx.Node],
    value: Tensor,
    stored: Mapping[str, Tensor],
    own: Set[str],
    taken: dict[str, str],
    *,
    transposes: bool,
) -> str:
    """Return the name of a computed weight, which no tensor of the network's ``own`` has that it is not computed from.

    It is another one than that of a weight that is computed otherwise. With ``transposes``, a matrix that is only read
    transposed keeps its own, and one that is also read as it is gets another.
    """
    sources, way = _read(nodes), _way(nodes)
    transposed = transposes and _only_transposes(nodes)
    alike = [name for name in sources if transposed or (name in stored and stored[name].shape == value.shape)]
    same = (name for name in alike if not (transposes and _is_read_otherwise(name, nodes, transposed=transposed)))
    first = next(same, f"{sources[0]}_computed")
    others = (f"{first}_{number}" for number in count(2) if f"{first}_{number}" not in own)
    return next(name for name in chain([first], others) if taken.setdefault(name, way) == way)


def _is_read_otherwise(name: str, nodes: list[fx.Node], *, transposed: bool) -> bool:
    """Return True if a layer reads a stored tensor as it is or, if it is transposed, anything else does."""
    graph = nodes[-1].graph
    reads = [
        node for node in graph.nodes if node.op == "get_attr" and node.target == name and IS_COMPUTED not in node.meta
    ]
    readers = [user for node in reads for user in node.users]
    return any(user.target in CALLS or (transposed and not calls_t(user)) for user in readers)


def _only_transposes(nodes: list[fx.Node]) -> bool:
    return all(node.op == "get_attr" or calls_t(node) for node in nodes)


def _way(nodes: list[fx.Node]) -> str:
    """Return a description of a computation that is the same wherever a forward computes it again."""
    number = {node: f"%{index}" for index, node in enumerate(nodes)}
    steps = [(node.op, str(node.target), fx.node.map_arg((node.args, node.kwargs), number.get)) for node in nodes]
    return repr(steps)


def _read(nodes: list[fx.Node]) -> list[str]:
    return [str(node.target) for node in nodes if node.op == "get_attr"]


def _computation(weight: Any) -> list[fx.Node]:
    """Return the nodes that compute a weight from stored tensors alone, in order; none if it is not computed so."""
    if not isinstance(weight, fx.Node) or weight.op == "get_attr":
        return []
    found, waiting = set[fx.Node](), [weight]
    while waiting:
        node = waiting.pop()
        found.add(node)
        if node.op != "get_attr" and (node.op == "placeholder" or not node.all_input_nodes):
            return []
        waiting += [each for each in node.all_input_nodes if each not in found]
    return [node for node in weight.graph.nodes if node in found]


def _evaluate(nodes: list[fx.Node], model: nn.Module) -> Tensor:
    """Return what the last of some nodes computes."""
    interpreter = fx.Interpreter(model, garbage_collect_values=False, graph=nodes[-1].graph)
    for node in nodes:
        interpreter.env[node] = interpreter.run_node(node)
    result: Tensor = interpreter.env[nodes[-1]].detach().clone()
    return result
