"""What a packed file's header may say: every attribute and number is checked before it is used."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from micronet.errors import FailedError
from micronet.packed.program import OPERATIONS, Operation
from micronet.packed.resize import COORDINATES, ROUNDINGS

MAX_KERNEL = 4096  # kernel size, stride, padding
MAX_SIDE = 1 << 16  # of an image, and channels


def _sizes(count: int, least: int, most: int = MAX_KERNEL) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, list)
        and len(value) == count
        and all(isinstance(item, int) and least <= item <= most for item in value)
    )


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _finite(value: Any) -> bool:
    return _number(value) and math.isfinite(value)


def _pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_number, value)) and value[0] <= value[1]


_ATTRIBUTES: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("kernel", "stride", "dilation", "block"), _sizes(2, 1)),
    **dict.fromkeys(("pads", "crop"), _sizes(4, 0)),
    "extra": _sizes(2, 0),
    "size": _sizes(2, 1, MAX_SIDE),
    "begin": _sizes(3, 0, MAX_SIDE),
    "extent": _sizes(3, 1, MAX_SIDE),
    "factors": lambda value: isinstance(value, list) and len(value) == 2 and all(_finite(v) and v > 0 for v in value),
    "coordinates": lambda value: value in COORDINATES,
    "nearest": lambda value: value in ROUNDINGS,
    **dict.fromkeys(("alpha", "beta"), lambda value: _finite(value)),
    **dict.fromkeys(("group", "groups"), lambda value: isinstance(value, int) and value > 0),
    "scale": lambda value: _number(value) and 0 < value < float("inf"),
    "zero_point": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "range": lambda value: _pair(value) and all(isinstance(end, int) and abs(end) < 2**31 for end in value),
    "bounds": _pair,
    **dict.fromkeys(("keep", "count_pads"), lambda value: value is True),
}


def check_operation(operation: Operation) -> None:
    """Raise ValueError or KeyError if an operation's attributes or numbers do not fit it, FailedError if one is NaN."""
    kind, attributes, weight = operation.kind, operation.attributes, operation.weight
    for name, value in attributes.items():
        if not _ATTRIBUTES[name](value):
            raise ValueError(f"the attribute {name} of an operation has the invalid value {value!r}")
    if kind == "quantize" and not attributes["range"][0] <= attributes["zero_point"] <= attributes["range"][1]:
        raise ValueError("a zero point is outside its range")
    if (operation.limits is not None) != (kind == "threshold") or (
        kind == "threshold" and weight is not None and weight.dtype.kind != "i"
    ):
        raise ValueError(f"its {kind} operation has invalid limits")
    if any(name not in attributes for name in OPERATIONS[kind].required):
        raise ValueError(f"its {kind} operation needs {', '.join(OPERATIONS[kind].required)}")
    if "pool" in kind and any(
        pad >= size for pad, size in zip(attributes.get("pads", []), 2 * attributes["kernel"], strict=False)
    ):
        raise ValueError("the padding of a pooling operation is not smaller than its kernel")
    if kind in ("conv", "threshold", "linear") and weight is None:
        raise ValueError(f"its {kind} operation has no weight")
    inputs = OPERATIONS[kind].inputs
    if len(operation.inputs) != inputs and kind != "concat":
        raise ValueError(f"its {kind} operation has {len(operation.inputs)} inputs, not {inputs}")
    for values in (weight, operation.scale, operation.bias):
        if values is not None and not np.isfinite(values).all():
            raise FailedError(f"its {kind} operation has NaN or infinity")


def check_about(about: dict[str, Any]) -> None:
    """Raise ValueError if what a file says about its network has the wrong types."""
    data, stages = about.get("data") or {}, about.get("stages") or []
    classes = data.get("classes") or [] if isinstance(data, dict) else None
    if not isinstance(stages, list) or not isinstance(classes, list) or not all(isinstance(c, str) for c in classes):
        raise ValueError("its metadata is invalid")


def positive(value: Any) -> int:
    """Return a size. Raises ValueError if it is not a positive integer."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"a size is {value!r}, not a positive integer")
    return value
