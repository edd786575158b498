"""A packed network in memory: a list of operations and their numbers. ``file_format`` stores it."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from micronet.packed.activations import ACTIVATIONS


class Kind(NamedTuple):
    """What every operation of a kind has: how many inputs, and attributes that it cannot do without."""

    inputs: int = 1
    required: tuple[str, ...] = ()


# concat takes any number of inputs.
OPERATIONS: dict[str, Kind] = {
    **dict.fromkeys(("conv", "linear", "threshold", "sign", "relu", "mean", "flatten", "unflatten", "affine"), Kind()),
    **dict.fromkeys(("add", "mul", "concat"), Kind(2)),
    **dict.fromkeys(("max_pool", "average_pool"), Kind(1, ("kernel",))),
    **dict.fromkeys(ACTIVATIONS, Kind()),
    **dict.fromkeys(("hard_sigmoid", "hard_swish"), Kind(1, ("alpha", "beta"))),
    **dict.fromkeys(("leaky_relu", "elu"), Kind(1, ("alpha",))),
    "clip": Kind(1, ("bounds",)),
    "quantize": Kind(1, ("scale", "zero_point", "range")),
    "shuffle": Kind(1, ("groups",)),
    "resize": Kind(1, ("size", "factors", "coordinates")),
    "depth_to_space": Kind(1, ("block",)),  # channels: (block rows, block columns, C), then crop (as pads)
    "slice": Kind(1, ("begin", "extent")),  # of channels, rows and columns; stride: of rows and columns
    "pad": Kind(1, ("pads",)),  # with zeros
}

RESULT = -1  # as the reader of a value: the network returns it


@dataclass
class Operation:
    """One operation of a program."""

    kind: str  # a key of OPERATIONS
    inputs: list[int]  # numbers of earlier values: 0 is the images, and operation i computes value i + 1
    attributes: dict[str, Any] = field(default_factory=dict)  # JSON values
    weight: NDArray[Any] | None = None  # int32 or float32, (outputs, inputs / groups, ...)
    scale: NDArray[np.float32] | None = None  # of the weight, one per tensor or output
    bias: NDArray[Any] | None = None  # float32, or int32 in units of input scale times weight scale
    limits: NDArray[np.int32] | None = None  # per output, the smallest sum that gives +1
    name: str = ""  # of the layer that it was made of; packed files do not store it
    line: str = ""  # of the user's code, as " at FILE:LINE (code)", for messages


@dataclass
class Program:
    """A network."""

    operations: list[Operation]
    shape: list[int]  # (C, H, W) of its images
    about: dict[str, Any]  # its model, data and stages, as in an ONNX file's metadata
    outputs: list[int] | None = None  # numbers of the values that it returns; None: the last one

    @property
    def results(self) -> list[int]:
        """Return the numbers of the values that the network returns, in order."""
        return [len(self.operations)] if self.outputs is None else self.outputs

    def readers(self) -> list[list[int]]:
        """Return, for each value, the indices of the operations that read it, and RESULT if the network returns it."""
        found: list[list[int]] = [[] for _ in range(len(self.operations) + 1)]
        for index, operation in enumerate(self.operations):
            for source in operation.inputs:
                found[source].append(index)
        for value in self.results:
            found[value].append(RESULT)
        return found

    @property
    def weights(self) -> int:
        """Return the number of weights and biases."""
        tensors = [t for op in self.operations for t in (op.weight, op.bias, op.limits) if t is not None]
        return sum(tensor.size for tensor in tensors)
