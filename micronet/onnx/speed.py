"""How fast a quantized ONNX file is beside the same network in float."""

from functools import partial
from typing import Any

import onnx
from onnx.reference import ReferenceEvaluator

from micronet.errors import first_line
from micronet.evaluation.latency import latencies
from micronet.evaluation.network import Predictor
from micronet.onnx.channel_padding import restore_channels
from micronet.onnx.feeds import Feed
from micronet.onnx.gates import restore_gates
from micronet.onnx.growth import copied_bytes, describe_growth, repeated_bytes
from micronet.onnx.ops import DEQUANTIZE, QUANTIZE
from micronet.onnx.sessions import one_sample
from micronet.onnx.stored import node_lists, unpack_weights
from micronet.runtimes.config import RuntimeOptions
from micronet.runtimes.onnxruntime import open_session, session_predictor

OPTIONS = RuntimeOptions(threads=1)


def measure_speed(proto: onnx.ModelProto, sample: Any) -> dict[str, Any]:
    """Time a quantized file and the same network in float in turns, with one thread and one sample.

    ``sample``: an array (1, ...), or a tuple of them if the network takes several inputs.

    Returns ``int8_ms`` and ``float_ms``, or ``skipped``: why a runtime refused. If the file is larger than in float,
    which stores equal weights once, also ``int8_bytes``, ``float_bytes`` and ``growth``, the reason.
    """
    try:
        plain = without_quantizers(proto)
        return _times([session_predictor(each.SerializeToString(), OPTIONS) for each in (proto, plain)], sample) | (
            compare_sizes(plain, proto, copied_bytes(plain))
        )
    except Exception as error:  # a courtesy: whatever a runtime raises must not spoil the export
        return {"skipped": first_line(error)}


def measure_size(proto: onnx.ModelProto) -> dict[str, Any]:
    """Return of a quantized file what ``measure_speed`` does if it is larger than in float, or nothing."""
    try:
        plain = without_quantizers(proto)
        return compare_sizes(plain, proto, copied_bytes(plain))
    except Exception:  # as above
        return {}


def measure_files(floating: onnx.ModelProto, int8: onnx.ModelProto, feed: Feed) -> dict[str, Any]:
    """Return what ``measure_speed`` does of two files, and ``batch``: 1, unless the files take no single sample.

    ``feed``: inputs of any number of samples.
    """
    sessions = [open_session(each.SerializeToString(), OPTIONS, "the model") for each in (floating, int8)]
    one = one_sample(sessions[0], feed)
    runs: list[Predictor] = [partial(session.run, None) for session in reversed(sessions)]
    first = next(iter(one.values()))
    return {**_times(runs, one), "batch": len(first) if first.ndim else 1}


def _times(runs: list[Predictor], sample: Any) -> dict[str, float]:
    """Return ``int8_ms`` and ``float_ms``; ``runs``: the int8 and the float network."""
    ours, theirs = (found.p50_ms for found in latencies(runs, [sample, sample], one_thread=True))
    return {"int8_ms": round(ours, 4), "float_ms": round(theirs, 4)}


def compare_sizes(floating: onnx.ModelProto, int8: onnx.ModelProto, shared: int = 0) -> dict[str, Any]:
    """Return ``int8_bytes``, ``float_bytes`` and ``growth``, the reason, if a quantized file is larger; else nothing.

    ``shared``: the bytes that the float file would save by storing what it shares once, and should not count.
    """
    before, after = floating.ByteSize() - shared, int8.ByteSize()
    if after <= before:
        return {}
    repeated = max(0, repeated_bytes(floating) - shared)
    return {"int8_bytes": after, "float_bytes": before, "growth": describe_growth(floating, int8, repeated)}


def without_quantizers(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model in float: activations are not quantized, and weights are stored dequantized."""
    plain = onnx.ModelProto()
    plain.CopyFrom(unpack_weights(proto))
    restore_gates(plain)
    graph, same = plain.graph, dict[str, str]()
    stored = {tensor.name: tensor for tensor in graph.initializer}
    kept = []
    for node in list(graph.node):
        source = same.get(node.input[0], node.input[0]) if node.input else ""
        if node.op_type in (DEQUANTIZE, "Reshape") and all(name in stored for name in node.input):  # a weight
            given = {name: onnx.numpy_helper.to_array(stored[name]) for name in node.input}
            computed: Any = ReferenceEvaluator(node).run(None, given)
            stored[node.output[0]] = onnx.numpy_helper.from_array(computed[0], node.output[0])
            continue
        if node.op_type == QUANTIZE or (node.op_type == DEQUANTIZE and node.input[0] in same):
            same[node.output[0]] = source
            continue
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.input[:] = [same.get(name, name) for name in node.input]
        kept.append(copy)
    for entry in graph.output:
        if entry.name in same:
            kept.append(onnx.helper.make_node("Identity", [same[entry.name]], [entry.name]))
    del graph.node[:]
    graph.node.extend(kept)
    read = {name for part in node_lists(graph) for node in part.node for name in node.input}
    read |= {entry.name for entry in graph.output}
    del graph.initializer[:]
    graph.initializer.extend(tensor for name, tensor in stored.items() if name in read)
    restore_channels(plain)
    return plain
