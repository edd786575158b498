"""The instruction table that the interpreter executes: what each instruction does, and on which feature maps.

Feature maps lie in one block of memory (the workspace) as NHWC: signs as bits in 32-bit words, integers as uint8,
floats as float32, with room around each map for the padding of the convolutions that read it. Only the input images
are NCHW. ``compiled_backend.ExecutionPlan`` builds the table.
"""

import numpy as np

CONV, ELEMENTWISE, MAX_POOL, AVERAGE_POOL, SHUFFLE, ALIGN, TO_NHWC, MOVE, INTERPOLATE, TABLE = range(10)  # opcodes
COPY, ADD, MULTIPLY, SCALE = range(4)  # functions of ELEMENTWISE

_INT64_FIELDS = [
    "opcode", "function", "barrier",
    # per map, in bytes: of pixel (0, 0) in its image; of its buffer, per image in the batch; an image, a row, a pixel
    *(side + part for side in ("x", "y", "out") for part in ("", "_buffer", "_image", "_row", "_pixel", "_dtype")),
    # of the output; x_rows and x_columns: of a pool's input; scratch: values held at once
    "rows", "columns", "channels", "x_rows", "x_columns", "stride_y", "stride_x", "kernel_y", "kernel_x", "pad_top",
    "pad_left", "pad_bottom", "pad_right", "groups", "count_pads", "scratch",
    # activation: a value of activation.NUMBERS. Positions in the constants: of a table; of the places (rows, then
    # columns) that MOVE and INTERPOLATE read, and of the shares. move_bytes: those that MOVE takes from each pixel
    "activation", "table", "places", "shares", "move_bytes",
    # of a convolution: positions in the constants; row_class and column_class hold byte offsets into limits or base
    "arithmetic", "depthwise", "vectors", "run_bytes", "widen_after", "runs", "run_count", "weights", "limits", "base",
    "row_class", "column_class", "factor", "scale", "bias",
    # quantization: value = (integer - zero_point) * scale; clip before scaling, levels after it
    "x_zero_point", "y_zero_point", "out_zero_point",
]  # fmt: skip
_FLOAT32_FIELDS = [
    "x_scale",
    "y_scale",
    "out_scale",
    "clip_low",
    "clip_high",
    "level_low",
    "level_high",
    "alpha",
    "beta",
]
INSTRUCTION = np.dtype(
    [*((name, np.int64) for name in _INT64_FIELDS), *((name, np.float32) for name in _FLOAT32_FIELDS)], align=True
)
