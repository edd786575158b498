"""What runs a network: a predictor, arrays in and arrays out, and one that also knows what it is."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from micronet.data.dataset import DataSpec

Scores = NDArray[np.float32]
Predictor = Callable[[NDArray[np.float32]], Scores]


class Network(Protocol):
    """A predictor with a name tag. ``params``: elements of weights and biases. ``stages``: what was done to it."""

    runtime: str
    data: DataSpec | None
    params: int
    stages: Sequence[str]

    def __call__(self, images: Any) -> Scores:
        """Score images: (N, C, H, W) float32 -> (N, K) float32."""

    def macs(self, image_shape: tuple[int, int, int]) -> int | None:
        """Return the multiply-accumulates for one image (C, H, W), or None where they cannot be counted."""
