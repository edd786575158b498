"""Signs without floats: integer thresholds replace scales, biases and batch norms.

A sign is moved before pools and shuffles, with which it commutes. A convolution of integers followed by a sign becomes
sums and thresholds: with y = s * sum + b, y >= 0 is sum >= -b / s; where s is negative, the filter is negated first.
"""

import numpy as np

from micronet.packed.builder import ProgramBuilder
from micronet.packed.program import Operation

COMMUTING = ("max_pool", "shuffle")  # sign(f(x)) = f(sign(x)), because sign is monotonic


def move_signs(builder: ProgramBuilder) -> None:
    """Move signs before the pools and shuffles whose only reader they are."""
    operations = builder.operations
    for name in [name for name, (operation, _) in operations.items() if operation.kind == "sign"]:
        while True:
            sign, (source,) = operations[name]
            before = operations.get(source)
            if before is None or before[0].kind not in COMMUTING or builder.reader_count(source) > 1:
                break
            commuting, (origin,) = before
            operations[source] = sign, [origin]  # the two operations change places, and their outputs' names with them
            operations[name] = commuting, [source]
            name = source


def fuse_thresholds(builder: ProgramBuilder, output: str) -> None:
    """Fuse each convolution of integers with a sign that is its only reader."""
    operations = builder.operations
    for name, (operation, inputs) in list(operations.items()):
        if operation.kind != "sign" or name not in operations:
            continue
        source = inputs[0]
        conv, origin = operations.get(source, (operation, []))
        scale = _integer_scale(builder, origin[0]) if origin else None
        if conv.kind != "conv" or scale is None or builder.reader_count(source) > 1 or source == output:
            continue
        if conv.weight is None or conv.weight.dtype.kind != "i" or conv.scale is None:
            continue
        operations[name] = threshold(conv, scale), origin
        del operations[source]


def _integer_scale(builder: ProgramBuilder, name: str) -> float | None:
    """Return the scale of an integer value, or None for a float one."""
    operation, inputs = builder.operations.get(name, (None, []))
    if operation is None:
        return None
    if operation.kind in ("sign", "threshold"):
        return 1.0
    if operation.kind == "quantize":
        return float(operation.attributes["scale"])
    return _integer_scale(builder, inputs[0]) if operation.kind in COMMUTING else None


def threshold(conv: Operation, input_scale: float) -> Operation:
    """Return a convolution of integers with this scale, and the sign after it, as one operation."""
    assert conv.weight is not None and conv.scale is not None
    outputs = len(conv.weight)
    scale = np.broadcast_to(conv.scale.astype(np.float64), outputs) * input_scale
    bias = np.zeros(outputs) if conv.bias is None else conv.bias.astype(np.float64)
    bias = bias * scale if conv.bias is not None and conv.bias.dtype == np.int32 else bias
    negated = scale < 0
    factor = max(1, int(np.gcd.reduce(np.abs(conv.weight), axis=None)))  # weights of few bits are multiples in int8
    weight, scale = conv.weight // factor, scale * factor
    weight[negated] *= -1
    unreachable = np.abs(weight).reshape(outputs, -1).sum(1).astype(np.float64) * 256 + 1  # for 8-bit inputs
    with np.errstate(divide="ignore", invalid="ignore"):
        least = np.ceil(-bias / np.abs(scale))
    least = np.where(scale == 0, np.where(bias >= 0, -np.inf, np.inf), least)
    limits = np.clip(least, -unreachable, unreachable).astype(np.int32)
    return Operation("threshold", [], conv.attributes, weight, limits=limits)
