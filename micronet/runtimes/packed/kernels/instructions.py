"""The table of a packed network's steps: what each of them does, and to which maps.

Maps lie in one block of memory, image by image, row by row, pixel by pixel, channels side by side: signs as bits in
words of 32, whole numbers as uint8 or float32, with room around them for the padding of the convolutions that
read them. Only the images themselves lie channel by channel. ``plan`` makes the tables.
"""

import numpy as np

CONV, MAP, POOL, MEAN, SHUFFLE, ALIGN, PLANES = range(7)  # kinds of step
COPY, ADD, MULTIPLY, SCALE = range(4)  # what a MAP step does
SIDES = ("x", "y", "out")  # the maps that a step reads and writes

_MAPS = [
    (f"{side}{part}", np.int64) for side in SIDES for part in ("", "_buffer", "_size", "_row", "_pixel", "_kind")
]  # fmt: skip
STEP = np.dtype(
    [
        ("step", np.int64), ("operation", np.int64), ("wait", np.int64), *_MAPS,
        # the output's, and for pools and shuffles the input's
        ("rows", np.int64), ("columns", np.int64), ("channels", np.int64), ("high", np.int64), ("wide", np.int64),
        ("stride_y", np.int64), ("stride_x", np.int64), ("kernel_y", np.int64), ("kernel_x", np.int64),
        ("top", np.int64), ("left", np.int64), ("groups", np.int64), ("count_pads", np.int64),
        ("at_hand", np.int64),  # values at once
        # a convolution's, places in the constants; of a row's or column's class, the bytes to its limits or base
        ("product", np.int64), ("vectors", np.int64), ("length", np.int64), ("unwidened", np.int64),
        ("runs", np.int64), ("run_count", np.int64), ("weights", np.int64), ("limits", np.int64), ("base", np.int64),
        ("row_class", np.int64), ("column_class", np.int64), ("factor", np.int64),
        ("unit", np.int64), ("bias", np.int64),
        # whole numbers: zero is where 0 lies; low and high, the ends of what a value may be before it is stored
        ("x_zero", np.int64), ("y_zero", np.int64), ("out_zero", np.int64),
        ("x_scale", np.float32), ("y_scale", np.float32), ("out_scale", np.float32),
        ("least", np.float32), ("most", np.float32), ("low", np.float32), ("top_level", np.float32),
    ],
    align=True,
)  # fmt: skip
