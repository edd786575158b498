"""Measure an engine's speed by batch size: latency with and without copies, and images per second."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from micronet.core.progress import Progress
from micronet.errors import MicronetError
from micronet.evaluation.latency import time_calls
from micronet.runtimes.tensorrt.engine import EnginePredictor

DEVICE_ROUNDS = 50


class Timing(NamedTuple):
    """Milliseconds per call, with one call at a time."""

    shape: list[int]  # of the input, (N, C, H, W)
    p50_ms: float  # this and the next two include both copies
    p95_ms: float
    p99_ms: float
    device_ms: float  # the median of the GPU's computing time
    images_per_second: float  # from p50_ms; overlapping calls would reach more


def sweep(
    network: EnginePredictor, images: NDArray[np.float32], batch_sizes: Sequence[int], progress: Progress
) -> list[Timing]:
    """Time an engine, after a warm-up, on batches of every size, filled by repeating images (M, C, H, W)."""
    timings = []
    for index, size in enumerate(batch_sizes):
        progress.step(f"timing batches of {size}", index, len(batch_sizes))
        batch = np.resize(images, (size, *images.shape[1:]))
        p50, p95, p99 = (1000 * np.percentile(time_calls([network], [batch]), [50, 95, 99])).tolist()
        device = float(np.median([network.device_ms(batch) for _ in range(DEVICE_ROUNDS)]))
        timings.append(Timing(list(batch.shape), p50, p95, p99, device, 1000 * size / p50))
    return timings


def parse_batch_sizes(text: str) -> list[int]:
    """Parse ``1,8,32``; raise MicronetError for anything but positive integers."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise MicronetError(f"--batch-sizes is {text!r}; expected positive integers, such as 1,8,32")
    return [int(part) for part in parts]
