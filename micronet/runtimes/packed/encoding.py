"""Encoding kernel calls as rows of the instruction table, once every feature map has an address."""

from typing import Any

from micronet.runtimes.packed.constants import ConstantPool
from micronet.runtimes.packed.kernel_call import KernelCall
from micronet.runtimes.packed.kernels.cpu import BITS, ITEM_BYTES
from micronet.runtimes.packed.kernels.instructions import CONV, ELEMENTWISE, INSTRUCTION, SCALE, TO_NHWC
from micronet.runtimes.packed.weight_layout import (
    ITEM_VALUES,
    pack_weights,
    plane_count,
    split_runs,
    vector_count,
    widen_interval,
)


def encode(call: KernelCall, constants: ConstantPool) -> tuple[Any, ...]:
    """Return a call as a row of the instruction table; its weights are added to the constants."""
    x, out, y = call.x, call.out, call.y
    fields: dict[str, Any] = dict.fromkeys(INSTRUCTION.names or (), 0)
    fields |= {
        "rows": out.rows, "columns": out.columns, "channels": x.channels, "stride_y": 1, "stride_x": 1, "limits": -1,
        "x_zero_point": x.zero_point, "x_scale": x.scale, "out_zero_point": out.zero_point, "out_scale": out.scale,
    } | call.fields  # fmt: skip
    for side, each in (("x", x), ("out", out), ("y", y)):
        if each is not None:
            fields |= {
                side: each.start([0, 0, 0, 0]), f"{side}_buffer": each.buffer, f"{side}_image": each.image_bytes,
                f"{side}_row": each.row_bytes, f"{side}_pixel": each.pixel_bytes, f"{side}_dtype": each.dtype,
            }  # fmt: skip
    fields["x"] = x.start(call.pads) + x.channel_offset(call.x_channel)
    fields["out"] += out.channel_offset(call.out_channel)
    if y is not None:
        fields |= {"y_zero_point": y.zero_point, "y_scale": y.scale}
        if (y.rows, y.columns) != (x.rows, x.columns):
            fields |= {"y_row": 0, "y_pixel": 0}  # broadcast one pixel
    if call.weight is not None:
        fields |= _weight_fields(call, fields["arithmetic"], constants)
    if fields["opcode"] == CONV and out.columns == 1:
        fields["stride_x"] = 1  # so that a block of pixels does not read beyond the map
    whole_rows = fields["opcode"] == ELEMENTWISE and fields["function"] != SCALE and out.channels == x.channels
    whole_rows = whole_rows and (x.channels % 32 == 0 or BITS not in (x.dtype, out.dtype, y and y.dtype))
    if whole_rows and (y is None or fields["y_row"]):
        fields |= {"channels": x.columns * x.channels, "columns": 1}  # the pixels of a row are contiguous
    fields["scratch"] = fields["channels"]
    if fields["opcode"] == TO_NHWC:
        fields |= {"x_row": x.channel_offset(x.columns), "scratch": x.columns * x.channels}
    return tuple(fields[name] for name in INSTRUCTION.names or ())


def _weight_fields(call: KernelCall, arithmetic: int, constants: ConstantPool) -> dict[str, int]:
    """Pack a convolution's weights; a row of the kernel is one run if its pixels are contiguous."""
    weight, x = call.weight, call.x
    assert weight is not None
    _, rows, columns, inputs = weight.shape
    (dy, dx), size = call.dilation, x.channel_offset(8) // 8 if x.dtype != BITS else 0
    contiguous = inputs % 32 == 0 and x.pixel_bytes * 8 == inputs if x.dtype == BITS else x.pixel_bytes == inputs * size
    contiguous = contiguous and dx == 1
    runs = rows if contiguous else rows * columns
    offsets = [
        row * dy * x.row_bytes + column * dx * x.pixel_bytes
        for row in range(rows)
        for column in range(1 if contiguous else columns)
    ]
    widen_after = widen_interval(weight, arithmetic)
    run_bytes = -(-(weight[0].size // runs) // ITEM_VALUES[arithmetic]) * ITEM_BYTES
    parts, length = split_runs(plane_count(weight, arithmetic) * offsets, run_bytes, widen_after)
    return {
        "weights": constants.bytes(pack_weights(weight, arithmetic, runs)), "runs": constants.offsets(parts),
        "run_count": len(parts), "run_bytes": length, "widen_after": widen_after,
        "vectors": vector_count(arithmetic, len(weight)),
    }  # fmt: skip
