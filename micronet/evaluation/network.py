"""The interfaces of anything that runs a network: ``Predictor``, and ``Network``, which also describes itself."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from micronet.data.dataset import DataSpec

Scores = Any  # an array (N, ...), or a list of them if the network has several outputs
# The input, an array (N, ...), or a tuple of them if a network takes several -> its outputs.
Predictor = Callable[[Any], Scores]


class Network(Protocol):
    """A predictor that describes itself."""

    runtime: str
    data: DataSpec | None
    params: int  # number of weights and biases
    stages: Sequence[str]  # those that the network went through

    def __call__(self, inputs: Any, /) -> Scores:
        """Return the outputs for a batch, such as the scores (N, K) float32 of images (N, C, H, W) float32."""

    def macs(self, *shapes: tuple[int, ...]) -> int | None:
        """Return the multiply-accumulates for one sample, or None if they cannot be counted.

        ``shapes``: of its inputs, without the batch; (C, H, W) for an image.
        """


def integer_layers(network: Network) -> dict[str, Any] | None:
    """Return what a network's runtime computes in integers; None if it is float or the runtime does not say."""
    found: dict[str, Any] | None = getattr(network, "integer_layers", lambda: None)()
    return found
