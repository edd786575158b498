"""A packed program as an ncnn network: which operations one layer computes, and where its integers are."""

from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np

from micronet import registry
from micronet.errors import MicronetError, count, either, listed
from micronet.packed.program import Operation, Program
from micronet.runtimes.ncnn.layer import Layer
from micronet.runtimes.ncnn.moves import MOVES, OTHERS
from micronet.runtimes.ncnn.values import (
    HALF,
    MAX_INT8,
    QUANTIZE,
    Grid,
    NetworkBuilder,
    Rounding,
    Step,
    Unsupported,
    Value,
    bounds_of,
)
from micronet.runtimes.ncnn.weighted import Activation, Fused, lower_layer

WEIGHTED = ("conv", "linear", "threshold")
FUSED = {"leaky_relu": (2, ("alpha",)), "sigmoid": (4, ()), "mish": (5, ()), "hard_swish": (6, ("alpha", "beta"))}
INPUT = "in0"
MOST = 5  # names in a message


@dataclass
class Lowered:
    """An ncnn network, and how it computes the program that it was made of."""

    layers: list[Layer]
    steps: list[Step]
    roundings: list[Rounding]
    outputs: list[str]  # the blobs


class _Lowering:
    def __init__(self, program: Program, fp16_storage: bool) -> None:
        self.operations = [replace(operation, name=operation.name or f"{operation.kind}_{number}")
                           for number, operation in enumerate(program.operations, 1)]  # fmt: skip
        self.fp16_storage, self.builder = fp16_storage, NetworkBuilder()
        self.values: dict[int, Value] = {}
        self.covered: set[int] = set()  # operations that are part of a layer
        # Of each value: the numbers of operations; 0 is the network's result.
        self.readers = [[reader + 1 for reader in each] for each in program.readers()]
        channels, height, width = program.shape
        image = self.builder.add("Input", INPUT, parameters={0: width, 1: height, 2: channels}, output=INPUT)
        self.values[0] = Value(image)

    def operation(self, number: int) -> Operation:
        return self.operations[number - 1]

    def lower(self, number: int) -> None:
        """Add an operation, together with those after it that the same layer computes."""
        operation = self.operation(number)
        if any(source not in self.values for source in operation.inputs):
            raise _Skipped
        values = [self.values[source] for source in operation.inputs]
        if operation.kind in WEIGHTED:
            self._lower_layer(number, operation, values[0])
        elif operation.kind == "quantize":
            self.values[number] = self._quantize(operation, values[0])
        else:
            lower = MOVES.get(operation.kind) or OTHERS.get(operation.kind)
            if lower is None:
                raise Unsupported(f"ncnn has no layer for {operation.kind}")
            self.values[number] = lower(self.builder, operation, values)

    def lower_in_float(self, number: int) -> None:
        """Compute a layer in float instead, so that those after it are checked too."""
        operation = self.operation(number)
        if operation.weight is not None and operation.limits is None:
            real = self.builder.real_of(self.values[operation.inputs[0]], operation.name)
            self._lower_layer(number, operation, Value(real))

    def _quantize(self, operation: Operation, x: Value) -> Value:
        grid, known = self._grid(operation), self._bounds(operation)
        raw, (low, high) = self.builder.real_of(x, operation.name), _own_bounds(operation)
        if grid.fits and (low > known[0] or high < known[1]):
            raw = self.builder.add("Clip", f"{operation.name}.clip", raw, parameters=bounds_of(low, high))
        return Value(raw, grid)

    def _lower_layer(self, number: int, operation: Operation, x: Value) -> None:
        rounded: Grid | None = None
        clips: list[Operation] = []  # what ncnn does before the rounding
        if operation.kind == "threshold":
            covered, activation, rounded = [number], Activation(3, (-0.5, 0.5)), HALF
        else:
            covered, activation = self._activation(number)
            after = self._only_reader(covered[-1])
            if after and (quantizer := self.operation(after)).kind == "quantize":
                grid, bounded = self._grid(quantizer), _bounded(activation, *_own_bounds(quantizer))
                if grid.fits and bounded is not None:
                    covered, rounded = [*covered, after], grid
                    activation = _without_bounds_of(grid, bounded)
                    clips = [Operation("clip", [], {"bounds": list(_own_bounds(quantizer))})]
        # What moves values reads them before their rounding, so then the layer cannot round them itself.
        moved = any(reader and self._moves(self.operation(reader)) for reader in self.readers[covered[-1]])
        operations = [self.operation(each) for each in covered[1:]]
        operations[-1:] = [*clips, *operations[-1:]]
        fused = Fused(operations, activation, None if moved else rounded)
        value = lower_layer(self.builder, operation, x, fused, self.fp16_storage)
        value.grid = rounded
        self.values[covered[-1]] = value
        self.covered.update(covered)

    @staticmethod
    def _moves(operation: Operation) -> bool:
        weight, groups = operation.weight, operation.attributes.get("group", 1)
        return operation.kind in MOVES or (weight is not None and groups > 1 and weight.shape[1] > 1)

    def _activation(self, number: int) -> tuple[list[int], Activation]:
        """Return the numbers of a layer and of the activation functions that it can compute, and those as one."""
        covered, low, high = [number], -np.inf, np.inf
        while (after := self._only_reader(covered[-1])) is not None:
            operation = self.operation(after)
            if operation.kind in FUSED and len(covered) == 1:
                kind, keys = FUSED[operation.kind]
                return [number, after], Activation(kind, tuple(float(operation.attributes[key]) for key in keys))
            if operation.kind not in ("relu", "clip"):
                break
            bottom, top = operation.attributes.get("bounds", (0.0, np.inf))
            low, high = float(np.clip(low, bottom, top)), float(np.clip(high, bottom, top))
            covered.append(after)
        return covered, _clip(low, high)

    def _only_reader(self, number: int) -> int | None:
        readers = self.readers[number]
        return readers[0] if len(readers) == 1 and readers[0] else None

    def _grid(self, quantizer: Operation) -> Grid:
        """Return the integers that a quantizer can compute, of which a clip before it may exclude some."""
        scale, zero_point = float(quantizer.attributes["scale"]), int(quantizer.attributes["zero_point"])
        low, high = (int(end) - zero_point for end in quantizer.attributes["range"])
        bottom, top = self._bounds(quantizer)
        low = low if np.isinf(bottom) else max(low, round(bottom / scale))
        return Grid(scale, scale, low, high if np.isinf(top) else min(high, round(top / scale)))

    def _bounds(self, quantizer: Operation) -> tuple[float, float]:
        """Return the bounds that the clips and ReLUs before a quantizer give its input."""
        low, high = -np.inf, np.inf
        source = quantizer.inputs[0]
        while source and (before := self.operation(source)).kind in ("relu", "clip"):
            bottom, top = before.attributes.get("bounds", (0.0, np.inf))
            low, high, source = max(low, bottom), min(high, top), before.inputs[0]
        return low, high


def _own_bounds(quantizer: Operation) -> tuple[float, float]:
    """Return the bounds that a quantizer gives its input, where they are narrower than those of int8."""
    scale, zero_point = float(quantizer.attributes["scale"]), int(quantizer.attributes["zero_point"])
    low, high = (int(end) - zero_point for end in quantizer.attributes["range"])
    return (low * scale if low > -MAX_INT8 else -np.inf), (high * scale if high < MAX_INT8 else np.inf)


def _bounded(activation: Activation, low: float, high: float) -> Activation | None:
    """Return an activation function with bounds on its result, or None if ncnn cannot compute both."""
    if np.isinf(low) and np.isinf(high):
        return activation
    if activation.kind not in (0, 1, 3):
        return None
    bottom, top = activation.values or ((0.0, np.inf) if activation.kind else (-np.inf, np.inf))
    return _clip(max(bottom, low), min(top, high))


class _Skipped(Exception):
    """An operation reads what could not be added."""


def _clip(low: float, high: float) -> Activation:
    if np.isinf(low) and np.isinf(high):
        return Activation()
    return Activation(1) if low == 0 and np.isinf(high) else Activation(3, (low, high))


def _without_bounds_of(grid: Grid, activation: Activation) -> Activation:
    """Return an activation function without the bounds that int8 has anyway."""
    if activation.kind != 3:
        return activation
    low, high = activation.values
    return _clip(-np.inf if low <= -MAX_INT8 * grid.unit else low, np.inf if high >= MAX_INT8 * grid.unit else high)


def lower(program: Program, fp16_storage: bool = False) -> Lowered:
    """Return a program as an ncnn network.

    Args:
        program: What ``pack`` makes of a network.
        fp16_storage: Store float weights as float16.

    Raises:
        MicronetError: ncnn cannot run it; names every operation that it cannot run and what to do.
    """
    lowering = _Lowering(program, fp16_storage)
    failed: dict[tuple[str, str], list[str]] = {}
    for number, operation in enumerate(lowering.operations, 1):
        if number in lowering.covered:
            continue
        try:
            lowering.lower(number)
        except Unsupported as error:
            failed.setdefault((str(error), error.cure), []).append(f"{operation.name}{operation.line}")
            with suppress(Unsupported):
                lowering.lower_in_float(number)
        except _Skipped:
            continue
    if failed:
        raise MicronetError(_explain(failed, program))
    builder = lowering.builder
    outputs = [builder.real_of(lowering.values[number], f"out{place}") for place, number in enumerate(program.results)]
    layers = builder.finish(outputs)
    names = [f"out{place}" for place in range(len(outputs))]
    return Lowered(layers, builder.steps, builder.roundings, names)


def _explain(failed: dict[tuple[str, str], list[str]], program: Program) -> str:
    lines = [f"  {why}: {listed(list(dict.fromkeys(names)), MOST)}." for (why, _), names in failed.items()]
    again = f"quantize the float network again with {QUANTIZE}{_code(program)}"
    cures = [again if cure == QUANTIZE else cure for (_, cure) in failed if cure]
    if len(cures) < len(failed):
        cures.append(
            f"choose --target {either(registry.RUN_PACKED)}, which support {'the others' if cures else 'them'}"
        )
    bad = sum(map(len, failed.values()))
    return (
        f"ncnn cannot run {bad} of the network's {count(len(program.operations), 'operation')}:\n"
        + "\n".join(lines)
        + f"\nNothing was written; {'; '.join(dict.fromkeys(cures))}"
    )


def _code(program: Program) -> str:
    """Return the option that names the user's code of a network, if it is that."""
    model = program.about.get("model")
    name = model.get("name") if isinstance(model, dict) else model
    own = isinstance(name, str) and ":" in name and not name.startswith("torchvision:")
    return f" --model {name}" if own else ""
