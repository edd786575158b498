"""Scoring many images in batches, on one thread or several."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_BATCH = 8  # images per batch, so that feature maps stay in the processor's caches


def start_pool(threads: int) -> ThreadPoolExecutor | None:
    """Return a pool of threads, or None if ``threads`` is 1."""
    return ThreadPoolExecutor(threads) if threads > 1 else None


def score_in_batches(
    score: Callable[[NDArray[np.float32]], NDArray[Any]], images: NDArray[np.float32], max_batch: int, threads: int,
    pool: ThreadPoolExecutor | None,
) -> NDArray[Any]:  # fmt: skip
    """Score images (N, C, H, W) in batches of at most ``max_batch``, small enough that every thread gets some."""
    if not len(images):
        return score(np.zeros((1, *images.shape[1:]), np.float32))[:0]
    size = min(max_batch, -(-len(images) // threads))
    batches = [images[start : start + size] for start in range(0, len(images), size)]
    run = pool.map if pool else map
    return np.concatenate(list(run(score, batches)))
