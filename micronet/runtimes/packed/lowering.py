"""Lowering: from a program's operations to kernel calls, with element types chosen and operations fused."""

from typing import Any

import numpy as np

from micronet.packed.activations import ACTIVATIONS
from micronet.packed.program import Operation, Program
from micronet.runtimes.packed.kernel_call import Epilogue
from micronet.runtimes.packed.kernels import instructions
from micronet.runtimes.packed.kernels.cpu import BITS, UINT8
from micronet.runtimes.packed.lower_conv import lower_conv
from micronet.runtimes.packed.lower_moves import MOVES, lower_concat
from micronet.runtimes.packed.lowering_state import CLIPS, LoweringState
from micronet.runtimes.packed.memory import FeatureMap, UnsupportedProgram
from micronet.runtimes.packed.numpy_operators import ELEMENTWISE, Value

# Operations on flattened maps.
READ_FLAT = {"linear", *CLIPS, "sign", "quantize", "add", "mul", "concat", "flatten", *ACTIVATIONS}


class Lowering(LoweringState):
    """The kernel calls, feature maps and constants of a program. Raises UnsupportedProgram if no kernel fits.

    results: the maps of the values that the network returns, as floats, and if they are flat.
    """

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        for index, operation in enumerate(program.operations):
            if index not in self.fused:
                self._lower(index, operation)
        found = [self.values[number] for number in program.results]
        self.results = [(self.floats(each), each.flat) for each in found]

    def _lower(self, index: int, operation: Operation) -> None:
        inputs = [self.values[source] for source in operation.inputs]
        x, kind = inputs[0], operation.kind
        if kind not in READ_FLAT and any(each.flat and each.rows * each.columns > 1 for each in inputs):
            raise UnsupportedProgram(f"{kind} of a flattened feature map")
        if kind in ("conv", "linear", "threshold"):
            lower_conv(self, index, operation, x)
        elif kind in MOVES:
            MOVES[kind](self, index, operation, x)
        elif kind == "concat":
            lower_concat(self, index, inputs)
        else:
            self._lower_elementwise(index, operation, inputs)

    def _lower_elementwise(self, index: int, operation: Operation, inputs: list[FeatureMap]) -> None:
        x, kind = inputs[0], operation.kind
        function, fields = instructions.COPY, {}
        epilogue = self._own_epilogue(index, operation)
        if x.dtype == UINT8 == epilogue.dtype and len(inputs) == 1 and kind != "affine":
            self._lower_table(index, epilogue, x)
            return
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
        out = self.output(epilogue, x.rows, x.columns, x.channels)
        out.flat = x.flat
        self.call(instructions.ELEMENTWISE, x, out, y, function=function, **epilogue.fields(), **fields)

    def _own_epilogue(self, index: int, operation: Operation) -> Epilogue:
        """Return an elementwise operation, if it is part of every epilogue, with those that are fused into it."""
        kind, start = operation.kind, Epilogue(index + 1)
        if kind in ("sign", "quantize"):
            return start._replace(dtype=BITS if kind == "sign" else UINT8, quantize=operation.attributes)
        if kind in CLIPS:
            return self.fuse(index, start.clipped(operation))
        return self.fuse(index, start.activated(operation) if kind in ACTIVATIONS else start)

    def _lower_table(self, index: int, epilogue: Epilogue, x: FeatureMap) -> None:
        """Lower elementwise operations from integers to integers into a table, which numpy fills in."""
        value: Any = Value(np.arange(256), x.scale, x.zero_point)
        for operation in self.chain(index, epilogue.value):
            value = ELEMENTWISE[operation.kind](operation, value)
        out = self.output(epilogue, x.rows, x.columns, x.channels)
        out.flat = x.flat
        levels = value.data.astype(np.int32) + (out.zero_point - value.zero_point)
        table = self.constants.add("bytes", levels.astype(np.uint8))
        self.call(instructions.TABLE, x, out, table=table)
