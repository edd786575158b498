"""The instruction table that the interpreter executes: what each instruction does, and on which feature maps.

Feature maps lie in one block of memory (the workspace) as NHWC: signs as bits in 32-bit words, integers as uint8,
floats as float32, with room around each map for the padding of the convolutions that read it. Only the input images
are NCHW. ``execution_plan`` builds the table.
"""

import numpy as np

CONV, ELEMENTWISE, MAX_POOL, AVERAGE_POOL, SHUFFLE, ALIGN, TO_NHWC = range(7)  # opcodes
COPY, ADD, MULTIPLY, SCALE = range(4)  # functions of ELEMENTWISE

# Per map, in bytes: of pixel (0, 0) in its image; of its buffer, per image in the batch; an image, a row, a pixel.
_MAPS = [
    (f"{side}{part}", np.int64)
    for side in ("x", "y", "out")
    for part in ("", "_buffer", "_image", "_row", "_pixel", "_dtype")
]
INSTRUCTION = np.dtype(
    [
        ("opcode", np.int64), ("function", np.int64), ("barrier", np.int64), *_MAPS,
        # of the output; x_rows and x_columns: of a pool's input
        ("rows", np.int64), ("columns", np.int64), ("channels", np.int64), ("x_rows", np.int64),
        ("x_columns", np.int64), ("stride_y", np.int64), ("stride_x", np.int64), ("kernel_y", np.int64),
        ("kernel_x", np.int64), ("pad_top", np.int64), ("pad_left", np.int64), ("groups", np.int64),
        ("count_pads", np.int64), ("scratch", np.int64),  # values held at once
        # of a convolution: positions in the constants; row_class and column_class hold byte offsets into limits or base
        ("arithmetic", np.int64), ("vectors", np.int64), ("run_bytes", np.int64), ("widen_after", np.int64),
        ("runs", np.int64), ("run_count", np.int64), ("weights", np.int64), ("limits", np.int64), ("base", np.int64),
        ("row_class", np.int64), ("column_class", np.int64), ("factor", np.int64),
        ("scale", np.int64), ("bias", np.int64),
        # quantization: value = (integer - zero_point) * scale; clip before scaling, levels after it
        ("x_zero_point", np.int64), ("y_zero_point", np.int64), ("out_zero_point", np.int64),
        ("x_scale", np.float32), ("y_scale", np.float32), ("out_scale", np.float32),
        ("clip_low", np.float32), ("clip_high", np.float32), ("level_low", np.float32), ("level_high", np.float32),
    ],
    align=True,
)  # fmt: skip
