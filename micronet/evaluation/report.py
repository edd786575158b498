"""Compare networks on the same data, every figure measured."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from micronet.core.machine import tune_allocator
from micronet.core.progress import Progress
from micronet.data.batches import eval_batches
from micronet.data.dataset import Dataset
from micronet.evaluation.accuracy import Evaluation, agreement, evaluate
from micronet.evaluation.latency import latencies
from micronet.evaluation.network import Network
from micronet.tasks.task import CLASSIFICATION

BATCHES = (1, 64)
LATENCIES = ("latency_ms", "latency_p95_ms", "latency_batch64_ms", "latency_batch64_p95_ms")


class Row(NamedTuple):
    """The figures of one network on ``images`` test images or other samples.

    ``accuracy``, ``drop`` and ``agreement`` are 0..1, the last two relative to the first row. Tasks other than
    classification have no accuracy and no agreement, and the drop is that of their main metric. ``metrics``: all of the
    task's. ``size_bytes``: the file. ``compression``: 1 - size / size of the first row. Latencies are medians per call
    with 1 or 64 samples, or None if they were not measured.
    """

    name: str
    runtime: str
    stages: list[str]
    images: int
    accuracy: float | None
    loss: float | None
    drop: float
    agreement: float | None
    macs: int | None
    params: int
    size_bytes: int
    compression: float
    latency_ms: float | None
    latency_p95_ms: float | None
    latency_batch64_ms: float | None
    latency_batch64_p95_ms: float | None
    metrics: dict[str, float]


class Candidate(NamedTuple):
    """A network to compare: its name, the network itself and the size of its file in bytes."""

    name: str
    network: Network
    size_bytes: int


def compare(
    candidates: Sequence[Candidate], data: Dataset, progress: Progress, *, timed: bool = True
) -> tuple[list[Row], list[Evaluation]]:
    """Measure networks on the test data, and their latencies if ``timed``; return figures and evaluations.

    The first is the reference of drops, agreement and compression.
    """
    tune_allocator()
    data, task = data.with_reference(candidates[0].network), data.task
    results = [measure_accuracy(each.network, data, f"evaluating {each.name}", progress) for each in candidates]
    sample = next(eval_batches(data.test, data.spec, batch_size=max(BATCHES)))[0]
    arrays = [x.contiguous().numpy() for x in (sample if isinstance(sample, tuple) else [sample])]
    timings: list[dict[str, float]] = [{} for _ in candidates]
    for index, size in enumerate(BATCHES if timed else ()):
        progress.step(f"timing batches of {size}", index, len(BATCHES))
        batch = tuple(np.resize(x, (size, *x.shape[1:])) for x in arrays)
        inputs: Any = batch if len(batch) > 1 else batch[0]
        measured = latencies([each.network for each in candidates], [inputs] * len(candidates))
        label = "" if size == 1 else f"batch{size}_"
        for timing, found in zip(timings, measured, strict=True):
            timing |= {f"latency_{label}ms": found.p50_ms, f"latency_{label}p95_ms": found.p95_ms}
    first, reference = candidates[0], results[0]
    base = task.quality(reference.metrics)
    rows = [
        Row(
            name=candidate.name,
            runtime=candidate.network.runtime,
            stages=list(candidate.network.stages),
            images=result.samples,
            accuracy=result.metrics["accuracy"] if task.name == CLASSIFICATION else None,
            loss=result.loss,
            drop=_drop(base, task.quality(result.metrics)),
            agreement=agreement(reference, result) if task.name == CLASSIFICATION else None,
            macs=candidate.network.macs(*(x.shape[1:] for x in arrays)),
            params=candidate.network.params,
            size_bytes=candidate.size_bytes,
            compression=1 - candidate.size_bytes / first.size_bytes,
            **dict.fromkeys(LATENCIES) | timing,
            metrics=result.metrics,
        )
        for candidate, result, timing in zip(candidates, results, timings, strict=True)
    ]
    return rows, results


def _drop(base: float, quality: float) -> float:
    return 0.0 if quality == base else base - quality  # both may be infinite


def measure_accuracy(network: Network, data: Dataset, label: str, progress: Progress) -> Evaluation:
    """Evaluate one network on the test data by the data set's task."""
    total = len(data.test)
    batches = eval_batches(data.test, data.spec)
    return evaluate(network, data.referenced(batches), lambda done: progress.step(label, done, total), data.task)
