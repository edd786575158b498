"""From a packed program to the table of compiled steps that runs it."""

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from micronet.runtime.packed.layout import HELD, border_classes, border_sums, laid_out, planes_of, vectors_of
from micronet.runtime.packed.products import BITS, FEWEST, FLOATS, INTEGERS, LANES, PIXELS, WORDS
from micronet.runtime.packed.program import Operation, Program
from micronet.runtime.packed.steps import (
    ADD,
    ALIGN,
    CONV,
    COPY,
    MAP,
    MEAN,
    MULTIPLY,
    POOL,
    SCALE,
    SHUFFLE,
    STEP,
)

Array = NDArray[Any]
LINE = 64  # bytes of a cache line
ALONE = {"relu", "clip"}
NEVER = {BITS: -1, INTEGERS: 2**31 - 1, FLOATS: 0x7F800000}  # limits that no sum passes; infinity
FLAT = {"linear", "relu", "clip", "sign", "quantize", "add", "mul", "concat"}  # they read flat maps


class Unfit(Exception):
    """A program that the compiled steps do not have; numpy runs it."""


@dataclass(eq=False)
class Map:
    """A tensor between steps: what it holds, its sides, and the room that its readers want around it.

    Whole numbers are (value - zero) * scale. ``flat``: for its readers it is (C * H * W).
    """

    kind: int
    rows: int
    columns: int
    channels: int
    scale: float = 1.0
    zero: int = 0
    flat: bool = False
    pads: list[int] = field(default_factory=lambda: [0, 0, 0, 0])
    buffer: int = 0

    @property
    def pixel(self) -> int:
        """Bytes from one pixel to the next."""
        if self.kind == BITS:
            return -(-self.channels // 32) * 4
        return self.channels * (4 if self.kind == FLOATS else WORDS)

    @property
    def row(self) -> int:
        """Bytes from one row to the next."""
        return (self.columns + self.pads[1] + self.pads[3]) * self.pixel

    @property
    def size(self) -> int:
        """Bytes of an image, up to a whole cache line."""
        return -(-(self.rows + self.pads[0] + self.pads[2]) * self.row // LINE) * LINE

    def place(self, pads: list[int]) -> int:
        """Return where an image begins for a reader that wants such pads."""
        return (self.pads[0] - pads[0]) * self.row + (self.pads[1] - pads[1]) * self.pixel

    def offset(self, channel: int) -> int:
        """Return the bytes from a pixel's begin to a channel."""
        if self.kind == BITS:
            return channel // 8
        return channel * (4 if self.kind == FLOATS else WORDS)


class Finish(NamedTuple):
    """What follows a step's float values, up to the value that the program reads."""

    value: int
    least: float = -math.inf
    most: float = math.inf
    kind: int = FLOATS
    quantize: dict[str, Any] = {}  # noqa: RUF012  # never written


@dataclass
class Step:
    """A step before its maps have a place. ``numbers``: fields of STEP. ``channel``: of the output, where it begins."""

    numbers: dict[str, Any]
    x: Map
    out: Map
    y: Map | None = None
    pads: list[int] = field(default_factory=lambda: [0, 0, 0, 0])
    dilation: list[int] = field(default_factory=lambda: [1, 1])
    x_channel: int = 0
    channel: int = 0
    weight: Array | None = None  # (outputs, rows, columns, inputs)


class Plan:
    """A program's steps and constants. ``image``: bytes of all maps of one image. ``layers``: each step before it had a place.

    Raises Unfit where the compiled steps do not have something.
    """

    def __init__(self, program: Program) -> None:
        channels, rows, columns = program.shape
        self._program = program
        self._readers: list[list[int]] = [[] for _ in range(len(program.operations) + 1)]
        for index, operation in enumerate(program.operations):
            for source in operation.inputs:
                self._readers[source].append(index)
        self._maps: dict[int, Map] = {0: Map(FLOATS, rows, columns, channels)}
        self._as_floats: dict[int, Map] = {}
        self._all: list[Map] = [self._maps[0]]
        self.layers: list[Step] = []
        self._done: set[int] = set()
        self._constants = _Constants()
        for index, operation in enumerate(program.operations):
            if index not in self._done:
                self._translate(index, operation)
        if not self.layers:
            raise Unfit("a program that computes nothing")
        self.input, last = self._maps[0], self._maps[len(program.operations)]
        self.output = self._float(last)
        self.flat = last.flat
        self.image = 0
        for each in self._all:
            each.buffer, self.image = self.image, self.image + each.size
        self.steps = np.array(
            [tuple(self._placed(step)[name] for name in STEP.names or ()) for step in self.layers], STEP
        )
        self.constants = self._constants.arrays()
        self.largest = max(each.size for each in self._all)

    def memory(self, images: int) -> NDArray[np.uint8]:
        """Return room for the maps of so many images, their padding filled."""
        reach = PIXELS * max(each.pixel * 4 for each in self._all) + LINE  # the last block of pixels reads beyond
        memory = np.zeros(-(-(self.image * images + reach) // LINE) * LINE, np.uint8)
        for each in self._all:
            if each.kind == INTEGERS and each.zero:
                memory[each.buffer * images : (each.buffer + each.size) * images] = each.zero
        return memory

    def view(self, memory: NDArray[np.uint8], each: Map, images: int) -> NDArray[np.float32]:
        """Return a float map (N, H, W, C) in memory."""
        start = each.buffer * images + each.place([0, 0, 0, 0])
        return np.ndarray(
            (images, each.rows, each.columns, each.channels),
            np.float32,
            memory,
            start,
            (each.size, each.row, each.pixel, 4),
        )

    def _new(self, kind: int, rows: int, columns: int, channels: int, **more: Any) -> Map:
        if rows < 1 or columns < 1:
            raise Unfit("a map is empty")
        made = Map(kind, rows, columns, channels, **more)
        self._all.append(made)
        return made

    def _float(self, x: Map) -> Map:
        """Return a map as floats."""
        if x.kind == FLOATS:
            return x
        if id(x) not in self._as_floats:
            made = self._new(FLOATS, x.rows, x.columns, x.channels, flat=x.flat)
            self._map(COPY, x, made, Finish(0))
            self._as_floats[id(x)] = made
        return self._as_floats[id(x)]

    def _finish(self, index: int) -> Finish:
        """Return what follows an operation's values that can be done while they are at hand."""
        found = Finish(index + 1)
        while len(self._readers[found.value]) == 1:
            (reader,) = self._readers[found.value]
            operation = self._program.operations[reader]
            if operation.kind in ALONE and found.least == -math.inf and found.most == math.inf:
                low, high = operation.attributes.get("bounds", [0, math.inf])
                found = found._replace(value=reader + 1, least=low, most=high)
            elif operation.kind == "sign":
                found = found._replace(value=reader + 1, kind=BITS)
            elif operation.kind == "quantize":
                found = found._replace(value=reader + 1, kind=INTEGERS, quantize=operation.attributes)
            else:
                break
            self._done.add(reader)
            if found.kind != FLOATS:
                break
        return found

    def _finished(self, finish: Finish, rows: int, columns: int, channels: int) -> Map:
        """Return the map that what follows gives."""
        made = self._new(finish.kind, rows, columns, channels)
        if finish.kind == INTEGERS:
            low, high = finish.quantize["range"]
            if low < -128 or high > 255 or high - low > 255:
                raise Unfit("activations of more than 8 bits")
            made.scale = finish.quantize["scale"]
            if WORDS == 1:
                made.zero = finish.quantize["zero_point"] + (128 if low < 0 else 0)
        self._maps[finish.value] = made
        return made

    def _translate(self, index: int, operation: Operation) -> None:
        inputs = [self._maps[source] for source in operation.inputs]
        x = inputs[0]
        if operation.kind not in FLAT and any(each.flat and each.rows * each.columns > 1 for each in inputs):
            raise Unfit("a flat map that is read as a map")
        if operation.kind in ("conv", "linear", "threshold"):
            self._layer(index, operation, x)
        elif operation.kind in ("max_pool", "average_pool", "mean"):
            self._pool(index, operation, x)
        elif operation.kind == "flatten":
            self._maps[index + 1] = self._flattened(x)
        elif operation.kind == "shuffle":
            if x.channels % operation.attributes["groups"]:
                raise Unfit("a shuffle of uneven groups")
            made = self._new(x.kind, x.rows, x.columns, x.channels, scale=x.scale, zero=x.zero)
            self._add(Step({"step": SHUFFLE, "groups": operation.attributes["groups"]}, x, made))
            self._maps[index + 1] = made
        elif operation.kind == "concat":
            self._concat(index, inputs)
        else:
            self._by_value(index, operation, inputs)

    def _flattened(self, x: Map) -> Map:
        """Return a map as its readers see it flat: only a linear layer and the program's end know how to."""
        value = next(value for value, known in self._maps.items() if known is x)
        if len(self._readers[value]) > 1 and x.rows * x.columns > 1:
            raise Unfit("a map that is read flat and as it is")
        x.flat = True
        return x

    def _by_value(self, index: int, operation: Operation, inputs: list[Map]) -> None:
        x, kind = inputs[0], operation.kind
        if kind in ("sign", "quantize"):
            finish = Finish(index + 1, kind=BITS if kind == "sign" else INTEGERS, quantize=operation.attributes)
        else:
            finish = self._finish(index)
        doing, constants = COPY, {}
        if kind in ALONE:
            if finish.least != -math.inf or finish.most != math.inf:
                raise Unfit("one clipping behind another")
            low, high = operation.attributes.get("bounds", [0, math.inf])
            finish = finish._replace(least=low, most=high)
        elif kind == "affine":
            assert operation.scale is not None and operation.bias is not None
            doing = SCALE
            constants = {
                "unit": self._constants.floats(np.broadcast_to(operation.scale, x.channels)),
                "bias": self._constants.floats(np.broadcast_to(operation.bias, x.channels)),
            }
        elif kind in ("add", "mul"):
            doing = ADD if kind == "add" else MULTIPLY
            if inputs[1].rows * inputs[1].columns > x.rows * x.columns:
                inputs = inputs[::-1]
                x = inputs[0]
        second = inputs[1] if len(inputs) > 1 else None
        if second is not None:
            same = (second.rows, second.columns) in ((x.rows, x.columns), (1, 1))
            if not same or second.channels != x.channels or second.flat != x.flat:
                raise Unfit("values of different sides")
        out = self._finished(finish, x.rows, x.columns, x.channels)
        out.flat = x.flat
        self._map(doing, x, out, finish, second, **constants)

    def _map(self, doing: int, x: Map, out: Map, finish: Finish, y: Map | None = None, **numbers: Any) -> None:
        self._add(Step({"step": MAP, "operation": doing, **_ends(finish), **numbers}, x, out, y))

    def _concat(self, index: int, parts: list[Map]) -> None:
        first = parts[0]
        alike = len({(part.kind, part.scale, part.zero) for part in parts}) == 1
        if not alike or (first.kind == BITS and any(part.channels % 8 for part in parts)):
            parts = [self._float(part) for part in parts]
            first = parts[0]
        if len({(part.rows, part.columns, part.flat) for part in parts}) > 1:
            raise Unfit("maps of different sides side by side")
        made = self._new(
            first.kind, first.rows, first.columns, sum(part.channels for part in parts), scale=first.scale,
            zero=first.zero, flat=first.flat,
        )  # fmt: skip
        at = 0
        for part in parts:
            bounds = {"low": -510.0, "top_level": 510.0}
            self._add(Step({"step": MAP, "operation": COPY, **_ends(Finish(0)), **bounds}, part, made, channel=at))
            at += part.channels
        self._maps[index + 1] = made

    def _pool(self, index: int, operation: Operation, x: Map) -> None:
        at = operation.attributes
        if operation.kind == "mean":
            at = {"kernel": [x.rows, x.columns]}
        top, left, bottom, right = at.get("pads", [0, 0, 0, 0])
        (ky, kx), (sy, sx) = at["kernel"], at.get("stride", [1, 1])
        rows, columns = (x.rows + top + bottom - ky) // sy + 1, (x.columns + left + right - kx) // sx + 1
        maximum = operation.kind == "max_pool"
        x = x if maximum else self._float(x)
        made = self._new(x.kind, rows, columns, x.channels, scale=x.scale, zero=x.zero)
        made.flat = operation.kind == "mean" and not operation.attributes.get("keep")
        numbers = {
            "step": POOL if maximum else MEAN, "kernel_y": ky, "kernel_x": kx, "stride_y": sy, "stride_x": sx,
            "top": top, "left": left, "high": x.rows, "wide": x.columns, "count_pads": bool(at.get("count_pads")),
        }  # fmt: skip
        self._add(Step(numbers, x, made))
        self._maps[index + 1] = made

    def _layer(self, index: int, operation: Operation, x: Map) -> None:
        weight, at = operation.weight, operation.attributes
        assert weight is not None
        if operation.kind == "linear":
            sides = (x.rows, x.columns) if x.flat else (1, 1)
            if weight.shape[1] != x.channels * math.prod(sides) or (not x.flat and x.rows * x.columns > 1):
                raise Unfit("a linear layer over the pixels of a map")
            weight, at = weight.reshape(len(weight), x.channels, *sides), {}
        if any(part is not None and part.size != len(weight) for part in (operation.bias, operation.limits)):
            raise Unfit("a layer whose numbers are not one an output")
        product = self._product(weight, x)
        x = self._float(x) if product == FLOATS else x
        weight = weight.transpose(0, 2, 3, 1)
        groups = at.get("group", 1)
        if operation.kind == "threshold" and operation.limits is None:
            raise Unfit("a threshold without limits")
        if weight.shape[3] * groups != x.channels or len(weight) % groups:
            raise Unfit("layers that do not fit one another")
        (sy, sx), (dy, dx) = at.get("stride", [1, 1]), at.get("dilation", [1, 1])
        pads = at.get("pads", [0, 0, 0, 0])
        rows = (x.rows + pads[0] + pads[2] - (weight.shape[1] - 1) * dy - 1) // sy + 1
        columns = (x.columns + pads[1] + pads[3] - (weight.shape[2] - 1) * dx - 1) // sx + 1
        finish = self._finish(index)
        if operation.kind == "threshold":
            finish = Finish(index + 1, kind=BITS)
        out = self._finished(finish, rows, columns, len(weight))
        out.flat = operation.kind == "linear"
        weight, groups = _merged(weight, groups, product, out.kind)
        inner, each = weight.shape[3], len(weight) // groups
        own = x
        if product == BITS and groups > 1 and inner % 32:
            own = self._new(BITS, x.rows, x.columns, groups * -(-inner // 32) * 32)
            self._add(Step({"step": ALIGN, "groups": groups, "channels": x.channels}, x, own))
        own.pads = [max(sides) for sides in zip(own.pads, pads, strict=True)]
        numbers = {
            "step": CONV, "product": product, "stride_y": sy, "stride_x": sx, "channels": each, **_ends(finish),
        }  # fmt: skip
        for group in range(groups):
            part = slice(group * each, (group + 1) * each)
            lone = _Layer(operation, part, weight[part], product, x, pads, (sy, sx), (dy, dx), (rows, columns))
            step = Step(
                {**numbers, **lone.constants(self._constants, finish)}, own, out, pads=pads, dilation=[dy, dx],
                x_channel=group * own.channels // groups, channel=group * each, weight=weight[part],
            )  # fmt: skip
            self._add(step, wait=group == groups - 1)

    def _product(self, weight: Array, x: Map) -> int:
        """Return which products a layer's sums are made of."""
        if weight.dtype.kind != "i" or x.kind == FLOATS:
            return FLOATS
        if x.kind == BITS:
            unit = max(1, int(np.abs(weight).max()))
            return BITS if np.isin(weight, (-unit, 0, unit)).all() else FLOATS
        largest = np.abs(weight.astype(np.int64))
        if largest.max() > 255 or largest.reshape(len(weight), -1).sum(1).max() * 255 > 2**31 - 1:
            raise Unfit("weights of more than 8 bits")
        return INTEGERS

    def _add(self, step: Step, *, wait: bool = True) -> None:
        step.numbers["wait"] = wait
        self.layers.append(step)

    def _placed(self, step: Step) -> dict[str, Any]:
        """Return a step's fields, now that every map has its place."""
        x, out, y = step.x, step.out, step.y
        numbers: dict[str, Any] = dict.fromkeys(STEP.names or (), 0)
        numbers |= {
            "rows": out.rows, "columns": out.columns, "channels": x.channels, "stride_y": 1, "stride_x": 1,
            "limits": -1, "x_zero": x.zero, "x_scale": x.scale, "out_zero": out.zero, "out_scale": out.scale,
        } | step.numbers  # fmt: skip
        for side, each in (("x", x), ("out", out), ("y", y)):
            if each is not None:
                numbers |= {
                    side: each.place([0, 0, 0, 0]), f"{side}_buffer": each.buffer, f"{side}_size": each.size,
                    f"{side}_row": each.row, f"{side}_pixel": each.pixel, f"{side}_kind": each.kind,
                }  # fmt: skip
        numbers["x"] = x.place(step.pads) + x.offset(step.x_channel)
        numbers["out"] += out.offset(step.channel)
        if y is not None:
            numbers |= {"y_zero": y.zero, "y_scale": y.scale}
            if (y.rows, y.columns) != (x.rows, x.columns):
                numbers |= {"y_row": 0, "y_pixel": 0}
        if step.weight is not None:
            numbers |= self._weights(step, numbers["product"])
        whole_rows = numbers["step"] == MAP and numbers["operation"] != SCALE and out.channels == x.channels
        whole_rows = whole_rows and (x.channels % 32 == 0 or BITS not in (x.kind, out.kind, y and y.kind))
        if whole_rows and (y is None or numbers["y_row"]):
            numbers |= {"channels": x.columns * x.channels, "columns": 1}  # a row's pixels lie side by side
        return numbers

    def _weights(self, step: Step, product: int) -> dict[str, int]:
        """Lay out a layer's weights; a row of the kernel is one run where its pixels lie side by side."""
        weight, x = step.weight, step.x
        assert weight is not None
        _, high, wide, inner = weight.shape
        (dy, dx), size = step.dilation, x.offset(8) // 8 if x.kind != BITS else 0
        beside = dx == 1 and (inner % 32 == 0 and x.pixel * 8 == inner if x.kind == BITS else x.pixel == inner * size)
        runs = high if beside else high * wide
        planes = len(planes_of(weight, product))
        offsets = [
            row * dy * x.row + column * dx * x.pixel for row in range(high) for column in range(1 if beside else wide)
        ]
        return {
            "weights": self._constants.bytes(laid_out(weight, product, runs)), "run_count": planes * runs,
            "runs": self._constants.offsets(planes * offsets), "length": -(-(weight[0].size // runs) // HELD[product]),
            "vectors": vectors_of(product, len(weight)),
        }  # fmt: skip


class _Layer(NamedTuple):
    """A group of a layer: which outputs, their weights (outputs, rows, columns, inputs), and where they are taken."""

    operation: Operation
    part: slice
    weight: Array
    product: int
    x: Map
    pads: list[int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    sides: tuple[int, int]

    def constants(self, constants: "_Constants", finish: Finish) -> dict[str, Any]:
        """Return the fields that hold a layer's numbers: limits to compare its sums with, or scales and biases."""
        weight, operation, bits = self.weight, self.operation, self.product == BITS
        magnitude = max(1, int(np.abs(weight).max())) if bits else 1
        signs = weight // magnitude if bits else weight
        planes = len(planes_of(signs, self.product))
        rows, row_masks = self._classes(0)
        columns, column_masks = self._classes(1)
        base = np.zeros((1, 1, len(weight)), np.int64)
        if bits:  # sum = products - (2 / planes) * differing + (what the padding, taken for -1, is off by)
            base = weight[0].size + signs.sum((1, 2, 3)) - border_sums(signs, row_masks, column_masks)
        else:
            rows, columns, column_masks = np.zeros_like(rows), np.zeros_like(columns), column_masks[:1]
        if self.product == INTEGERS:  # the padding is zero as stored, so that it weighs nothing
            base = base - self.x.zero * weight.sum((1, 2, 3)).astype(np.int64)
        found: dict[str, Any] = {
            "row_class": constants.ints(rows), "column_class": constants.ints(columns),
            "column_classes": len(column_masks), "factor": -magnitude * (2 // planes) if bits else 1,
        }  # fmt: skip
        alone = finish.least == -math.inf and finish.most == math.inf and finish.kind == BITS
        if operation.limits is not None:
            found["limits"] = constants.ints(self._padded(self._limits(base, magnitude, planes), NEVER[self.product]))
        elif self.product == FLOATS and alone and operation.scale is None:
            bias = np.zeros(len(weight)) if operation.bias is None else operation.bias[self.part]
            found["limits"] = constants.ints(
                self._padded((-bias.astype(np.float32)).view(np.int32)[None, None], NEVER[FLOATS])
            )
        else:
            found |= self._scales(base * magnitude, constants)
        return found

    def _limits(self, base: Array, magnitude: int, planes: int) -> Array:
        assert self.operation.limits is not None
        limits = self.operation.limits[self.part].astype(np.int64)
        if self.product == FLOATS:
            return np.broadcast_to(limits, (1, 1, len(limits))).astype(np.float32).view(np.int32)
        if self.product == INTEGERS:
            return (limits - base).clip(-(2**31), 2**31 - 1)
        # A sum of weights of some magnitude is at least its limit where one of signs is at least its share of it.
        return ((base - -(-limits // magnitude)) // (2 // planes)).clip(-1, 2**31 - 1)

    def _scales(self, base: Array, constants: "_Constants") -> dict[str, int]:
        operation = self.operation
        unit = np.full(len(self.weight), self.x.scale if self.product == INTEGERS else 1, np.float32)
        if operation.scale is not None:
            own = np.broadcast_to(operation.scale, self.operation.weight.shape[0])[self.part]  # type: ignore[union-attr]
            unit = own * unit
        bias = np.zeros(len(self.weight), np.float32)
        if operation.bias is not None:
            if operation.bias.dtype == np.int32 and self.product != FLOATS:
                base = base + operation.bias[self.part]
            elif operation.bias.dtype == np.int32:
                bias = operation.bias[self.part].astype(np.float32) * unit
            else:
                bias = operation.bias[self.part]
        return {
            "base": constants.ints(self._padded(base)), "unit": constants.floats(unit), "bias": constants.floats(bias),
        }  # fmt: skip

    def _padded(self, values: Array, fill: int = 0) -> Array:
        """(row classes, column classes, outputs) -> whole vectors of outputs."""
        lanes = vectors_of(self.product, len(self.weight)) * LANES
        return np.pad(values, ((0, 0), (0, 0), (0, lanes - values.shape[-1])), constant_values=fill)

    def _classes(self, axis: int) -> tuple[Array, Array]:
        size = (self.x.rows, self.x.columns)[axis]
        return border_classes(
            self.sides[axis], self.stride[axis], self.dilation[axis], self.weight.shape[1 + axis], self.pads[axis], size
        )


class _Constants:
    """The numbers of all steps, by kind."""

    def __init__(self) -> None:
        self._parts: dict[str, list[Array]] = {"bytes": [], "ints": [], "offsets": [], "floats": []}
        self._sizes = dict.fromkeys(self._parts, 0)

    def _keep(self, name: str, values: Array) -> int:
        at = self._sizes[name]
        self._parts[name].append(values.ravel())
        self._sizes[name] += values.size
        return at

    def bytes(self, values: Array) -> int:
        """Keep bytes, from a cache line on, and return where they begin."""
        room = np.zeros(-(-values.size // LINE) * LINE, np.uint8)
        room[: values.size] = values
        return self._keep("bytes", room)

    def ints(self, values: Array) -> int:
        """Keep int32 and return where they begin."""
        return self._keep("ints", values.astype(np.int32))

    def offsets(self, values: list[int]) -> int:
        """Keep int64 and return where they begin."""
        return self._keep("offsets", np.array(values, np.int64))

    def floats(self, values: Array) -> int:
        """Keep float32 and return where they begin."""
        return self._keep("floats", values.astype(np.float32))

    def arrays(self) -> tuple[Array, ...]:
        """Return all that was kept: uint8, int32, int64 and float32."""
        kinds = {"bytes": np.uint8, "ints": np.int32, "offsets": np.int64, "floats": np.float32}
        return tuple(np.concatenate([np.zeros(0, kind), *self._parts[name]]) for name, kind in kinds.items())


def _ends(finish: Finish) -> dict[str, float]:
    """Return the bounds of what follows, as fields of STEP."""
    found = {"least": finish.least, "most": finish.most}
    if finish.kind == INTEGERS:
        low, high = finish.quantize["range"]
        found |= {"low": low - finish.quantize["zero_point"], "top_level": high - finish.quantize["zero_point"]}
    return found


def _merged(weight: Array, groups: int, product: int, out: int) -> tuple[Array, int]:
    """Join groups that are too small, or of no whole bytes: the weights between them are 0.

    weight: (outputs, rows, columns, inputs of a group).
    """
    outs, high, wide, inner = weight.shape
    each = outs // groups
    for together in (size for size in range(1, groups + 1) if groups % size == 0):
        whole = not (together * inner % 8 and product == BITS) and not (
            together * each % (LANES * FEWEST) and out == BITS
        )
        if together == groups or (whole and together * each >= LANES):
            break
    if together == 1:
        return weight, groups
    joined = np.zeros((outs, high, wide, inner * together), weight.dtype)
    for channel in range(outs):
        at = channel // each % together * inner
        joined[channel, ..., at : at + inner] = weight[channel]
    return joined, groups // together
