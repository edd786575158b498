"""Products of a tensor and a stored matrix, such as GPT-2's ``Conv1D`` or ``x @ self.proj``: linear layers.

They become calls of ``F.linear``, which takes the matrix transposed, with the vector that is added to the product.
"""

import operator
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

_EINSUM = re.compile(r"(\.\.\.|)([a-z]*)([a-z]),\3([a-z])->\1\2\4", re.IGNORECASE)  # over the last axis of the first
_TRANSPOSED_EINSUM = re.compile(r"(\.\.\.|)([a-z]*)([a-z]),([a-z])\3->\1\2\4", re.IGNORECASE)


class _Product(NamedTuple):
    """A linear layer: its input, its matrix, whether that is (outputs, inputs) already, and its bias."""

    input: fx.Node
    matrix: fx.Node
    transposed: bool = False
    bias: fx.Node | None = None


def make_layers(graph: fx.Graph, model: nn.Module) -> bool:
    """Write the products of a graph with stored matrices as linear layers, in place; return True if there are any.

    Only parameters count. A fixed matrix, such as a Fourier transform's, does not make a layer.

    Args:
        graph: A network's graph.
        model: The network.
    """
    stored, found = dict(model.named_parameters(remove_duplicate=False)), False
    for node in list(graph.nodes):
        product = _product(node)
        if product is not None and (whole := _transposition_of(product.matrix)) is not None:
            product = product._replace(matrix=whole, transposed=not product.transposed)
        if product is None or not _is_parameter(product.matrix, stored, 2) or product.input.op == "get_attr":
            continue
        width = stored[str(product.matrix.target)].shape[0 if product.transposed else 1]
        if product.bias is not None and not _is_bias(product.bias, stored, width):
            continue
        found = True
        last, bias = node, product.bias
        if bias is None and (added := _added(node, stored, width)) is not None:
            last, bias = added
        with graph.inserting_before(last):
            weight = product.matrix if product.transposed else graph.call_method("t", (product.matrix,))
            layer = graph.call_function(F.linear, (product.input, weight, bias))
        last.replace_all_uses_with(layer)
        for unused in (last, node, *node.all_input_nodes):
            if not unused.users and unused in graph.nodes and unused.op != "placeholder":
                graph.erase_node(unused)
    return found


def _product(node: fx.Node) -> _Product | None:
    """Return a node's product if it may be a linear layer's."""
    if node.kwargs or not all(isinstance(each, (fx.Node, str)) for each in node.args):
        return None
    read = _READERS.get(node.target if node.op == "call_function" else f".{node.target}")
    try:
        return None if read is None else read(*node.args)
    except TypeError:  # other arguments
        return None


def calls_t(node: fx.Node) -> bool:
    """Return True for the transposition that ``make_layers`` writes."""
    return node.op == "call_method" and node.target == "t"


def _transposition_of(node: fx.Node) -> fx.Node | None:
    """Return the matrix that a node transposes, or None."""
    source, *axes = node.args or (None,)
    is_t = calls_t(node) or (node.target is getattr and axes == ["T"])
    swaps = node.target in ("transpose", torch.transpose) and set(axes) in ({0, 1}, {-2, -1})
    return source if isinstance(source, fx.Node) and (is_t or swaps) else None


def _einsum(equation: Any, *operands: Any) -> _Product | None:
    if not isinstance(equation, str) or len(operands) != 2:
        return None
    equation = equation.replace(" ", "")
    for transposed, pattern in ((False, _EINSUM), (True, _TRANSPOSED_EINSUM)):
        match = pattern.fullmatch(equation)
        if match is not None and len(set(names := "".join(match.groups("")[1:]))) == len(names):
            return _Product(*operands, transposed)
    return None


def _matmul(first: fx.Node, second: fx.Node) -> _Product:
    return _Product(first, second)


def _addmm(bias: fx.Node, first: fx.Node, second: fx.Node) -> _Product:
    return _Product(first, second, bias=bias)


_READERS: dict[object, Callable[..., _Product | None]] = {
    torch.matmul: _matmul, torch.mm: _matmul, operator.matmul: _matmul, ".matmul": _matmul, ".mm": _matmul,
    torch.addmm: _addmm, torch.einsum: _einsum,
}  # fmt: skip


def _added(node: fx.Node, stored: Mapping[str, Tensor], width: int) -> tuple[fx.Node, fx.Node] | None:
    """Return the addition of a stored vector that alone reads a product, and that vector."""
    [reader, *others] = node.users or [node]
    if others or reader.target not in (operator.add, torch.add) or len(reader.args) != 2 or reader.kwargs:
        return None
    vectors = [each for each in reader.args if isinstance(each, fx.Node) and _is_bias(each, stored, width)]
    return (reader, vectors[0]) if len(vectors) == 1 else None


def _is_bias(node: fx.Node, stored: Mapping[str, Tensor], width: int) -> bool:
    return _is_parameter(node, stored, 1) and stored[str(node.target)].shape == (width,)


def _is_parameter(node: Any, stored: Mapping[str, Tensor], axes: int) -> bool:
    tensor = stored.get(str(node.target)) if isinstance(node, fx.Node) and node.op == "get_attr" else None
    return isinstance(tensor, nn.Parameter) and tensor.dim() == axes and tensor.is_floating_point()
