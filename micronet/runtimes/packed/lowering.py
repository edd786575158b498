"""Lowering: from a program's operations to kernel calls, with element types chosen and operations fused."""

import math
from dataclasses import replace
from typing import Any

import numpy as np

from micronet.packed.program import Operation, Program
from micronet.runtimes.packed import conv_constants
from micronet.runtimes.packed.conv_constants import ConvGroup, merge_groups
from micronet.runtimes.packed.kernel_call import Epilogue, KernelCall
from micronet.runtimes.packed.kernels import instructions
from micronet.runtimes.packed.kernels.cpu import BITS, FLOAT32, UINT8
from micronet.runtimes.packed.memory import Array, ConstantPool, FeatureMap, UnsupportedProgram
from micronet.runtimes.packed.weight_layout import MAX_DIFFERING, max_differing

CLIPS = {"relu", "clip"}
READ_FLAT = {"linear", "relu", "clip", "sign", "quantize", "add", "mul", "concat"}  # operations on flattened maps


class Lowering:
    """The kernel calls, feature maps and constants of a program. Raises UnsupportedProgram if no kernel fits.

    images, result: the maps of the input and of the program's last value. scores: the result as floats.
    """

    def __init__(self, program: Program) -> None:
        channels, rows, columns = program.shape
        self._program = program
        self._readers: list[list[int]] = [[] for _ in range(len(program.operations) + 1)]
        for index, operation in enumerate(program.operations):
            for source in operation.inputs:
                self._readers[source].append(index)
        self._values: dict[int, FeatureMap] = {}
        self._as_floats: dict[int, FeatureMap] = {}
        self._fused: set[int] = set()  # operations that are part of an earlier one's epilogue
        self.maps: list[FeatureMap] = []
        self.calls: list[KernelCall] = []
        self.constants = ConstantPool()
        self.images, epilogue = self._new_map(FLOAT32, rows, columns, channels), self._fuse(-1)
        first = self._output(epilogue, rows, columns, channels)
        self._call(instructions.TO_NHWC, self.images, first, **epilogue.fields())
        for index, operation in enumerate(program.operations):
            if index not in self._fused:
                self._lower(index, operation)
        self.result = self._values[len(program.operations)]
        self.scores = self._floats(self.result)

    def _new_map(self, dtype: int, rows: int, columns: int, channels: int) -> FeatureMap:
        return self._map_like(FeatureMap(dtype, rows, columns, channels))

    def _map_like(self, x: FeatureMap, **changes: Any) -> FeatureMap:
        """Return a new map with the element type, quantization and shape of another, except for the changes."""
        made = replace(x, pads=[0, 0, 0, 0], **changes)
        if made.rows < 1 or made.columns < 1:
            raise UnsupportedProgram("an empty feature map")
        self.maps.append(made)
        return made

    def _floats(self, x: FeatureMap) -> FeatureMap:
        """Return a map as floats; the conversion is shared by all its readers."""
        if x.dtype == FLOAT32:
            return x
        if id(x) not in self._as_floats:
            made = self._as_floats[id(x)] = self._map_like(x, dtype=FLOAT32, scale=1.0, zero_point=0)
            self._call(instructions.ELEMENTWISE, x, made, function=instructions.COPY, **Epilogue(0).fields())
        return self._as_floats[id(x)]

    def _fuse(self, index: int, low: float = -math.inf, high: float = math.inf) -> Epilogue:
        """Fuse the only readers that follow an operation, up to the first sign or quantize, into an epilogue."""
        found = Epilogue(index + 1, low, high)
        while len(self._readers[found.value]) == 1:
            (reader,) = self._readers[found.value]
            operation = self._program.operations[reader]
            if operation.kind in CLIPS and not found.clips:
                low, high = operation.attributes.get("bounds", [0, math.inf])
                found = found._replace(value=reader + 1, clip_low=low, clip_high=high)
            elif operation.kind == "sign":
                found = found._replace(value=reader + 1, dtype=BITS)
            elif operation.kind == "quantize":
                found = found._replace(value=reader + 1, dtype=UINT8, quantize=operation.attributes)
            else:
                break
            self._fused.add(reader)
            if found.dtype != FLOAT32:
                break
        return found

    def _output(self, epilogue: Epilogue, rows: int, columns: int, channels: int) -> FeatureMap:
        """Return a new map for the value that an epilogue computes."""
        made = self._new_map(epilogue.dtype, rows, columns, channels)
        if epilogue.dtype == UINT8:
            low, high = epilogue.quantize["range"]
            if low < -128 or high > (255 if low >= 0 else 127):
                raise UnsupportedProgram("activations of more than 8 bits")
            made.scale = epilogue.quantize["scale"]
            made.zero_point = epilogue.quantize["zero_point"] + (128 if low < 0 else 0)
        self._values[epilogue.value] = made
        return made

    def _lower(self, index: int, operation: Operation) -> None:
        inputs = [self._values[source] for source in operation.inputs]
        x = inputs[0]
        if operation.kind not in READ_FLAT and any(each.flat and each.rows * each.columns > 1 for each in inputs):
            raise UnsupportedProgram(f"{operation.kind} of a flattened feature map")
        if operation.kind in ("conv", "linear", "threshold"):
            self._lower_conv(index, operation, x)
        elif operation.kind in ("max_pool", "average_pool", "mean"):
            self._lower_pool(index, operation, x)
        elif operation.kind == "flatten":
            self._lower_flatten(index, x)
        elif operation.kind == "shuffle":
            self._lower_shuffle(index, operation.attributes["groups"], x)
        elif operation.kind == "concat":
            self._lower_concat(index, inputs)
        else:
            self._lower_elementwise(index, operation, inputs)

    def _lower_flatten(self, index: int, x: FeatureMap) -> None:
        """Mark a map as flat; only linear layers, elementwise operations and the end of the program can read it."""
        value = next(value for value, known in self._values.items() if known is x)
        if len(self._readers[value]) > 1:
            raise UnsupportedProgram("a feature map that is used both flattened and unflattened")
        x.flat = True
        self._values[index + 1] = x

    def _lower_shuffle(self, index: int, groups: int, x: FeatureMap) -> None:
        if x.channels % groups:
            raise UnsupportedProgram("a channel shuffle with uneven groups")
        made = self._values[index + 1] = self._map_like(x)
        self._call(instructions.SHUFFLE, x, made, groups=groups)

    def _lower_elementwise(self, index: int, operation: Operation, inputs: list[FeatureMap]) -> None:
        x, kind = inputs[0], operation.kind
        function, fields = instructions.COPY, {}
        if kind in ("sign", "quantize"):
            epilogue = Epilogue(index + 1, dtype=BITS if kind == "sign" else UINT8, quantize=operation.attributes)
        elif kind in CLIPS:
            epilogue = self._fuse(index, *operation.attributes.get("bounds", [0, math.inf]))
        else:
            epilogue = self._fuse(index)
        if kind == "affine":
            assert operation.scale is not None and operation.bias is not None
            function = instructions.SCALE
            fields = {
                "scale": self.constants.add("floats", np.broadcast_to(operation.scale, x.channels)),
                "bias": self.constants.add("floats", np.broadcast_to(operation.bias, x.channels)),
            }
        elif kind in ("add", "mul"):
            function = instructions.ADD if kind == "add" else instructions.MULTIPLY
            if inputs[1].rows * inputs[1].columns > x.rows * x.columns:
                inputs = inputs[::-1]
                x = inputs[0]
        y = inputs[1] if len(inputs) > 1 else None
        if y is not None:
            broadcasts = (y.rows, y.columns) in ((x.rows, x.columns), (1, 1))
            if not broadcasts or y.channels != x.channels or y.flat != x.flat:
                raise UnsupportedProgram(f"{kind} of feature maps of different shapes")
        out = self._output(epilogue, x.rows, x.columns, x.channels)
        out.flat = x.flat
        self._call(instructions.ELEMENTWISE, x, out, y, function=function, **epilogue.fields(), **fields)

    def _lower_concat(self, index: int, parts: list[FeatureMap]) -> None:
        alike = len({(part.dtype, part.scale, part.zero_point) for part in parts}) == 1
        if not alike or (parts[0].dtype == BITS and any(part.channels % 8 for part in parts)):
            parts = [self._floats(part) for part in parts]
        first = parts[0]
        if len({(part.rows, part.columns, part.flat) for part in parts}) > 1:
            raise UnsupportedProgram("concatenation of feature maps of different shapes")
        made = self._values[index + 1] = self._map_like(first, channels=sum(part.channels for part in parts))
        bounds = {**Epilogue(0).fields(), "level_low": -510.0, "level_high": 510.0}
        channel = 0
        for part in parts:
            self._call(instructions.ELEMENTWISE, part, made, function=instructions.COPY, **bounds)
            self.calls[-1].out_channel = channel
            channel += part.channels

    def _lower_pool(self, index: int, operation: Operation, x: FeatureMap) -> None:
        attributes = operation.attributes
        if operation.kind == "mean":
            attributes = {"kernel": [x.rows, x.columns]}
        top, left, bottom, right = attributes.get("pads", [0, 0, 0, 0])
        (ky, kx), (sy, sx) = attributes["kernel"], attributes.get("stride", [1, 1])
        rows, columns = (x.rows + top + bottom - ky) // sy + 1, (x.columns + left + right - kx) // sx + 1
        is_max = operation.kind == "max_pool"
        x = x if is_max else self._floats(x)
        flat = x.flat or (operation.kind == "mean" and not operation.attributes.get("keep"))
        made = self._values[index + 1] = self._map_like(x, rows=rows, columns=columns, flat=flat)
        self._call(
            instructions.MAX_POOL if is_max else instructions.AVERAGE_POOL, x, made, kernel_y=ky, kernel_x=kx,
            stride_y=sy, stride_x=sx, pad_top=top, pad_left=left, x_rows=x.rows, x_columns=x.columns,
            count_pads=bool(attributes.get("count_pads")),
        )  # fmt: skip

    def _lower_conv(self, index: int, operation: Operation, x: FeatureMap) -> None:
        weight, attributes = _conv_form(operation, x)
        arithmetic = conv_constants.choose_arithmetic(weight, x)
        x = self._floats(x) if arithmetic == FLOAT32 else x
        weight, groups = weight.transpose(0, 2, 3, 1), attributes.get("group", 1)
        if weight.shape[3] * groups != x.channels or len(weight) % groups:
            raise UnsupportedProgram("layers with mismatched sizes")
        stride, dilation = attributes.get("stride", [1, 1]), attributes.get("dilation", [1, 1])
        pads = attributes.get("pads", [0, 0, 0, 0])
        rows, columns = (
            (size + pads[axis] + pads[axis + 2] - (weight.shape[1 + axis] - 1) * dilation[axis] - 1) // stride[axis] + 1
            for axis, size in enumerate((x.rows, x.columns))
        )
        epilogue = Epilogue(index + 1, dtype=BITS) if operation.kind == "threshold" else self._fuse(index)
        out = self._output(epilogue, rows, columns, len(weight))
        out.flat = operation.kind == "linear" and x.flat
        merged, groups = merge_groups(weight, groups, arithmetic, out.dtype)
        if arithmetic == BITS and max_differing(merged) > MAX_DIFFERING:  # zeros between merged groups count too
            arithmetic, x = conv_constants.float_arithmetic(weight), self._floats(x)
            merged, groups = merge_groups(weight, attributes.get("group", 1), arithmetic, out.dtype)
        inputs, each = merged.shape[3], len(merged) // groups
        read = x
        if arithmetic == BITS and groups > 1 and inputs % 32:
            read = self._new_map(BITS, x.rows, x.columns, groups * -(-inputs // 32) * 32)
            self._call(instructions.ALIGN, x, read, groups=groups, channels=x.channels)
        read.pads = [max(pair) for pair in zip(read.pads, pads, strict=True)]
        fields = {
            "opcode": instructions.CONV, "arithmetic": arithmetic, "stride_y": stride[0], "stride_x": stride[1],
            "channels": each, **epilogue.fields(),
        }  # fmt: skip
        for number in range(groups):
            outputs = slice(number * each, (number + 1) * each)
            own, factor = conv_constants.split_factor(merged[outputs], arithmetic)
            group = ConvGroup(operation, outputs, own, factor, arithmetic, x, pads, stride, dilation, (rows, columns))
            own_fields = {"barrier": number == groups - 1, **group.constant_fields(self.constants, epilogue)}
            self.calls.append(KernelCall(
                fields | own_fields, read, out, pads=pads, dilation=dilation, weight=own,
                x_channel=number * read.channels // groups, out_channel=number * each,
            ))  # fmt: skip

    def _call(self, opcode: int, x: FeatureMap, out: FeatureMap, y: FeatureMap | None = None, **fields: Any) -> None:
        self.calls.append(KernelCall({"opcode": opcode, "barrier": True, **fields}, x, out, y))


def _conv_form(operation: Operation, x: FeatureMap) -> tuple[Array, dict[str, Any]]:
    """Return the weight (outputs, inputs, rows, columns) and attributes of a layer, a linear one as a convolution."""
    weight, attributes = operation.weight, operation.attributes
    assert weight is not None
    if operation.kind == "linear":
        shape = (x.rows, x.columns) if x.flat else (1, 1)
        if weight.shape[1] != x.channels * math.prod(shape) or (not x.flat and x.rows * x.columns > 1):
            raise UnsupportedProgram("a linear layer that is applied to each pixel of a feature map")
        weight, attributes = weight.reshape(len(weight), x.channels, *shape), {}
    if any(part is not None and part.size != len(weight) for part in (operation.bias, operation.limits)):
        raise UnsupportedProgram("a bias or threshold that does not have exactly one value per output")
    if operation.kind == "threshold" and (x.dtype == FLOAT32 or weight.dtype.kind != "i" or operation.limits is None):
        raise UnsupportedProgram("a threshold layer with float inputs or weights, or without limits")
    return weight, attributes
