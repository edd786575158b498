"""Lowering of pools, resizes, and operations that only move values."""

from collections.abc import Callable

import numpy as np

from micronet.packed.pooling import windows_of
from micronet.packed.program import Operation
from micronet.packed.resize import positions
from micronet.runtimes.packed.kernels import instructions
from micronet.runtimes.packed.kernels.cpu import BITS, FLOAT32
from micronet.runtimes.packed.lowering_state import LoweringState
from micronet.runtimes.packed.memory import Array, FeatureMap, UnsupportedProgram

EXACT_SUM = 2**24 // 256  # integers of 8 bits whose float32 sum is exact


def lower_flatten(state: LoweringState, index: int, operation: Operation, x: FeatureMap) -> None:
    """Mark a map as flat; only linear layers, elementwise operations and the end of the program can read it."""
    value = next(value for value, known in state.values.items() if known is x)
    if len(state.readers[value]) > 1:
        raise UnsupportedProgram("a feature map that is used both flattened and unflattened")
    x.flat = True
    state.values[index + 1] = x


def lower_unflatten(state: LoweringState, index: int, operation: Operation, x: FeatureMap) -> None:
    """Lower the change from (N, C) to (N, C, 1, 1) to a copy, because the two maps have other readers."""
    made = state.values[index + 1] = state.map_like(x, flat=False)
    _move(state, x, made, np.zeros(1, np.int64), np.zeros(1, np.int64))


def lower_shuffle(state: LoweringState, index: int, operation: Operation, x: FeatureMap) -> None:
    """Lower a channel shuffle."""
    groups = operation.attributes["groups"]
    if x.channels % groups:
        raise UnsupportedProgram("a channel shuffle with uneven groups")
    made = state.values[index + 1] = state.map_like(x)
    state.call(instructions.SHUFFLE, x, made, groups=groups)


def lower_concat(state: LoweringState, index: int, parts: list[FeatureMap]) -> None:
    """Lower a concatenation along the channels."""
    alike = len({(part.dtype, part.scale, part.zero_point) for part in parts}) == 1
    if not alike or (parts[0].dtype == BITS and any(part.channels % 8 for part in parts)):
        parts = [state.floats(part) for part in parts]
    first = parts[0]
    if len({(part.rows, part.columns, part.flat) for part in parts}) > 1:
        raise UnsupportedProgram("concatenation of feature maps of different shapes")
    made = state.values[index + 1] = state.map_like(first, channels=sum(part.channels for part in parts))
    channel = 0
    for part in parts:
        _move(state, part, made, np.arange(part.rows), np.arange(part.columns))
        state.calls[-1].out_channel = channel
        channel += part.channels


def _move(
    state: LoweringState, x: FeatureMap, made: FeatureMap, rows: Array, columns: Array, channels: int = 0,
    offsets: tuple[Array | int, Array | int] = (0, 0),
) -> None:  # fmt: skip
    """Add a call that copies pixels (row, column) of a map, from the channels that offsets of both add up to.

    channels: how many; 0: all.
    """
    whole_bits = x.dtype == BITS and made.channels == x.channels
    size = x.pixel_bytes if whole_bits else x.channel_offset(channels or x.channels)
    state.call(instructions.MOVE, x, made, move_bytes=size, stride_y=0, rows=len(rows), columns=len(columns))
    unit = x.channel_offset(1)
    state.calls[-1].places = lambda known: [
        *(rows * known.row_bytes + unit * np.asarray(offsets[0])).tolist(),
        *(columns * known.pixel_bytes + unit * np.asarray(offsets[1])).tolist(),
    ]


def lower_pool(state: LoweringState, index: int, operation: Operation, x: FeatureMap) -> None:
    """Lower a max pool, an average pool, or an average over height and width."""
    (ky, kx), (sy, sx), (top, left, bottom, right), rows, columns, count_pads = windows_of(operation, x.rows, x.columns)
    is_max = operation.kind == "max_pool"
    x = x if is_max or (x.dtype != BITS and ky * kx <= EXACT_SUM) else state.floats(x)
    flat = x.flat or (operation.kind == "mean" and not operation.attributes.get("keep"))
    kept = {} if is_max else {"dtype": FLOAT32, "scale": 1.0, "zero_point": 0}
    made = state.values[index + 1] = state.map_like(x, rows=rows, columns=columns, flat=flat, **kept)
    state.call(
        instructions.MAX_POOL if is_max else instructions.AVERAGE_POOL, x, made, kernel_y=ky, kernel_x=kx,
        stride_y=sy, stride_x=sx, pad_top=top, pad_left=left, pad_bottom=bottom, pad_right=right, x_rows=x.rows,
        x_columns=x.columns, count_pads=count_pads,
    )  # fmt: skip


def lower_resize(state: LoweringState, index: int, operation: Operation, x: FeatureMap) -> None:
    """Lower a resize: a move if it takes the nearest pixels, else an interpolation."""
    attributes = operation.attributes
    rows, columns = (positions(attributes, axis, size) for axis, size in enumerate((x.rows, x.columns)))
    if "nearest" in attributes:
        made = state.values[index + 1] = state.map_like(x, rows=len(rows[0]), columns=len(columns[0]))
        _move(state, x, made, rows[0], columns[0])
        return
    x, epilogue = state.floats(x) if x.dtype == BITS else x, state.fuse(index)
    made = state.output(epilogue, len(rows[0]), len(columns[0]), x.channels)
    shares = state.constants.add("floats", np.concatenate([rows[2], columns[2]]))
    state.call(instructions.INTERPOLATE, x, made, stride_y=0, x_rows=x.rows, x_columns=x.columns, shares=shares,
               scratch=x.columns * x.channels, **epilogue.fields())  # fmt: skip
    state.calls[-1].places = lambda known: [
        *(np.concatenate(rows[:2]) * known.row_bytes).tolist(), *(np.concatenate(columns[:2]) * known.channels).tolist()
    ]  # fmt: skip


def lower_depth_to_space(state: LoweringState, index: int, operation: Operation, x: FeatureMap) -> None:
    """Lower the move of channels (block rows, block columns, C) to pixels of C channels."""
    (by, bx), (top, left, bottom, right) = operation.attributes["block"], operation.attributes.get("crop", [0] * 4)
    if x.channels % (by * bx):
        raise UnsupportedProgram("a block size that does not divide the number of channels")
    x, channels = state.floats(x) if x.dtype == BITS else x, x.channels // (by * bx)
    rows, columns = np.arange(top, x.rows * by - bottom), np.arange(left, x.columns * bx - right)
    made = state.values[index + 1] = state.map_like(x, rows=len(rows), columns=len(columns), channels=channels)
    _move(state, x, made, rows // by, columns // bx, channels, (rows % by * bx * channels, columns % bx * channels))


def lower_slice(state: LoweringState, index: int, operation: Operation, x: FeatureMap) -> None:
    """Lower a cut along channels, rows and columns."""
    attributes = operation.attributes
    (channel, row, column), (channels, rows, columns) = attributes["begin"], attributes["extent"]
    sy, sx = attributes.get("stride", [1, 1])
    last_row, last_column = row + (rows - 1) * sy, column + (columns - 1) * sx
    if channel + channels > x.channels or last_row >= x.rows or last_column >= x.columns:
        raise UnsupportedProgram("a slice that exceeds its feature map")
    x = state.floats(x) if x.dtype == BITS else x
    made = state.values[index + 1] = state.map_like(x, rows=rows, columns=columns, channels=channels)
    _move(state, x, made, row + sy * np.arange(rows), column + sx * np.arange(columns), channels, (0, channel))


def lower_pad(state: LoweringState, index: int, operation: Operation, x: FeatureMap) -> None:
    """Lower padding with zeros: a workspace begins with them, and the map is written inside."""
    top, left, bottom, right = operation.attributes["pads"]
    x = state.floats(x) if x.dtype == BITS else x
    made = state.map_like(x, rows=x.rows + top + bottom, columns=x.columns + left + right)
    state.values[index + 1] = made
    _move(state, x, made, np.arange(x.rows), np.arange(x.columns))
    state.calls[-1].out_pixel = top, left


MOVES: dict[str, Callable[[LoweringState, int, Operation, FeatureMap], None]] = {
    "flatten": lower_flatten, "unflatten": lower_unflatten, "shuffle": lower_shuffle, "resize": lower_resize,
    "depth_to_space": lower_depth_to_space,
    "slice": lower_slice, "pad": lower_pad, **dict.fromkeys(("max_pool", "average_pool", "mean"), lower_pool),
}  # fmt: skip
