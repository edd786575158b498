"""What lowering has made so far: feature maps, kernel calls and constants, and how operations are fused."""

from dataclasses import replace
from typing import Any

from micronet.packed.activations import ACTIVATIONS
from micronet.packed.program import RESULT, Operation, Program
from micronet.runtimes.packed.kernel_call import Epilogue, KernelCall
from micronet.runtimes.packed.kernels import instructions
from micronet.runtimes.packed.kernels.cpu import BITS, FLOAT32, UINT8
from micronet.runtimes.packed.memory import ConstantPool, FeatureMap, UnsupportedProgram

CLIPS = {"relu", "clip"}


class LoweringState:
    """The kernel calls, feature maps and constants of a program, as far as it is lowered.

    values: the maps of the program's values. images: the map of the input.
    """

    def __init__(self, program: Program) -> None:
        channels, rows, columns = program.shape
        self.program = program
        self.readers = program.readers()
        self.values: dict[int, FeatureMap] = {}
        self._as_floats: dict[int, FeatureMap] = {}
        self.fused: set[int] = set()  # operations that are part of an earlier one's epilogue
        self.maps: list[FeatureMap] = []
        self.calls: list[KernelCall] = []
        self.constants = ConstantPool()
        self.images, epilogue = self.new_map(FLOAT32, rows, columns, channels), self.fuse(-1)
        first = self.output(epilogue, rows, columns, channels)
        self.call(instructions.TO_NHWC, self.images, first, **epilogue.fields())

    def new_map(self, dtype: int, rows: int, columns: int, channels: int) -> FeatureMap:
        """Return a new map."""
        return self.map_like(FeatureMap(dtype, rows, columns, channels))

    def map_like(self, x: FeatureMap, **changes: Any) -> FeatureMap:
        """Return a new map with the element type, quantization and shape of another, except for the changes."""
        made = replace(x, pads=[0, 0, 0, 0], **changes)
        if made.rows < 1 or made.columns < 1:
            raise UnsupportedProgram("an empty feature map")
        self.maps.append(made)
        return made

    def floats(self, x: FeatureMap) -> FeatureMap:
        """Return a map as floats; the conversion is shared by all its readers."""
        if x.dtype == FLOAT32:
            return x
        if id(x) not in self._as_floats:
            made = self._as_floats[id(x)] = self.map_like(x, dtype=FLOAT32, scale=1.0, zero_point=0)
            self.call(instructions.ELEMENTWISE, x, made, function=instructions.COPY, **Epilogue(0).fields())
        return self._as_floats[id(x)]

    def fuse(self, index: int, start: Epilogue | None = None) -> Epilogue:
        """Fuse the only readers that follow an operation, up to the first sign or quantize, into an epilogue.

        start: the epilogue that the operation itself is; by default, one without effect.
        """
        found = start or Epilogue(index + 1)
        while len(self.readers[found.value]) == 1:
            (reader,) = self.readers[found.value]
            if reader == RESULT:
                break
            operation = self.program.operations[reader]
            if operation.kind in ACTIVATIONS and not (found.clips or found.activation or index < 0):
                found = found._replace(value=reader + 1).activated(operation)
            elif operation.kind in CLIPS and not found.clips:
                found = found._replace(value=reader + 1).clipped(operation)
            elif operation.kind == "sign":
                found = found._replace(value=reader + 1, dtype=BITS)
            elif operation.kind == "quantize":
                found = found._replace(value=reader + 1, dtype=UINT8, quantize=operation.attributes)
            else:
                break
            self.fused.add(reader)
            if found.dtype != FLOAT32:
                break
        return found

    def output(self, epilogue: Epilogue, rows: int, columns: int, channels: int) -> FeatureMap:
        """Return a new map for the value that an epilogue computes."""
        made = self.new_map(epilogue.dtype, rows, columns, channels)
        if epilogue.dtype == UINT8:
            low, high = epilogue.quantize["range"]
            if low < -128 or high > (255 if low >= 0 else 127):
                raise UnsupportedProgram("activations of more than 8 bits")
            made.scale = epilogue.quantize["scale"]
            made.zero_point = epilogue.quantize["zero_point"] + (128 if low < 0 else 0)
        self.values[epilogue.value] = made
        return made

    def call(self, opcode: int, x: FeatureMap, out: FeatureMap, y: FeatureMap | None = None, **fields: Any) -> None:
        """Add a kernel call."""
        self.calls.append(KernelCall({"opcode": opcode, "barrier": True, **fields}, x, out, y))

    def chain(self, index: int, end: int) -> list[Operation]:
        """Return an operation and those fused into it, up to the one that computes value ``end``."""
        found = [self.program.operations[index]]
        while index + 1 != end:
            (index,) = self.readers[index + 1]
            found.append(self.program.operations[index])
        return found
