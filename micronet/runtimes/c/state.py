"""What lowering has made so far: maps, calls of kernels and tables, and how operations are fused."""

from dataclasses import replace
from typing import Any

import numpy as np

from micronet import registry
from micronet.errors import MicronetError, either
from micronet.packed.activations import ACTIVATIONS
from micronet.packed.program import RESULT, Operation, Program
from micronet.runtimes.c.maps import BITS, BYTES, FLOATS, Call, Map, integers
from micronet.runtimes.c.tables import Tables, fields, literal

STEPS = {"relu", "clip", *ACTIVATIONS}  # functions of single values that follow a layer
OTHERS = either([name for name in registry.RUN_PACKED if name != "c"])


class Fused:
    """What follows an operation in the same call: functions, then a sign or a quantizer.

    value: the number of the value that comes out. steps: C initializers. target: the type and quantization of its map.
    """

    def __init__(self, value: int) -> None:
        self.value = value
        self.steps: list[str] = []
        self.kinds: list[str] = []
        self.target: dict[str, Any] = {"type": FLOATS}

    @property
    def open(self) -> bool:
        """Whether functions of floats may still follow."""
        return bool(self.target["type"] == FLOATS)

    def take(self, operation: Operation) -> None:
        """Add an operation: one of STEPS, a sign or a quantizer."""
        attributes = operation.attributes
        if operation.kind == "sign":
            self.target = {"type": BITS}
        elif operation.kind == "quantize":
            scale = float(np.float32(attributes["scale"]))
            self.target = integers(scale, int(attributes["zero_point"]), *attributes["range"])
        elif operation.kind in ACTIVATIONS:
            self._add(operation.kind, *(attributes.get(name, 0) for name in ("alpha", "beta")))
        else:
            low, high = attributes["bounds"] if operation.kind == "clip" else (0.0, np.inf)
            for kind, bound in (("at_least", low), ("at_most", high)):
                if np.isfinite(np.float32(bound)):
                    self._add(kind, bound, 0)

    def _add(self, kind: str, *numbers: float) -> None:
        self.kinds.append(kind)
        self.steps.append(f"{{step_{kind}, {', '.join(literal(np.float32(each)) for each in numbers)}}}")


class State:
    """The calls, maps and tables of a program, as far as it is lowered.

    values: the maps of the program's values. structs: C definitions of the calls' parameters. functions: kinds of steps
    in use. patch_bytes: the memory that a window takes. place: says which operation is being lowered.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.readers = program.readers()
        self.values: dict[int, Map] = {}
        self.fused: set[int] = set()
        self.calls: list[Call] = []
        self.tables = Tables()
        self.structs: list[str] = []
        self.functions: list[str] = []
        self.patch_bytes = 0
        self.index = -1  # the operation that is being lowered
        self._made: dict[tuple[int, str], Map] = {}

    def refuse(self, what: str) -> MicronetError:
        """Return the error for what C does not support in the operation that is being lowered."""
        operation = self.program.operations[self.index]
        return MicronetError(
            f"--target c does not support {what}: {operation.name}{operation.line} (operation {self.index}, "
            f"{operation.kind}); nothing was written; choose --target {OTHERS}, which support it"
        )

    def mismatch(self) -> MicronetError:
        """Return the error for an operation that its inputs do not fit."""
        return MicronetError("the layers of the packed network do not fit together; pack the network again")

    def call(
        self, kernel: str, reads: list[Map], writes: list[Map], arguments: str = "", in_place: bool = False
    ) -> None:
        """Add a call of a kernel."""
        self.calls.append(Call(kernel, self.index, reads, writes, arguments, in_place))

    def struct(self, kind: str, **values: Any) -> str:
        """Add a constant struct of parameters; return the argument that names it."""
        name = f"{kind}_{len(self.structs)}"
        self.structs.append(f"static const {kind} {name} = {fields(**values)};")
        return f"&{name}"

    def steps(self, fused: Fused) -> dict[str, Any]:
        """Return the fields of a struct that hold the functions which follow."""
        if not fused.steps:
            return {}
        self.functions += [kind for kind in fused.kinds if kind not in self.functions]
        name = f"steps_{len(self.structs)}"
        body = ", ".join(fused.steps)
        self.structs.append(f"static const step {name}[{len(fused.steps)}] = {{{body}}};")
        return {"steps": name, "step_count": len(fused.steps)}

    def table(self, values: Any) -> str:
        """Add a table of the operation that is being lowered; return its name."""
        return self.tables.add(self.index, values)

    def fuse(self, value: int, start: Operation | None = None) -> Fused:
        """Fuse the functions that are a value's only readers, up to the first sign or quantizer.

        start: an operation that is itself the first of them.
        """
        found = Fused(value)
        if start is not None:
            found.take(start)
        while found.open and len(self.readers[found.value]) == 1 and self.readers[found.value] != [RESULT]:
            (reader,) = self.readers[found.value]
            operation = self.program.operations[reader]
            if operation.kind not in (*STEPS, "sign", "quantize"):
                break
            found.take(operation)
            found.value = reader + 1
            self.fused.add(reader)
        return found

    def output(self, fused: Fused, rows: int, columns: int, channels: int, like: Map | None = None) -> Map:
        """Make the map of a fused operation; ``flat`` and ``vector`` are those of ``like``."""
        shape: dict[str, Any] = {"flat": like.flat, "vector": like.vector} if like else {}
        made = Map(rows=rows, columns=columns, channels=channels, **fused.target, **shape)
        self.values[fused.value] = made
        return made

    def floats(self, x: Map) -> Map:
        """Return a map as floats; the conversion is shared by all its readers."""
        if x.type == FLOATS:
            return x
        return self._convert(x, "floats", "elementwise", {"type": FLOATS, "scale": 1.0, "zero": 0, "low": 0, "high": 0})

    def bytes_of(self, x: Map) -> Map:
        """Return signs as uint8 values, others as they are."""
        if x.type != BITS:
            return x
        return self._convert(x, "bytes", "signs_to_bytes", {"type": BYTES, "zero": 1, "high": 2})

    def _convert(self, x: Map, name: str, kernel: str, changes: dict[str, Any]) -> Map:
        if (id(x), name) not in self._made:
            made = self._made[id(x), name] = copy_of(x, **changes)
            arguments = self.struct("pointwise") if kernel == "elementwise" else ""
            self.call(kernel, [x], [made], arguments)
        return self._made[id(x), name]

    def materialize(self, x: Map) -> Map:
        """Return a flattened map with its values in the order of the network's, as one pixel."""
        if not x.flat or x.pixels == 1:
            return x
        if (id(x), "row") not in self._made:
            made = copy_of(x, rows=1, columns=1, channels=x.pixels * x.channels, flat=False)
            self._made[id(x), "row"] = made
            self.call("flatten", [x], [made])
        return self._made[id(x), "row"]


def copy_of(x: Map, **changes: Any) -> Map:
    """Return a new map like another, except for the changes, with memory of its own."""
    buffer = type(x.buffer)()
    return replace(x, buffer=buffer, **changes)
