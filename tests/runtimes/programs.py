"""Random packed programs, and the law that compiled kernels compute what numpy computes. Imports no torch."""

import random

import numpy as np

from micronet.packed.program import Operation, Program
from micronet.runtimes.packed.compiled_backend import CompiledNetwork
from micronet.runtimes.packed.numpy_backend import run


def quantize(source, draw, scale=0.05):
    """Quantize to eight bits or fewer, unsigned or signed."""
    low, high = draw.choice([(0, 255), (-128, 127), (-127, 127), (0, 15), (-8, 7)])
    return Operation(
        "quantize", [source], {"scale": scale, "zero_point": draw.randint(low, high), "range": [low, high]}
    )


def random_weight(draw, rng, kind, shape):
    """Float, integer, binary or ternary weights."""
    if kind == "float":
        return rng.normal(size=shape).astype(np.float32)
    if kind == "integers":
        most = draw.choice([1, 2, 5, 8, 9, 128, 255])  # minus a zero point, weights have 9 bits
        return rng.integers(-most, most, shape, endpoint=True).astype(np.int32) * (
            draw.choice([1, 3]) if most < 9 else 1
        )
    levels = np.array([-1, 1] if kind == "binary" else [-1, 0, 1]) * draw.choice([1, 64])
    return rng.choice(levels, shape).astype(np.int32)


def random_layer(seed):
    """A program of one convolution with what precedes and follows it, and images."""
    draw, rng = random.Random(seed), np.random.default_rng(seed)
    groups = draw.choice([1, 1, 1, 2, 3, 8])
    inner = draw.choice([1, 2, 8, 16, 24, 32, 40]) if groups > 1 else draw.choice([1, 3, 7, 8, 24, 32, 96, 300, 352])
    each = draw.choice([1, 5, 8, 16, 24, 40]) if groups > 1 else draw.choice([1, 10, 16, 40, 48, 70, 96, 130])
    size, side = draw.choice([1, 3, 5, 7]), draw.choice([9, 10, 13])
    reads, kind = draw.choice(
        [("sign", "binary"), ("sign", "ternary"), ("quantize", "integers"), ("quantize", "binary"), (None, "float"),
         ("quantize", "float"), ("sign", "integers")]
    )  # fmt: skip
    weight = random_weight(draw, rng, kind, (groups * each, inner, size, size))
    stride = [draw.choice([1, 2]), draw.choice([1, 2])]
    attributes = {"stride": stride, "pads": [draw.choice([0, 1, 2]) for _ in range(4)],
                  "dilation": [draw.choice([1, 2]) if size < 7 else 1] * 2, "group": groups}  # fmt: skip
    operations = []
    if reads:
        operations.append(Operation("sign", [0]) if reads == "sign" else quantize(0, draw))
    before, outputs = len(operations), len(weight)
    if kind != "float" and draw.random() < 0.4:
        spread = 300 if reads == "quantize" else 12
        limits = rng.integers(-spread, spread, outputs).astype(np.int32)
        operations.append(Operation("threshold", [before], attributes, weight, limits=limits))
    else:
        scale = None if kind == "float" else rng.uniform(1e-3, 0.1, draw.choice([1, outputs])).astype(np.float32)
        bias = rng.normal(size=outputs).astype(np.float32) if draw.random() < 0.7 else None
        if bias is not None and kind != "float" and reads == "quantize" and draw.random() < 0.5:
            bias = rng.integers(-999, 999, outputs).astype(np.int32)
        operations.append(Operation("conv", [before], attributes, weight, scale, bias))
        for follower in draw.choice([[], ["relu"], ["clip"], ["quantize"], ["relu", "quantize"], ["sign"]]):
            count = len(operations)
            operations.append(
                quantize(count, draw, 0.3) if follower == "quantize"
                else Operation(follower, [count], {"bounds": [-0.5, 6]} if follower == "clip" else {})
            )  # fmt: skip
    if operations[-1].kind in ("threshold", "sign"):  # readers of bits must not see any beyond the channels
        weight = rng.choice([-1, 1], (20, outputs, 1, 1)).astype(np.int32)
        operations.append(Operation("conv", [len(operations)], {}, weight, np.ones(1, np.float32)))
    columns = side + draw.choice([0, 3, 25])  # rows of more than 32 pixels are processed in stripes
    images = rng.normal(size=(draw.choice([1, 2, 3]), inner * groups, side, columns))
    return Program(operations, list(images.shape[1:]), {}), images.astype(np.float32)


def other_operations(seed):
    """Programs of everything but convolutions, and images."""
    draw = random.Random(seed)
    start = draw.choice([[], [Operation("sign", [0])], [quantize(0, draw)]])
    n = len(start)
    channels = draw.choice([8, 12, 40, 64])
    pads = [1, 0, 1, 1]
    bodies = [
        [Operation("max_pool", [n], {"kernel": [3, 2], "stride": [2, 1], "pads": pads})],
        [Operation("average_pool", [n], {"kernel": [3, 2], "stride": [2, 1], "pads": pads})],
        [Operation("average_pool", [n], {"kernel": [2, 2], "pads": [0, 1, 1, 0], "count_pads": True})],
        [Operation("mean", [n], {"keep": True}), Operation("mul", [n, n + 1])],
        [Operation("mean", [n])],
        [Operation("shuffle", [n], {"groups": 4})],
        [Operation("relu", [n]), Operation("add", [n, n + 1]), Operation("clip", [n + 2], {"bounds": [-1, 1]})],
        [Operation("sign", [n]), Operation("concat", [n, n + 1])],
        [Operation("max_pool", [n], {"kernel": [1, 1]}), Operation("concat", [n + 1, n, n + 1])],
        [Operation("affine", [n], scale=np.linspace(-1, 1, channels, dtype=np.float32),
                   bias=np.ones(channels, np.float32)), Operation("sign", [n + 1])],
        [Operation("relu", [n]), Operation("flatten", [n + 1])],
        [Operation("flatten", [n]), Operation("linear", [n + 1], {}, np.random.default_rng(seed).normal(
            size=(5, channels * 6 * 7)).astype(np.float32))],
        [Operation("add", [n, n]), Operation("relu", [n + 1]), quantize(n + 2, draw), Operation("add", [n + 3, n])],
    ]  # fmt: skip
    images = np.random.default_rng(seed).normal(size=(2, channels, 6, 7)).astype(np.float32)
    return [Program(start + body, [channels, 6, 7], {}) for body in bodies], images


def check_program(program, images, threads=1):
    """Compare the compiled kernels with numpy: bit for bit if everything is integer."""
    expected = run(program, images)
    found = CompiledNetwork(program, threads)(images)
    assert found.shape == expected.shape
    first = program.operations[0].kind
    if program.operations[-2:][0].kind in ("threshold", "sign") and first != "conv":
        np.testing.assert_array_equal(found, expected)
    else:
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * max(1e-6, np.abs(expected).max()))


def check_layer(seed):
    """Compare a random layer with numpy; quantized float sums may round to the next level."""
    program, images = random_layer(seed)
    last = program.operations[-1]
    if last.kind != "quantize":
        check_program(program, images)
        return
    found, expected = CompiledNetwork(program, 1)(images), run(program, images)
    layer = next(operation for operation in program.operations if operation.kind == "conv")
    exact = layer.weight.dtype.kind == "i"
    assert np.abs(found - expected).max() <= (1e-6 if exact else 1.01 * last.attributes["scale"])


def check_other_operations(seed):
    """Compare every other operation with numpy."""
    programs, images = other_operations(seed)
    for program in programs:
        check_program(program, images)
