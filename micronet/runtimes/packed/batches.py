"""Scoring many images, some at once, by one thread or several."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

BATCH = 8  # images at once at most: what lies between layers should stay in the caches


def start_pool(threads: int) -> ThreadPoolExecutor | None:
    """Return as many threads, or None for one: it needs no other."""
    return ThreadPoolExecutor(threads) if threads > 1 else None


def in_batches(
    score: Callable[[NDArray[np.float32]], NDArray[Any]], images: NDArray[np.float32], most: int, threads: int,
    pool: ThreadPoolExecutor | None,
) -> NDArray[Any]:  # fmt: skip
    """Score images (N, C, H, W), at most ``most`` at once and so that each thread has some."""
    if not len(images):
        return score(np.zeros((1, *images.shape[1:]), np.float32))[:0]
    size = min(most, -(-len(images) // threads))
    parts = [images[start : start + size] for start in range(0, len(images), size)]
    run = pool.map if pool else map
    return np.concatenate(list(run(score, parts)))
