"""Opening any file that holds a network, as a predictor that also knows what it is."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from micronet import registry
from micronet.artifact.kinds import check_kind
from micronet.data.dataset import DataSpec
from micronet.errors import MicronetError
from micronet.evaluation.accuracy import Scores
from micronet.runtimes.config import RuntimeOptions


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


def open_network(path: Path, options: RuntimeOptions) -> Network:
    """Open a file by its suffix. Raises MicronetError for a file that is missing, damaged or of another kind."""
    check_kind(path, *registry.PREDICTORS)
    if path.suffix not in registry.PREDICTORS:
        raise MicronetError(f"{path}: expected {' or '.join(registry.PREDICTORS)}, got {path.suffix or 'no suffix'}")
    runtime = registry.load_object(registry.PREDICTORS[path.suffix])
    network: Network = runtime(path, options)
    return network
