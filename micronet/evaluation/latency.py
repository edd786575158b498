"""Measure the latency of predictors, interleaved."""

import math
import random
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from micronet.evaluation.network import Predictor

WARM_UP_SECONDS = 0.3
MEASURE_SECONDS = 1.5  # per predictor and batch size
MIN_ROUNDS = 5
LONG_CALL = 0.1  # seconds; if all calls are longer, they run without an untimed one before


class Latency(NamedTuple):
    """Milliseconds per call: the median and the 95th percentile."""

    p50_ms: float
    p95_ms: float


def latencies(
    predictors: Sequence[Predictor], inputs: Sequence[NDArray[np.float32]], *, one_thread: bool = False
) -> list[Latency]:
    """Time predictors, each on its own batch (N, C, H, W) float32, after a warm-up.

    They run in turns, so that a change in the machine's speed affects all of them alike. So that none pays for the
    caches that another has filled, each runs once untimed before every timed call, and the turns change at random.
    ``one_thread``: see ``time_call``.
    """
    calls = time_calls(predictors, inputs, one_thread=one_thread)
    return [Latency(*(1000 * np.percentile(own, [50, 95])).tolist()) for own in calls]


def time_call(predict: Predictor, given: Any, *, one_thread: bool = False) -> float:
    """Return the seconds of a call.

    ``one_thread``: whether it computes in one thread of this process. Then the CPU time is the call's own, and where
    that is shorter, other work has interrupted it: on a busy machine, every call that is longer than a time slice.
    """
    start, busy = time.perf_counter(), time.process_time()
    predict(given)
    busy, took = time.process_time() - busy, time.perf_counter() - start
    return min(took, busy) if one_thread and busy > 0 else took


def time_calls(
    predictors: Sequence[Predictor],
    inputs: Sequence[NDArray[np.float32]],
    seconds: float | None = None,
    *,
    one_thread: bool = False,
) -> list[list[float]]:
    """Return the seconds of every timed call of each predictor, in ``seconds`` at most; see ``latencies``."""
    seconds = MEASURE_SECONDS if seconds is None else min(seconds, MEASURE_SECONDS)
    shortest = math.inf
    for predict, images in zip(predictors, inputs, strict=True):
        start, calls = time.perf_counter(), 0
        while not calls or time.perf_counter() - start < WARM_UP_SECONDS:
            predict(images)
            calls += 1
        shortest = min(shortest, (time.perf_counter() - start) / calls)
    samples: list[list[float]] = [[] for _ in predictors]
    runs, turns, spent = list(zip(samples, predictors, inputs, strict=True)), random.Random(0), 0.0
    while spent < seconds * len(predictors) or len(samples[0]) < MIN_ROUNDS:
        for own, predict, images in turns.sample(runs, len(runs)):
            start = time.perf_counter()
            if shortest < LONG_CALL:  # for all or none: they are compared
                predict(images)
            own.append(time_call(predict, images, one_thread=one_thread))
            spent += time.perf_counter() - start
    return samples
