"""Clean up an ONNX graph after torch's exporter: readable names, no stack traces, no shared zero points.

The exporter writes a stack trace into every node. The traces take more bytes than a small network's weights, and they
show the paths of the machine on which the export ran.
"""

import ast
import copy
import re

import onnx

# Attributes that the exporter writes although they equal the operator's defaults.
_DEFAULTS = {
    "QuantizeLinear": {"axis": 1, "block_size": 0, "output_dtype": 0, "saturate": 1, "precision": 0},
    "DequantizeLinear": {"axis": 1, "block_size": 0, "output_dtype": 0},
}
_INPUTS = ("q", "scale", "zero_point")  # of QuantizeLinear and DequantizeLinear
_SCOPES = "pkg.torch.onnx.name_scopes"
_CALL = "pkg.torch.onnx.fx_node"
_NAME = re.compile(r"quantize_dequantize\S*\(args = \(.*, ([\w.]+)\), kwargs")


def tidy(proto: onnx.ModelProto) -> None:
    """Name every node after its module, drop traces and unused tensors, and unshare zero points, all in place."""
    graph = proto.graph
    used: dict[str, int] = {}
    for node in graph.node:
        name = f"{_owner(node)}.{node.op_type}".lstrip(".")
        used[name] = used.get(name, 0) + 1
        node.name = name if used[name] == 1 else f"{name}.{used[name]}"
        del node.metadata_props[:]
        node.doc_string = ""
        if node.op_type in _DEFAULTS:
            for attribute in [a for a in node.attribute if _DEFAULTS[node.op_type].get(a.name) == a.i]:
                node.attribute.remove(attribute)
    for item in (graph, *graph.input, *graph.output, *graph.initializer):
        del item.metadata_props[:]
    del graph.value_info[:]  # readers infer the shapes themselves
    _unshare_dequantizers(graph)
    _unshare_initializers(graph)
    _shorten_names(graph)
    read = {name for node in graph.node for name in node.input}
    used_tensors = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(used_tensors)


def _unshare_dequantizers(graph: onnx.GraphProto) -> None:
    """Give every reader of a stored tensor its own DequantizeLinear; a layer that is called twice gets two.

    Otherwise ONNX Runtime splits them itself, shares their initializers, and then refuses its exact int8 mode.
    """
    stored = {tensor.name for tensor in graph.initializer}
    for node in [node for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in stored]:
        readers = [(other, i) for other in graph.node for i, name in enumerate(other.input) if name == node.output[0]]
        for number, (reader, index) in enumerate(readers[1:], 2):
            twin = copy.deepcopy(node)
            twin.name, twin.output[0] = f"{node.name}_{number}", f"{node.output[0]}.reader_{number}"
            graph.node.insert(list(graph.node).index(node), twin)
            reader.input[index] = twin.output[0]


def _shorten_names(graph: onnx.GraphProto) -> None:
    """Rename stored tensors from ``layer.weight_quantizer.scale`` to ``layer.weight.scale``."""
    short = {tensor.name: tensor.name.replace("_quantizer.", ".") for tensor in graph.initializer}
    if len(set(short.values())) < len(short):
        return
    for tensor in graph.initializer:
        tensor.name = short[tensor.name]
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = short.get(name, name)


def _owner(node: onnx.NodeProto) -> str:
    """Return the name of the module from which a node was exported.

    A quantizer's name comes from its call, because the exporter's scopes omit quantizers of traced networks.
    """
    props = {entry.key: entry.value for entry in node.metadata_props}
    if node.op_type == "QuantizeLinear" and (named := _NAME.search(props.get(_CALL, ""))):
        return named[1]
    scopes = ast.literal_eval(props.get(_SCOPES, "[]"))
    return str(scopes[-2]) if len(scopes) > 1 else ""


def _unshare_initializers(graph: onnx.GraphProto) -> None:
    """Give every Q and DQ node its own zero point, and every DQ of a stored tensor its own inputs.

    The exporter shares equal initializers, which ONNX Runtime's exact int8 mode refuses ("Attempt to replace the
    existing tensor").
    """
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    taken: set[str] = set()
    for node in graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        for index, shared in enumerate(node.input):
            if shared not in initializers or (index != 2 and node.input[0] not in initializers):
                continue
            if shared in taken:
                own = copy.deepcopy(initializers[shared])
                own.name = f"{node.name}.{_INPUTS[index]}"
                graph.initializer.append(own)
                node.input[index] = own.name
            taken.add(node.input[index])
