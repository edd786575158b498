"""Weights of fewer than 8 bits, stored in about as many.

``pack_weights`` stores several integers in a byte, with operators that unpack them. ONNX Runtime and OpenVINO compute
operators on constants once, when they load a file. What they execute afterwards is what they execute for int8 weights:
the same operators, the same integers, the same speed. ``to_int4`` stores ONNX's own INT4, which ONNX Runtime 1.32
dequantizes in every run: measured, 3.6 to 5.7 times as slow.
"""

import math
import operator
from collections import Counter
from functools import reduce
from itertools import accumulate
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper
from onnxruntime import GraphOptimizationLevel

from micronet.errors import MicronetError
from micronet.onnx.graph_view import array
from micronet.onnx.ops import DEQUANTIZE
from micronet.runtimes.onnxruntime import optimize

INT4_MIN, INT4_MAX = -8, 7
EIGHT_BITS = {TensorProto.INT8, TensorProto.UINT8}
BYTE, BYTE_BITS = 256, 8


def pack_weights(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model whose stored integers are packed where that saves bytes; it computes the same.

    Raises MicronetError if it saves none, or if ONNX Runtime would not execute the same operators.
    """
    packed = onnx.ModelProto()
    packed.CopyFrom(proto)
    graph, nodes, tables, narrow = packed.graph, list[NodeProto](), dict[str, TensorProto](), False
    dequantized = {node.input[0] for node in graph.node if node.op_type == DEQUANTIZE}
    for stored in [each for each in graph.initializer if each.name in dequantized]:
        if stored.data_type not in EIGHT_BITS or not math.prod(stored.dims):
            continue
        weight = _PackedWeight(stored)
        narrow |= bool(weight.tensors)
        if weight.tensors and weight.size_bytes < stored.ByteSize():
            graph.initializer.remove(stored)
            graph.initializer.extend(weight.tensors)
            nodes += weight.nodes
            tables |= weight.tables
    graph.initializer.extend(tables.values())
    nodes += graph.node
    del graph.node[:]
    graph.node.extend(nodes)
    if packed.ByteSize() >= proto.ByteSize():
        raise MicronetError(
            "--low-bit-storage has no effect on this network, because its layers of fewer than 8 bits are smaller than "
            "the operators that would unpack them; drop the option"
            if narrow
            else "--low-bit-storage has no effect on this network, because its weights have 8 bits; drop the option, "
            "or quantize the network with fewer, for example --w-bits 4"
        )
    if _executed(packed) != _executed(proto):
        raise MicronetError(
            "--low-bit-storage makes this network slower, because the installed ONNX Runtime does not unpack its "
            "weights when it loads the file; drop the option"
        )
    return packed


def _executed(proto: onnx.ModelProto) -> Counter[str]:
    """Return how often ONNX Runtime executes each operator."""
    optimized = optimize(proto.SerializeToString(), GraphOptimizationLevel.ORT_ENABLE_ALL)
    return Counter(node.op_type for node in optimized.graph.node)


class _PackedWeight:
    """What replaces a stored tensor: packed tensors, nodes that unpack them, and tables that other weights may share.

    The integers are minimum + unit * index. An index is split into digits (see ``radices``). Those of one radix are
    stored as many to a byte as fit, and a table lists what the digits in each possible byte add to the integers.
    """

    def __init__(self, stored: TensorProto) -> None:
        self.name = stored.name
        self.tensors: list[TensorProto] = []
        self.nodes: list[NodeProto] = []
        self.tables: dict[str, TensorProto] = {}
        q = numpy_helper.to_array(stored)
        values = q.astype(np.int64).reshape(-1)
        minimum = int(values.min())
        unit = int(np.gcd.reduce(values - minimum)) or 1
        index = (values - minimum) // unit
        digits = radices(int(index.max()) + 1)
        parts = []
        for radix, weight in zip(digits, accumulate(digits, operator.mul, initial=1), strict=False):
            table = _table(radix, unit * weight, minimum if weight == 1 else 0, q.dtype if weight == 1 else np.uint8)
            self.tables[table.name] = table
            parts.append(self._unpack(index // weight % radix, radix, table.name))
        if len(parts) > 1:
            total = reduce(
                lambda a, b: self._add("Add", [a, b]),
                (self._add("Cast", [part], to=TensorProto.INT32) for part in parts),
            )
            parts = [self._add("Cast", [total], to=stored.data_type)]
        for part in parts:
            self._add("Reshape", [part, self._store("shape", np.array(q.shape))], self.name)

    @property
    def size_bytes(self) -> int:
        """Bytes in the file, without the tables."""
        parts: list[Any] = [*self.tensors, *self.nodes]
        return sum(part.ByteSize() for part in parts)

    def _unpack(self, digits: NDArray[np.int64], radix: int, table: str) -> str:
        """Store digits, and return what the table makes of them, one by one."""
        count = digits_per_byte(radix)
        padded = np.pad(digits, (0, -digits.size % count)).reshape(-1, count)
        packed = self._store(f"digits_{radix}", (padded @ radix ** np.arange(count)).astype(np.uint8))
        rows = self._add("Gather", [table, self._add("Cast", [packed], to=TensorProto.INT32)])
        flat = self._add("Reshape", [rows, self._shared("low_bits.flat", [-1])])
        if padded.size == digits.size:
            return flat
        ends = self._shared("low_bits.0", [0]), self._shared(f"low_bits.{digits.size}", [digits.size])
        return self._add("Slice", [flat, *ends])

    def _store(self, name: str, values: NDArray[Any]) -> str:
        self.tensors.append(numpy_helper.from_array(values, f"{self.name}.{name}"))
        return self.tensors[-1].name

    def _shared(self, name: str, values: list[int]) -> str:
        self.tables[name] = numpy_helper.from_array(np.array(values), name)
        return name

    def _add(self, op: str, inputs: list[str], output: str | None = None, **attributes: Any) -> str:
        result = output or f"{self.name}.packed_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [result], **attributes))
        return result


def _table(radix: int, step: int, offset: int, dtype: Any) -> TensorProto:
    """Return (bytes, digits in a byte): offset + step * digit."""
    powers = radix ** np.arange(digits_per_byte(radix))
    digits = np.arange(radix ** len(powers))[:, None] // powers % radix
    return numpy_helper.from_array(
        (offset + step * digits).astype(dtype), f"low_bits.{radix}.{step}.{offset}.{np.dtype(dtype)}"
    )


def radices(levels: int) -> list[int]:
    """Return the radices of the digits of an index below ``levels``, the lowest digit first; [] for 8 bits.

    One digit if that takes no more bits than a binary index: a byte holds five digits of radix 3, four of radix 4. The
    others, such as 3 bits, are split into digits of 4, 2 and 1 bits.
    """
    bits = max(1, (levels - 1).bit_length())
    if bits * digits_per_byte(max(2, levels)) >= BYTE_BITS > bits:
        return [max(2, levels)]
    return [2**each for each in (4, 2, 1) if bits & each]


def digits_per_byte(radix: int) -> int:
    """Return how many digits of a radix a byte holds."""
    return max(count for count in range(BYTE_BITS + 1) if radix**count <= BYTE)


def to_int4(model: ir.Model) -> None:
    """Store every weight whose integers fit 4 bits as INT4, two per byte; raise MicronetError if none does."""
    done, int4 = False, ir.DataType.INT4.numpy()
    for node in model.graph:
        q, scale, zero_point = (array(node, index) for index in range(3))
        if node.op_type != DEQUANTIZE or q is None or scale is None or q.dtype != np.int8:
            continue
        unit = int(np.gcd.reduce(np.abs(q.astype(np.int64)), axis=None)) or 1  # int8 may hold a coarser grid
        if q.min() < INT4_MIN * unit or q.max() > INT4_MAX * unit or (zero_point is not None and zero_point.any()):
            continue
        arrays = (q // unit).astype(int4), (scale * np.float64(unit)).astype(np.float32), np.zeros(scale.shape, int4)
        for value, values in zip(filter(None, node.inputs), arrays, strict=False):
            value.const_value = ir.tensor(values, name=value.name)
        done = True
    if not done:
        raise MicronetError(
            "--int4-storage: this network has no weights of 4 bits or fewer; quantize it with --w-bits 4"
        )
