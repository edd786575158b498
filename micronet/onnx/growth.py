"""Why a quantized ONNX file is larger than the float one, by what takes the bytes."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

import onnx

from micronet.onnx.ops import DEQUANTIZE, QUANTIZE
from micronet.onnx.stored import content_key, stored_tensors

FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)
COPIES = "a weight is stored once for each layer or call that reads it"
CONSTANTS = "it stores floats that the float file computes"
_CALL = re.compile(r"\.\d+(?=\.bias\.float$)")  # the number of a layer's call in the name of its bias
QUANTIZERS = "the quantizers with their scales"


def repeated_bytes(proto: onnx.ModelProto) -> int:
    """Return the bytes of stored tensors that equal an earlier one."""
    return sum(size for _, size, first in _contents(proto.graph.initializer) if not first)


def copied_bytes(proto: onnx.ModelProto) -> int:
    """Return the bytes that a file without its quantizers would save by storing every tensor of the network once.

    Those are equal tensors with their names, and the biases of a layer that is called several times: they were equal
    before each was rounded to the scale of its input.
    """
    seen, total = set[Any](), 0
    for tensor in proto.graph.initializer:
        keys = {_CALL.sub("", tensor.name), content_key(onnx.numpy_helper.to_array(tensor))}
        if not keys.isdisjoint(seen):
            total += tensor.ByteSize()
        seen |= keys
    return total


def describe_growth(before: onnx.ModelProto, after: onnx.ModelProto, repeated: int) -> str:
    """Return what takes most of the bytes that a quantized file has and the float one has not.

    ``repeated``: the bytes of the float file's tensors that equal an earlier one.
    """
    quantizers = [node for node in after.graph.node if node.op_type in (QUANTIZE, DEQUANTIZE)]
    scales = {name for node in quantizers for name in node.input[1:]}
    takes = {
        COPIES: repeated_bytes(after) - repeated,
        CONSTANTS: _float_bytes(after, scales) - _float_bytes(before, set()),
        QUANTIZERS: sum(node.ByteSize() for node in quantizers)
        + sum(tensor.ByteSize() for tensor in after.graph.initializer if tensor.name in scales),
    }
    cause = max(takes, key=lambda each: takes[each])
    return f"mostly {cause} ({takes[cause]:,} bytes)" if cause == QUANTIZERS else f"{cause} ({takes[cause]:,} bytes)"


def _float_bytes(proto: onnx.ModelProto, scales: set[str]) -> int:
    """Return the bytes of the distinct stored floats, without the scales."""
    every = (each for name, each in stored_tensors(proto.graph) if name not in scales)
    floats = _contents(each for each in every if each.data_type in FLOATS)
    return sum(size for _, size, first in floats if first)


def _contents(tensors: Iterable[onnx.TensorProto]) -> Iterator[tuple[str, int, bool]]:
    """Yield the name and the bytes of each tensor, and whether it is the first of its content."""
    seen = set[tuple[Any, ...]]()
    for tensor in tensors:
        values = onnx.numpy_helper.to_array(tensor)
        key = content_key(values)
        yield tensor.name, values.nbytes, key not in seen
        seen.add(key)
