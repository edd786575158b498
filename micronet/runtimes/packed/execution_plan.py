"""From a packed program to the table of compiled steps that runs it."""

import math
from typing import Any

import numpy as np

from micronet.errors import MicronetError
from micronet.packed.program import Operation, Program
from micronet.runtimes.packed.conv_constants import Constants, Layer, as_reals, merged, product_of
from micronet.runtimes.packed.encoding import placed
from micronet.runtimes.packed.feature_maps import LINE, Finish, Map, Room, Step, Unfit, ends, zeros
from micronet.runtimes.packed.kernels.cpu import BITS, FLOATS, INTEGERS, PIXELS
from micronet.runtimes.packed.kernels.instructions import (
    ADD,
    ALIGN,
    CONV,
    COPY,
    MAP,
    MEAN,
    MULTIPLY,
    PLANES,
    POOL,
    SCALE,
    SHUFFLE,
    STEP,
)
from micronet.runtimes.packed.weight_layout import MOST_DIFFERING, most_differing

ALONE = {"relu", "clip"}
MOST_MEMORY = 1 << 34  # bytes of an image
FLAT = {"linear", "relu", "clip", "sign", "quantize", "add", "mul", "concat"}  # they read flat maps


class Plan:
    """A program's steps and constants.

    ``image``: bytes of all maps of one image. ``layers``: the steps before they had a place.

    Raises Unfit where the compiled steps do not have something.
    """

    def __init__(self, program: Program) -> None:
        channels, rows, columns = program.shape
        self._program = program
        self._readers: list[list[int]] = [[] for _ in range(len(program.operations) + 1)]
        for index, operation in enumerate(program.operations):
            for source in operation.inputs:
                self._readers[source].append(index)
        self._maps: dict[int, Map] = {}
        self._as_floats: dict[int, Map] = {}
        self._all: list[Map] = []
        self.layers: list[Step] = []
        self._done: set[int] = set()
        self._constants = Constants()
        self._images, finish = self._new(FLOATS, rows, columns, channels), self._finish(-1)
        pixels = self._finished(finish, rows, columns, channels)
        self._add(Step({"step": PLANES, **ends(finish)}, self._images, pixels))
        for index, operation in enumerate(program.operations):
            if index not in self._done:
                self._translate(index, operation)
        last = self._maps[len(program.operations)]
        self._scores = self._float(last)
        self.flat = last.flat
        self.image = 0
        for each in self._all:
            each.buffer, self.image = self.image, self.image + each.size
        fields = [placed(step, self._constants) for step in self.layers]
        self.steps = np.array([tuple(own[name] for name in STEP.names or ()) for own in fields], STEP)
        self.constants = self._constants.arrays()
        if self.image > MOST_MEMORY:
            raise MicronetError(f"one image's maps take {self.image >> 30} GiB; the file is damaged, or too large")
        self.largest = max(each.size for each in self._all)

    def room(self, images: int) -> Room:
        """Return room for the maps of so many images, their padding filled."""
        skips = [step.x.pixel * step.numbers.get("stride_x", 1) for step in self.layers]
        reach = PIXELS * max(skips) + LINE  # the last block of pixels reads beyond
        memory = zeros(-(-(self.image * images + reach) // LINE) * LINE, np.uint8)
        for each in self._all:
            if each.kind == INTEGERS and each.zero:
                memory[each.buffer * images : (each.buffer + each.size) * images] = each.zero
        return Room(memory, self._images.planes(memory, images), self._scores.pixels(memory, images))

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

    def _finish(self, index: int, least: float = -math.inf, most: float = math.inf) -> Finish:
        """Return what follows an operation's values that can be done while they are at hand."""
        found = Finish(index + 1, least, most)
        while len(self._readers[found.value]) == 1:
            (reader,) = self._readers[found.value]
            operation = self._program.operations[reader]
            if operation.kind in ALONE and not found.clips:
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
            if low < -128 or high > (255 if low >= 0 else 127):
                raise Unfit("activations of more than 8 bits")
            made.scale = finish.quantize["scale"]
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
            made = self._new(x.kind, x.rows, x.columns, x.channels, scale=x.scale, zero=x.zero, flat=x.flat)
            self._add(Step({"step": SHUFFLE, "groups": operation.attributes["groups"]}, x, made))
            self._maps[index + 1] = made
        elif operation.kind == "concat":
            self._concat(index, inputs)
        else:
            self._by_value(index, operation, inputs)

    def _flattened(self, x: Map) -> Map:
        """Return a map as its readers see it flat: only a linear layer and the program's end know how to."""
        value = next(value for value, known in self._maps.items() if known is x)
        if len(self._readers[value]) > 1:
            raise Unfit("a map that is read flat and as it is")
        x.flat = True
        return x

    def _by_value(self, index: int, operation: Operation, inputs: list[Map]) -> None:
        x, kind = inputs[0], operation.kind
        doing, constants = COPY, {}
        if kind in ("sign", "quantize"):
            finish = Finish(index + 1, kind=BITS if kind == "sign" else INTEGERS, quantize=operation.attributes)
        elif kind in ALONE:
            finish = self._finish(index, *operation.attributes.get("bounds", [0, math.inf]))
        else:
            finish = self._finish(index)
        if kind == "affine":
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
        self._add(Step({"step": MAP, "operation": doing, **ends(finish), **numbers}, x, out, y))

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
            self._add(Step({"step": MAP, "operation": COPY, **ends(Finish(0)), **bounds}, part, made, channel=at))
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
        made.flat = x.flat or (operation.kind == "mean" and not operation.attributes.get("keep"))
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
        if operation.kind == "threshold" and (x.kind == FLOATS or weight.dtype.kind != "i" or operation.limits is None):
            raise Unfit("a threshold of floats, or without limits")
        product = product_of(weight, x)
        x = self._float(x) if product == FLOATS else x
        weight = weight.transpose(0, 2, 3, 1)
        groups = at.get("group", 1)
        if weight.shape[3] * groups != x.channels or len(weight) % groups:
            raise Unfit("layers that do not fit one another")
        (sy, sx), (dy, dx) = at.get("stride", [1, 1]), at.get("dilation", [1, 1])
        pads = at.get("pads", [0, 0, 0, 0])
        rows = (x.rows + pads[0] + pads[2] - (weight.shape[1] - 1) * dy - 1) // sy + 1
        columns = (x.columns + pads[1] + pads[3] - (weight.shape[2] - 1) * dx - 1) // sx + 1
        finish = Finish(index + 1, kind=BITS) if operation.kind == "threshold" else self._finish(index)
        out = self._finished(finish, rows, columns, len(weight))
        out.flat = operation.kind == "linear" and x.flat
        apart, weight, groups = weight, *merged(weight, groups, product, out.kind)
        if product == BITS and most_differing(weight) > MOST_DIFFERING:  # with the zeros between the merged groups
            product, x = as_reals(apart), self._float(x)
            weight, groups = merged(apart, at.get("group", 1), product, out.kind)
        inner, each = weight.shape[3], len(weight) // groups
        own = x
        if product == BITS and groups > 1 and inner % 32:
            own = self._new(BITS, x.rows, x.columns, groups * -(-inner // 32) * 32)
            self._add(Step({"step": ALIGN, "groups": groups, "channels": x.channels}, x, own))
        own.pads = [max(sides) for sides in zip(own.pads, pads, strict=True)]
        numbers = {
            "step": CONV, "product": product, "stride_y": sy, "stride_x": sx, "channels": each, **ends(finish),
        }  # fmt: skip
        for group in range(groups):
            part = slice(group * each, (group + 1) * each)
            lone = Layer(operation, part, weight[part], product, x, pads, (sy, sx), (dy, dx), (rows, columns))
            step = Step(
                {**numbers, **lone.constants(self._constants, finish)}, own, out, pads=pads, dilation=[dy, dx],
                x_channel=group * own.channels // groups, channel=group * each, weight=lone.units()[0],
            )  # fmt: skip
            self._add(step, wait=group == groups - 1)

    def _add(self, step: Step, *, wait: bool = True) -> None:
        step.numbers["wait"] = wait
        self.layers.append(step)
