"""Latency of predictors, timed in turns."""

import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from micronet.evaluation.network import Predictor

WARM_UP_SECONDS = 0.3


MEASURE_SECONDS = 1.5  # a predictor and batch size


FEWEST_ROUNDS = 5


class Latency(NamedTuple):
    """Milliseconds a call, over single calls: median and 95th percentile."""

    p50_ms: float
    p95_ms: float


def latencies(predictors: Sequence[Predictor], inputs: Sequence[NDArray[np.float32]]) -> list[Latency]:
    """Time each predictor on its own input, in turns, so that a change of the machine's speed meets them all alike.

    Only the call is timed: no data loading, and warmed up first.
    """
    for predict, images in zip(predictors, inputs, strict=True):
        start = time.perf_counter()
        predict(images)
        while time.perf_counter() - start < WARM_UP_SECONDS:
            predict(images)
    samples: list[list[float]] = [[] for _ in predictors]
    spent = 0.0
    while spent < MEASURE_SECONDS * len(predictors) or len(samples[0]) < FEWEST_ROUNDS:
        for kept, predict, images in zip(samples, predictors, inputs, strict=True):
            start = time.perf_counter()
            predict(images)
            kept.append(time.perf_counter() - start)
            spent += kept[-1]
    return [Latency(*(1000 * np.percentile(kept, [50, 95])).tolist()) for kept in samples]
