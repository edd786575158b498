"""The fields of a step, once every map has its place in memory."""

from typing import Any

from micronet.runtimes.packed.conv_constants import Constants
from micronet.runtimes.packed.feature_maps import Step
from micronet.runtimes.packed.kernels.cpu import BITS, ITEM
from micronet.runtimes.packed.kernels.instructions import CONV, MAP, PLANES, SCALE, STEP
from micronet.runtimes.packed.weight_layout import HELD, cut, laid_out, most_bytes, planes_of, vectors_of


def placed(step: Step, constants: Constants) -> dict[str, Any]:
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
        numbers |= _weights(step, numbers["product"], constants)
    if numbers["step"] == CONV and out.columns == 1:
        numbers["stride_x"] = 1  # its block of pixels reads no further than the map does
    whole_rows = numbers["step"] == MAP and numbers["operation"] != SCALE and out.channels == x.channels
    whole_rows = whole_rows and (x.channels % 32 == 0 or BITS not in (x.kind, out.kind, y and y.kind))
    if whole_rows and (y is None or numbers["y_row"]):
        numbers |= {"channels": x.columns * x.channels, "columns": 1}  # a row's pixels lie side by side
    numbers["at_hand"] = numbers["channels"]
    if numbers["step"] == PLANES:
        numbers |= {"x_row": x.offset(x.columns), "at_hand": x.columns * x.channels}
    return numbers


def _weights(step: Step, product: int, constants: Constants) -> dict[str, int]:
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
    most = most_bytes(weight, product)
    parts, length = cut(planes * offsets, -(-(weight[0].size // runs) // HELD[product]) * ITEM, most)
    return {
        "weights": constants.bytes(laid_out(weight, product, runs)), "runs": constants.offsets(parts),
        "run_count": len(parts), "length": length, "unwidened": most, "vectors": vectors_of(product, len(weight)),
    }  # fmt: skip
