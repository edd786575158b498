"""Lowering: from a program's operations to calls of kernels in C."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from micronet.packed.program import Operation, Program
from micronet.runtimes.c.lower_layers import lower_layer
from micronet.runtimes.c.lower_moves import MOVES, lower_concat
from micronet.runtimes.c.maps import BYTES, INTS, Map
from micronet.runtimes.c.state import Fused, State
from micronet.runtimes.packed.numpy_operators import ELEMENTWISE, Value


@dataclass
class Output:
    """One output of the network: its map, its shape without the batch, and if its scores are integers."""

    map: Map
    shape: tuple[int, ...]
    integer: bool


def lower(program: Program) -> tuple[State, list[Output]]:
    """Lower a whole program. Raises MicronetError if C does not support an operation or a shape."""
    state = State(program)
    _lower_image(state)
    for index, operation in enumerate(program.operations):
        state.index = index
        if index not in state.fused:
            _lower(state, operation, [state.values[source] for source in operation.inputs])
    found = []
    for value in program.results:
        made = state.values[value]
        shape = (made.channels * made.pixels,) if made.vector else (made.channels, made.rows, made.columns)
        found.append(Output(made, shape, made.type in (BYTES, INTS)))
    integer = all(each.integer for each in found) and len({each.map.scale for each in found}) == 1
    place = 0
    for each in found:
        each.integer = integer
        state.call("scores_levels" if integer else "scores_floats", [each.map], [], f"scores + {place}")
        place += int(np.prod(each.shape))
    return state, found


def _lower_image(state: State) -> None:
    channels, rows, columns = state.program.shape
    fused = state.fuse(0)
    out = state.output(fused, rows, columns, channels)
    steps = state.steps(fused)
    arguments = f"{steps.get('steps', 'NULL')}, {steps.get('step_count', 0)}"
    if takes_pixels(state.program):
        scale, shift = normalization(state.program.about["data"])
        state.call("image_bytes", [], [out], f"{state.table(scale)}, {state.table(shift)}, {arguments}")
    else:
        state.call("image_floats", [], [out], arguments)


def takes_pixels(program: Program) -> bool:
    """Return True if the network's file says how its 8-bit images are normalized, which the code then does."""
    data = program.about.get("data") or {}
    for name in ("mean", "std"):
        values = data.get(name)
        if not isinstance(values, list) or len(values) != program.shape[0]:
            return False
        if not all(isinstance(each, (int, float)) and np.isfinite(each) for each in values):
            return False
    return bool(min(data["std"]) > 0)


def normalization(data: dict[str, Any]) -> tuple[Any, Any]:
    """Return the float32 factors and summands that normalize pixels, computed as ``data.batches.Normalize`` does."""
    means, stds = np.array(data["mean"], np.float32), np.array(data["std"], np.float32)
    return np.float32(1) / (np.float32(255) * stds), -means / stds


def _lower(state: State, operation: Operation, inputs: list[Map]) -> None:
    kind, x = operation.kind, inputs[0]
    if kind in ("conv", "linear", "threshold"):
        lower_layer(state, operation, x)
    elif kind in MOVES:
        MOVES[kind](state, operation, x)
    elif kind == "concat":
        lower_concat(state, operation, inputs)
    else:
        _lower_elementwise(state, operation, inputs)


def _lower_elementwise(state: State, operation: Operation, inputs: list[Map]) -> None:
    kind, more = operation.kind, dict[str, Any]()
    if kind in ("add", "mul", "affine"):
        fused = state.fuse(state.index + 1)
        if kind == "affine" or inputs[0].flat != inputs[1].flat or inputs[0].pixels != inputs[1].pixels:
            inputs = [state.materialize(each) for each in inputs]
        more = _scales(state, operation, inputs[0]) if kind == "affine" else {}
    else:
        fused = state.fuse(state.index + 1, operation)
    if kind in ("add", "mul") and inputs[1].pixels > inputs[0].pixels:
        inputs = inputs[::-1]
    x, *others = inputs
    for y in others:
        sizes = (y.rows, y.columns) in ((x.rows, x.columns), (1, 1))
        if not sizes or y.channels != x.channels or (y.vector != x.vector and x.pixels > 1):
            raise state.refuse(f"{kind} of feature maps of different shapes")
    out = state.output(fused, x.rows, x.columns, x.channels, x)
    if kind not in ("add", "mul", "affine") and x.type == out.type == BYTES:
        _look_up(state, operation, fused, x, out)
        return
    pointwise = state.struct("pointwise", multiply=int(kind == "mul"), **more, **state.steps(fused))
    state.call("elementwise", [x, *others], [out], pointwise, in_place=True)


def _scales(state: State, operation: Operation, x: Map) -> dict[str, Any]:
    assert operation.scale is not None and operation.bias is not None
    scale, bias = operation.scale.astype(np.float32), operation.bias.astype(np.float32)
    if {scale.size, bias.size} - {1, x.channels}:
        raise state.mismatch()
    size = max(scale.size, bias.size)
    scale, bias = np.broadcast_to(scale, size), np.broadcast_to(bias, size)
    return {"scale": state.table(scale), "bias": state.table(bias), "scale_stride": int(size > 1)}


def _look_up(state: State, operation: Operation, fused: Fused, x: Map, out: Map) -> None:
    """Lower functions of 8-bit integers into a table, which numpy fills in."""
    value = Value(np.arange(256), x.scale, x.zero)
    index = state.index
    while True:
        value = ELEMENTWISE[state.program.operations[index].kind](state.program.operations[index], value)
        if index + 1 == fused.value:
            break
        (index,) = state.readers[index + 1]
    levels = value.data.astype(np.int32) + (out.zero - value.zero_point)
    state.call("look_up", [x], [out], state.table(levels.astype(np.uint8)), in_place=True)
