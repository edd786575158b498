"""How fast an engine is: latency from host to host and on the GPU alone, and images a second, by batch size."""

import time
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from micronet.core.progress import Progress
from micronet.errors import MicronetError
from micronet.evaluation.latency import FEWEST_ROUNDS, MEASURE_SECONDS, WARM_UP_SECONDS
from micronet.evaluation.network import Scores

DEVICE_ROUNDS = 50


class Timed(Protocol):
    """A predictor that also tells how long the GPU computes."""

    def __call__(self, images: NDArray[np.float32]) -> Scores:
        """Score images (N, C, H, W)."""

    def device_ms(self, images: NDArray[np.float32]) -> float:
        """Return the milliseconds the GPU computes on images."""


class Timing(NamedTuple):
    """Milliseconds a call for an input of ``shape`` (N, C, H, W), over single calls, one after the other.

    ``p50_ms`` to ``p99_ms``: both copies included. ``device_ms``: the median of the GPU's own time. Images a second
    follow from the median of whole calls; calls that overlap would reach more.
    """

    shape: list[int]
    p50_ms: float
    p95_ms: float
    p99_ms: float
    device_ms: float
    images_per_second: float


def sweep(network: Timed, images: NDArray[np.float32], batch_sizes: Sequence[int], progress: Progress) -> list[Timing]:
    """Time an engine on batches of every size, filled from images (M, C, H, W) over and over."""
    found = []
    for index, size in enumerate(batch_sizes):
        progress.step(f"timing batches of {size}", index, len(batch_sizes))
        found.append(measure(network, np.resize(images, (size, *images.shape[1:]))))
    return found


def measure(network: Timed, batch: NDArray[np.float32]) -> Timing:
    """Time one batch, warmed up first."""
    spent = 0.0
    while spent < WARM_UP_SECONDS:
        spent += _seconds(network, batch)
    samples: list[float] = []
    while sum(samples) < MEASURE_SECONDS or len(samples) < FEWEST_ROUNDS:
        samples.append(_seconds(network, batch))
    p50, p95, p99 = (1000 * np.percentile(samples, [50, 95, 99])).tolist()
    device = float(np.median([network.device_ms(batch) for _ in range(DEVICE_ROUNDS)]))
    return Timing(list(batch.shape), p50, p95, p99, device, 1000 * len(batch) / p50)


def parse_batch_sizes(text: str) -> list[int]:
    """Parse ``1,8,32``. Raises MicronetError for anything but whole numbers of 1 or more."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise MicronetError(f"--batch-sizes is {text!r}; allowed: whole numbers of 1 or more, such as 1,8,32")
    return [int(part) for part in parts]


def _seconds(network: Timed, batch: NDArray[np.float32]) -> float:
    start = time.perf_counter()
    network(batch)
    return time.perf_counter() - start
