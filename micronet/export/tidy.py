"""What is done to an ONNX graph after torch's exporter: names people can read, no traces of the machine, small.

The exporter writes a stack trace to every node, which is more bytes than a small network's weights and shows the
paths of the machine it ran on.
"""

import ast
import copy

import onnx

_SCOPES = "pkg.torch.onnx.name_scopes"


def tidy(proto: onnx.ModelProto) -> None:
    """Name every node after the module it came from, drop traces and unread tensors, unshare zero points; in place."""
    graph = proto.graph
    used: dict[str, int] = {}
    for node in graph.node:
        name = f"{_module(node)}.{node.op_type}".lstrip(".")
        used[name] = used.get(name, 0) + 1
        node.name = name if used[name] == 1 else f"{name}.{used[name]}"
        del node.metadata_props[:]
        node.doc_string = ""
    for described in (graph, *graph.input, *graph.output, *graph.initializer):
        del described.metadata_props[:]
    del graph.value_info[:]  # any reader infers the shapes again
    _own_zero_points(graph)
    read = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _module(node: onnx.NodeProto) -> str:
    """Return the name of the module a node was exported from."""
    for entry in node.metadata_props:
        if entry.key == _SCOPES:
            scopes = ast.literal_eval(entry.value)
            return str(scopes[-2]) if len(scopes) > 1 else ""
    return ""


def _own_zero_points(graph: onnx.GraphProto) -> None:
    """Give every Q and DQ node a zero-point initialiser of its own.

    The exporter shares equal ones, which ONNX Runtime's exact int8 mode refuses ("Attempt to replace the existing
    tensor").
    """
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    taken: set[str] = set()
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and len(node.input) > 2:
            shared = node.input[2]
            if shared in taken:
                own = copy.deepcopy(initializers[shared])
                own.name = f"{node.name}.zero_point"
                graph.initializer.append(own)
                node.input[2] = own.name
            taken.add(node.input[2])
