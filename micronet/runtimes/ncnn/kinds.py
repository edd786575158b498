"""The kinds of ncnn layers that micronet writes: for each, its parameters, its tensors and the shape that it computes.

ncnn itself checks nothing, so a file that breaks one of these rules can crash the process.
"""

from math import prod

from micronet.runtimes.ncnn import shapes
from micronet.runtimes.ncnn.layer import Layer
from micronet.runtimes.ncnn.shapes import INT8_OUT, MAX_ELEMENTS, MAX_SIDE, Blob, Rule, numbered, require, with_floats

TAKE_INT8 = ("Convolution", "ConvolutionDepthWise", "InnerProduct", "Cast", "Split", "Flatten")


def infer(layer: Layer, inputs: list[Blob]) -> list[Blob]:
    """Return the blobs that a layer computes. Raises ValueError if it does not fit its inputs."""
    ids, rule = KINDS[layer.kind]
    if not set(layer.parameters) <= set(ids):
        raise ValueError(f"{layer.name}: {layer.kind} has an unknown parameter")
    expected = {"Input": 0, "Concat": max(1, len(inputs))}.get(layer.kind, 1)
    expected = 2 - layer.number(1) if layer.kind == "BinaryOp" else expected
    require(layer, len(inputs) == expected, f"{layer.kind} has {len(inputs)} inputs, not {expected}")
    fits = layer.kind in TAKE_INT8 or not any(blob.integer for blob in inputs)
    require(layer, fits, f"{layer.kind} reads int8")
    found = rule(layer, inputs)
    for blob in found:
        sides = len(blob.shape) == 1 or all(1 <= size <= MAX_SIDE for size in blob.shape)
        require(layer, sides and 1 <= prod(blob.shape) <= MAX_ELEMENTS, f"its output has the shape {blob.shape}")
    require(layer, len(found) == len(layer.outputs), f"{layer.kind} has {len(layer.outputs)} outputs")
    return found


def tensor_sizes(layer: Layer) -> list[int]:
    """Return the number of elements of each of a layer's tensors, in order."""
    if layer.kind == "Quantize":
        return [1]
    if layer.kind == "Scale":
        return [layer.number(0), layer.number(0)]
    if layer.kind == "InnerProduct":
        outputs = layer.number(0)
        scales = [outputs, 1] if layer.number(8) else []
        return [layer.number(2), *([outputs] if layer.number(1) else []), *scales]
    if layer.kind not in ("Convolution", "ConvolutionDepthWise"):
        return []
    outputs, int8 = layer.number(0), layer.number(8)
    scales = [layer.number(7) if layer.kind == "ConvolutionDepthWise" else outputs, 1] if int8 else []
    return [layer.number(6), *([outputs] if layer.number(5) else []), *scales, *([1] if int8 == INT8_OUT else [])]


def macs(layer: Layer, output: Blob) -> int:
    """Return the multiply-accumulates of a layer that computes ``output``."""
    if layer.kind == "InnerProduct":
        return layer.number(2)
    positions = prod(output.shape[1:])
    return layer.number(6) * positions if layer.kind.startswith("Convolution") else 0


_WINDOW = (0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13, 14, 15, 16, 31)
KINDS: dict[str, tuple[tuple[int, ...], Rule]] = {
    "Input": ((0, 1, 2), shapes.input_image),
    "Convolution": (_WINDOW, shapes.convolution),
    "ConvolutionDepthWise": ((*_WINDOW, 7), shapes.convolution),
    "InnerProduct": ((0, 1, 2, 8, 9, 10, 31), shapes.inner_product),
    "Quantize": ((), lambda layer, inputs: [Blob(inputs[0].shape, True)]),
    "Cast": ((0, 1), shapes.cast),
    "Pooling": ((0, 1, 2, 3, 4, 5, 6, 11, 12, 13, 14, 15), shapes.pooling),
    "BinaryOp": ((0, 1, 2), shapes.binary),
    "UnaryOp": ((0,), numbered(0, 27)),
    "Split": ((), lambda layer, inputs: inputs * len(layer.outputs)),
    "Flatten": ((), lambda layer, inputs: [Blob((prod(inputs[0].shape),), inputs[0].integer)]),
    "Concat": ((0,), shapes.concat),
    "Slice": ((0,), shapes.equal_slices),
    "Crop": (tuple(range(6)), shapes.crop),
    "Padding": (tuple(range(4)), shapes.padding),
    "Interp": ((0, 3, 4, 6), shapes.interp),
    "ShuffleChannel": ((0,), shapes.shuffle),
    "PixelShuffle": ((0, 1), shapes.pixel_shuffle),
    "Reshape": ((0, 1, 2), shapes.reshape),
    "Scale": ((0, 1), shapes.scale),
    "GELU": ((0,), numbered(0, 1)),
    **dict.fromkeys(("Sigmoid", "TanH", "Swish", "Mish"), ((), with_floats())),
    **dict.fromkeys(("ReLU", "ELU"), ((0,), with_floats(0))),
    **dict.fromkeys(("Clip", "HardSigmoid", "HardSwish"), ((0, 1), with_floats(0, 1))),
}  # fmt: skip
