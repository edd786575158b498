"""Rewriting a program under construction: gates, signs and quantizers.

Elementwise operations commute with operations that only move values, and monotonic ones with maxima. A quantizer or a
sign before them makes them move integers or bits; before a concatenation, its parts become integers.

Signs need no floats. A convolution of integers followed by a sign becomes sums and thresholds, which replace scales,
biases and batch norms: with y = s * sum + b, y >= 0 is sum >= -b / s; where s is negative, the filter is negated first.
"""

from dataclasses import replace

import numpy as np

from micronet.packed.activations import ACTIVATIONS
from micronet.packed.builder import ProgramBuilder
from micronet.packed.program import Operation

MONOTONIC = ("sign", "quantize", "relu", "clip")
MOVES = ("shuffle", "depth_to_space", "flatten", "unflatten")
GATES = {"sigmoid": "silu", "hard_sigmoid": "hard_swish"}  # f -> x * f(x)


def fuse_gates(builder: ProgramBuilder) -> None:
    """Replace x * f(x) by one operation where the product is the only reader of f(x)."""
    operations = builder.operations
    for name, (operation, inputs) in list(operations.items()):
        for gate, x in (inputs, inputs[::-1]) if operation.kind == "mul" else ():
            found, sources = operations.get(gate, (None, []))
            if found and found.kind in GATES and sources == [x] and builder.readers(gate) == [name]:
                operations[name] = (
                    Operation(GATES[found.kind], [], found.attributes, name=operation.name, line=operation.line),
                    [x],
                )
                del operations[gate]
                break


def move_forward(builder: ProgramBuilder) -> None:
    """Move elementwise operations before the moves, maxima and concatenations whose only reader they are."""
    operations = builder.operations
    waiting = [name for name, (each, _) in operations.items() if each.kind in (*MONOTONIC, *ACTIVATIONS)]
    while waiting:
        name = waiting.pop(0)
        own, (source,) = operations[name]
        before, origins = operations.get(source, (None, []))
        if before is None or builder.readers(source) != [name] or not _commutes(own, before):
            continue
        if before.kind == "concat":
            parts = {f"{name}/{index}": origin for index, origin in enumerate(origins)}
            made = {
                part: (replace(own), [origin])
                for part, origin in parts.items()
                if not _same(operations.get(origin), own)
            }
            operations[name] = before, [part if part in made else origin for part, origin in parts.items()]
        else:
            made = {source: (own, origins)}  # the two change places, and their outputs' names with them
            operations[name] = before, [source]
        items = [(key, value) for key, value in operations.items() if key != source]
        place = [key for key, _ in items].index(name)
        operations.clear()
        operations.update([*items[:place], *made.items(), *items[place:]])
        waiting += made


def _same(known: tuple[Operation, list[str]] | None, quantizer: Operation) -> bool:
    return known is not None and (known[0].kind, known[0].attributes) == (quantizer.kind, quantizer.attributes)


def _commutes(own: Operation, before: Operation) -> bool:
    if before.kind == "resize":
        return "nearest" in before.attributes
    if before.kind == "concat":
        return own.kind == "quantize"
    return before.kind in MOVES or (before.kind == "max_pool" and own.kind in MONOTONIC)


def fuse_thresholds(builder: ProgramBuilder) -> None:
    """Fuse each convolution of integers with a sign that is its only reader."""
    operations = builder.operations
    for name, (operation, (source, *_)) in list(operations.items()):
        if operation.kind != "sign" or source not in operations or builder.readers(source) != [name]:
            continue
        conv, origin = operations[source]
        if conv.kind != "conv" or conv.weight is None or conv.weight.dtype.kind != "i":
            continue
        scale = _integer_scale(builder, origin[0])
        if conv.scale is not None and scale is not None:
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
    return _integer_scale(builder, inputs[0]) if operation.kind in ("max_pool", "shuffle") else None


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
    return Operation("threshold", [], conv.attributes, weight, limits=limits, name=conv.name, line=conv.line)
