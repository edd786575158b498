"""A packed network in memory: a list of operations and their numbers. ``file_format`` stores it."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Operation -> how many inputs it has; concat takes any number.
OPERATIONS = {
    "conv": 1, "linear": 1, "threshold": 1, "sign": 1, "relu": 1, "clip": 1, "quantize": 1, "max_pool": 1,
    "average_pool": 1, "mean": 1, "add": 2, "mul": 2, "concat": 2, "flatten": 1, "shuffle": 1, "affine": 1,
}  # fmt: skip


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


@dataclass
class Program:
    """A network."""

    operations: list[Operation]
    shape: list[int]  # (C, H, W) of its images
    about: dict[str, Any]  # its model, data and stages, as in an ONNX file's metadata

    @property
    def weights(self) -> int:
        """Return the number of weights and biases."""
        tensors = [t for op in self.operations for t in (op.weight, op.bias, op.limits) if t is not None]
        return sum(tensor.size for tensor in tensors)
