"""An ncnn network under construction, and its values: as floats, as floats before their rounding, and as int8."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from micronet.packed.program import Operation
from micronet.runtimes.ncnn.kinds import infer
from micronet.runtimes.ncnn.layer import LARGEST, Layer, Parameter, clean
from micronet.runtimes.ncnn.shapes import Blob

MAX_INT8 = 127
QUANTIZE = "micronet quantize FLOAT.safetensors --mode ptq --q-type sym --a-sign signed"  # to what ncnn's int8 can hold
EQUAL_PART = -233  # of a Slice
ADD, MULTIPLY, DIVIDE = 0, 2, 3  # BinaryOp's operations
FLOOR, ROUND = 2, 18  # UnaryOp's; it rounds half to even


class Unsupported(Exception):
    """ncnn cannot run an operation, and why; ``cure``: what to do about it."""

    def __init__(self, why: str, cure: str = "") -> None:
        super().__init__(why)
        self.cure = cure


class Grid(NamedTuple):
    """The integers of a quantizer, minus its zero point: round(raw / unit), which stand for multiples of scale."""

    scale: float
    unit: float
    low: int
    high: int

    @property
    def fits(self) -> bool:
        """Whether the integers are int8. ncnn has no -128: it rounds to -127 what we round to -128."""
        return self.low >= -MAX_INT8 - 1 and self.high <= MAX_INT8


HALF = Grid(1.0, 0.5, -1, 1)  # of a sign whose raw values are -1/2 and 1/2


@dataclass
class Value:
    """What an operation computes: blobs that hold it in one form or another, made when they are first needed.

    raw: floats before ``grid`` rounds them; without a grid, the floats themselves. integers: int8. real: floats.
    """

    raw: str | None = None
    grid: Grid | None = None
    integers: str | None = None
    real: str | None = None


class Step(NamedTuple):
    """A convolution or linear layer of ncnn, and the operations that it computes."""

    operations: list[Operation]
    source: str
    result: str
    reads: Grid | None  # the integers of its input, which is int8 if the layer is
    writes: Grid | None  # the integers that it computes; None: floats
    why_float: str | None  # why it is computed in float; None: it is computed in int8


class Rounding(NamedTuple):
    """A Quantize layer of ncnn, which rounds floats to int8."""

    name: str
    source: str
    result: str
    grid: Grid


class NetworkBuilder:
    """The layers so far, and the shape and type of every blob."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.roundings: list[Rounding] = []
        self.layers: list[Layer] = []
        self.blobs: dict[str, Blob] = {}

    def add(
        self, kind: str, name: str, *inputs: str, parameters: dict[int, Parameter] | None = None,
        tensors: list[NDArray[Any]] | None = None, output: str | None = None,
    ) -> str:  # fmt: skip
        """Add a layer with one output; return the output's name. Raises Unsupported if it does not fit its inputs."""
        layer = Layer(
            kind, clean(name), list(inputs), [output or str(len(self.blobs))], parameters or {}, tensors or []
        )
        return self._append(layer)[0]

    def add_slices(self, name: str, blob: str, count: int) -> list[str]:
        """Cut a feature map into equal parts along its channels; return their names."""
        names = [f"{len(self.blobs)}_{index}" for index in range(count)]
        return self._append(Layer("Slice", clean(name), [blob], names, {0: [EQUAL_PART] * count}))

    def _append(self, layer: Layer) -> list[str]:
        try:
            found = infer(layer, [self.blobs[each] for each in layer.inputs])
        except ValueError as error:
            raise Unsupported(str(error)) from error
        self.blobs.update(zip(layer.outputs, found, strict=True))
        self.layers.append(layer)
        return layer.outputs

    def scalar(self, name: str, operator: int, blob: str, value: float) -> str:
        """Add arithmetic with a number."""
        return self.add("BinaryOp", name, blob, parameters={0: operator, 1: 1, 2: float(value)})

    def raw_of(self, value: Value) -> str:
        """Return the floats of a value before its rounding."""
        if value.raw is None:
            value.raw = self.real_of(value, "dequantize")
            value.grid = value.grid and value.grid._replace(unit=value.grid.scale)
        return value.raw

    def integers_of(self, value: Value, name: str) -> str:
        """Return a value as int8."""
        if value.integers is None:
            assert value.grid is not None and value.raw is not None
            scale = np.array([1 / value.grid.unit], np.float32)
            value.integers = self.add("Quantize", f"{name}.quantize", value.raw, tensors=[scale])
            self.roundings.append(Rounding(f"{name}.quantize", value.raw, value.integers, value.grid))
        return value.integers

    def real_of(self, value: Value, name: str) -> str:
        """Return a value as floats, rounded to its grid."""
        if value.real is None:
            value.real = self._dequantized(value, value.grid, name) if value.grid else value.raw
        assert value.real is not None
        return value.real

    def _dequantized(self, value: Value, grid: Grid, name: str) -> str:
        if grid.fits:
            integers = self.integers_of(value, name)
            floats = self.add("Cast", f"{name}.cast", integers, parameters={0: 3, 1: 1})
        else:  # ncnn has no wider integers
            assert value.raw is not None
            divided = self.scalar(f"{name}.divide", DIVIDE, value.raw, grid.unit)
            bounds: dict[int, Parameter] = {0: float(grid.low), 1: float(grid.high)}
            clipped = self.add("Clip", f"{name}.clip", divided, parameters=bounds)
            floats = self.add("UnaryOp", f"{name}.round", clipped, parameters={0: ROUND})
        return floats if grid.scale == 1 else self.scalar(f"{name}.dequantize", MULTIPLY, floats, grid.scale)

    def finish(self, outputs: list[str]) -> list[Layer]:
        """Return the layers with the network's outputs named ``out0``, ``out1``, …

        A blob of ncnn has one reader: a Split copies those that have several.
        """
        readers: dict[str, list[tuple[Layer | None, int]]] = {}
        for layer in self.layers:
            for place, blob in enumerate(layer.inputs):
                readers.setdefault(blob, []).append((layer, place))
        for place, blob in enumerate(outputs):
            readers.setdefault(blob, []).append((None, place))
        found: list[Layer] = []
        for layer in self.layers:
            found.append(layer)
            for place, blob in enumerate(layer.outputs):
                read = readers.get(blob, [])
                if len(read) == 1 and read[0][0] is None and layer.kind != "Input":
                    layer.outputs[place] = f"out{read[0][1]}"
                    self.steps = [each._replace(result=layer.outputs[place]) if each.result == blob else each
                                  for each in self.steps]  # fmt: skip
                else:
                    found += _split(blob, read)
        return found


def _split(blob: str, readers: list[tuple[Layer | None, int]]) -> list[Layer]:
    """Give a blob's readers blobs of their own; return the Split that this takes, if any."""
    if len(readers) == 1 and readers[0][0] is not None:
        return []
    names = []
    for index, (reader, place) in enumerate(readers):
        names.append(f"{blob}_{index}" if reader else f"out{place}")
        if reader:
            reader.inputs[place] = names[-1]
    return [Layer("Split", f"split_{blob}", [blob], names)] if names else []


def bounds_of(low: float, high: float) -> dict[int, Parameter]:
    """Return the parameters of a Clip; ncnn knows no infinity."""
    return {0: max(float(low), -LARGEST), 1: min(float(high), LARGEST)}


def without_rounding(value: Value, raw: str) -> Value:
    """Return a value whose grid is that of another one, and whose floats before the rounding are moved ones."""
    return replace(value, raw=raw, integers=None, real=None)
