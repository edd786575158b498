"""Where a resize reads: for each output row or column, two input ones and the share of the second."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Positions = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]  # first, second, share of the second
COORDINATES = ("half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners")
ROUNDINGS = ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil")


def positions(attributes: dict[str, Any], axis: int, size: int) -> Positions:
    """Return where to read along an axis (0: rows, 1: columns) of ``size`` places.

    Places are computed in float32, as in ONNX Runtime.

    attributes: ``size`` of the output, ``factors`` (output over input, as the model gives it), ``coordinates`` (one of
    COORDINATES), and ``nearest`` (one of ROUNDINGS), without which places are interpolated; as in ONNX's Resize.
    """
    length, factor = attributes["size"][axis], np.float32(attributes["factors"][axis])
    at, half = np.arange(length, dtype=np.float32), np.float32(0.5)
    kind = attributes["coordinates"]
    if kind == "align_corners":
        at = at * np.float32(size - 1) / np.float32(length - 1) if length > 1 else at * 0
    elif kind == "asymmetric":
        at = at / factor
    else:
        at = (at + half) / factor - half if length > 1 or kind == "half_pixel" else at * 0
    rounding = attributes.get("nearest")
    if rounding:
        rounded = {
            "floor": np.floor(at), "ceil": np.ceil(at), "round_prefer_floor": np.ceil(at - half),
            "round_prefer_ceil": np.floor(at + half),
        }[rounding]  # fmt: skip
        first = rounded.clip(0, size - 1).astype(np.int64)
        return first, first, np.zeros(length, np.float32)
    at = at.clip(0, size - 1)
    first = np.floor(at).astype(np.int64)
    return first, np.minimum(first + 1, size - 1), (at - first).astype(np.float32)
