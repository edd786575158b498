"""The interfaces of anything that runs a network: ``Predictor``, and ``Network``, which also describes itself."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from micronet.data.dataset import DataSpec

Scores = NDArray[np.float32]
Predictor = Callable[[NDArray[np.float32]], Scores]


class Network(Protocol):
    """A predictor that describes itself."""

    runtime: str
    data: DataSpec | None
    params: int  # number of weights and biases
    stages: Sequence[str]  # those that the network went through

    def __call__(self, images: Any) -> Scores:
        """Return the scores (N, K) float32 of images (N, C, H, W) float32."""

    def macs(self, image_shape: tuple[int, int, int]) -> int | None:
        """Return the multiply-accumulates for one image (C, H, W), or None if they cannot be counted."""
