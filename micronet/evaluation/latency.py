"""Measure the latency of predictors, interleaved."""

import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from micronet.evaluation.network import Predictor

WARM_UP_SECONDS = 0.3
MEASURE_SECONDS = 1.5  # per predictor and batch size
MIN_ROUNDS = 5


class Latency(NamedTuple):
    """Milliseconds per call: the median and the 95th percentile."""

    p50_ms: float
    p95_ms: float


def latencies(predictors: Sequence[Predictor], inputs: Sequence[NDArray[np.float32]]) -> list[Latency]:
    """Time predictors, each on its own batch (N, C, H, W) float32, after a warm-up.

    They run in turns, so that a change in the machine's speed affects all of them alike.
    """
    return [Latency(*(1000 * np.percentile(own, [50, 95])).tolist()) for own in time_calls(predictors, inputs)]


def time_calls(
    predictors: Sequence[Predictor], inputs: Sequence[NDArray[np.float32]], seconds: float | None = None
) -> list[list[float]]:
    """Return the seconds of every timed call of each predictor, in ``seconds`` at most; see ``latencies``."""
    seconds = MEASURE_SECONDS if seconds is None else min(seconds, MEASURE_SECONDS)
    for predict, images in zip(predictors, inputs, strict=True):
        start = time.perf_counter()
        predict(images)
        while time.perf_counter() - start < WARM_UP_SECONDS:
            predict(images)
    samples: list[list[float]] = [[] for _ in predictors]
    spent = 0.0
    while spent < seconds * len(predictors) or len(samples[0]) < MIN_ROUNDS:
        for own, predict, images in zip(samples, predictors, inputs, strict=True):
            start = time.perf_counter()
            predict(images)
            own.append(time.perf_counter() - start)
            spent += own[-1]
    return samples
