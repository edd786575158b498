"""Lowering of pools, resizes, and operations that only move values."""

from collections.abc import Callable

import numpy as np

from micronet.packed.pooling import windows_of
from micronet.packed.program import Operation
from micronet.packed.resize import positions
from micronet.runtimes.c.maps import BITS, BYTES, FLOATS, Map
from micronet.runtimes.c.state import State, copy_of

LONGEST_SIDE = 1 << 16  # of a map whose rows and columns have numbers of 16 bits
AS_FLOATS = {"type": FLOATS, "scale": 1.0, "zero": 0, "low": 0, "high": 0}


def lower_flatten(state: State, operation: Operation, x: Map) -> None:
    """Lower a flatten: the values stay in place, and their readers know."""
    made = copy_of(x, flat=x.flat or x.pixels > 1, vector=True)
    made.buffer = x.buffer
    state.values[state.index + 1] = made


def lower_unflatten(state: State, operation: Operation, x: Map) -> None:
    """Lower the change from (N, C) to (N, C, 1, 1)."""
    x = state.materialize(x)
    if x.pixels > 1:
        raise state.mismatch()
    made = copy_of(x, vector=False)
    made.buffer = x.buffer
    state.values[state.index + 1] = made


def lower_shuffle(state: State, operation: Operation, x: Map) -> None:
    """Lower a channel shuffle."""
    x, groups = state.materialize(x), operation.attributes["groups"]
    if x.channels % groups:
        raise state.mismatch()
    _make(state, "shuffle", x, copy_of(x), str(groups))


def lower_concat(state: State, operation: Operation, parts: list[Map]) -> None:
    """Lower a concatenation along the channels; parts that are stored differently become floats."""
    parts = [state.materialize(part) for part in parts]
    if len({part.quantization for part in parts}) > 1:
        parts = [state.floats(part) for part in parts]
    if len({(part.rows, part.columns, part.vector) for part in parts}) > 1:
        raise state.mismatch()
    first = parts[0]
    low, high = min(part.low for part in parts), max(part.high for part in parts)
    made = copy_of(first, channels=sum(part.channels for part in parts), low=low, high=high)
    state.values[state.index + 1] = made
    channel = 0
    for part in parts:
        if first.type == BITS:
            state.call("concat_signs", [part], [made], str(channel))
        else:
            _copy(state, part, made, to_channel=channel)
        channel += part.channels


def _copy(state: State, x: Map, made: Map, **places: int) -> None:
    sizes = {"rows": x.rows, "columns": x.columns, "channels": x.channels, "stride_rows": 1, "stride_columns": 1}
    part = state.struct("part", **(sizes | places), bytes=1 if x.type == BYTES else 4)
    state.call("copy_part", [x], [made], part)


def _make(state: State, kernel: str, x: Map, made: Map, arguments: str = "") -> None:
    if made.rows < 1 or made.columns < 1 or made.channels < 1:
        raise state.mismatch()
    state.values[state.index + 1] = made
    state.call(kernel, [x], [made], arguments)


def lower_pool(state: State, operation: Operation, x: Map) -> None:
    """Lower a max pool, an average pool, or an average over height and width."""
    x = state.materialize(x)
    (ky, kx), (sy, sx), (top, left, bottom, right), rows, columns, count_pads = windows_of(operation, x.rows, x.columns)
    last_row, last_column = (rows - 1) * sy - top, (columns - 1) * sx - left
    if last_row >= x.rows or last_column >= x.columns or top >= ky or left >= kx:
        raise state.refuse("a window that lies outside the map")
    pool = state.struct(
        "pool", kernel_rows=ky, kernel_columns=kx, stride_rows=sy, stride_columns=sx, pad_top=top, pad_left=left,
        pad_bottom=bottom, pad_right=right, count_pads=int(count_pads),
    )  # fmt: skip
    vector = x.vector or (operation.kind == "mean" and not operation.attributes.get("keep"))
    if operation.kind == "max_pool":
        _make(state, "max_pool", x, copy_of(x, rows=rows, columns=columns), pool)
    else:
        _make(state, "average_pool", x, copy_of(x, rows=rows, columns=columns, vector=vector, **AS_FLOATS), pool)


def lower_resize(state: State, operation: Operation, x: Map) -> None:
    """Lower a resize: of the nearest pixels, or an interpolation with what follows it."""
    x, attributes = state.materialize(x), operation.attributes
    if max(x.rows, x.columns) > LONGEST_SIDE:
        raise state.refuse(f"a resize of a map with more than {LONGEST_SIDE:,} rows or columns")
    rows, columns = (positions(attributes, axis, size) for axis, size in enumerate((x.rows, x.columns)))
    if "nearest" in attributes:
        places = state.table(np.concatenate([rows[0], columns[0]]).astype(np.uint16))
        _make(state, "nearest", x, copy_of(x, rows=len(rows[0]), columns=len(columns[0])), places)
        return
    fused = state.fuse(state.index + 1)
    out = state.output(fused, len(rows[0]), len(columns[0]), x.channels)
    places = state.table(np.concatenate([*rows[:2], *columns[:2]]).astype(np.uint16))
    shares = state.table(np.concatenate([rows[2], columns[2]]).astype(np.float32))
    state.call("interpolate", [x], [out], state.struct("resize", places=places, shares=shares, **state.steps(fused)))


def lower_depth_to_space(state: State, operation: Operation, x: Map) -> None:
    """Lower the move of channels (block rows, block columns, C) to pixels of C channels."""
    x = state.bytes_of(state.materialize(x))
    (by, bx), (top, left, bottom, right) = operation.attributes["block"], operation.attributes.get("crop", [0] * 4)
    if x.channels % (by * bx):
        raise state.mismatch()
    rows, columns = x.rows * by - top - bottom, x.columns * bx - left - right
    blocks = state.struct("blocks", block_rows=by, block_columns=bx, crop_top=top, crop_left=left)
    _make(state, "depth_to_space", x, copy_of(x, rows=rows, columns=columns, channels=x.channels // (by * bx)), blocks)


def lower_slice(state: State, operation: Operation, x: Map) -> None:
    """Lower a cut along channels, rows and columns."""
    x, attributes = state.bytes_of(state.materialize(x)), operation.attributes
    (channel, row, column), (channels, rows, columns) = attributes["begin"], attributes["extent"]
    sy, sx = attributes.get("stride", [1, 1])
    if channel + channels > x.channels or row + (rows - 1) * sy >= x.rows or column + (columns - 1) * sx >= x.columns:
        raise state.mismatch()
    made = state.values[state.index + 1] = copy_of(x, rows=rows, columns=columns, channels=channels)
    _copy(
        state, x, made, row=row, column=column, channel=channel, rows=rows, columns=columns, channels=channels,
        stride_rows=sy, stride_columns=sx,
    )  # fmt: skip


def lower_pad(state: State, operation: Operation, x: Map) -> None:
    """Lower padding with zeros: the map is filled with them, then written inside."""
    x = state.bytes_of(state.materialize(x))
    top, left, bottom, right = operation.attributes["pads"]
    made = copy_of(x, rows=x.rows + top + bottom, columns=x.columns + left + right)
    state.values[state.index + 1] = made
    state.call("fill_zeros", [], [made])
    _copy(state, x, made, to_row=top, to_column=left)


MOVES: dict[str, Callable[[State, Operation, Map], None]] = {
    "flatten": lower_flatten, "unflatten": lower_unflatten, "shuffle": lower_shuffle, "resize": lower_resize,
    "depth_to_space": lower_depth_to_space, "slice": lower_slice, "pad": lower_pad,
    **dict.fromkeys(("max_pool", "average_pool", "mean"), lower_pool),
}  # fmt: skip
