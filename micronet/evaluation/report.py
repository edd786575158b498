"""Compare networks on the same data, every figure measured."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from micronet.core.machine import tune_allocator
from micronet.core.progress import Progress
from micronet.data.batches import eval_batches
from micronet.data.dataset import Dataset
from micronet.evaluation.accuracy import Evaluation, agreement, evaluate
from micronet.evaluation.latency import latencies
from micronet.evaluation.network import Network

BATCHES = (1, 64)


class Row(NamedTuple):
    """The figures of one network on ``images`` test images.

    ``accuracy``, ``drop`` and ``agreement`` are 0..1, the last two relative to the first row. ``size_bytes``: the file.
    ``compression``: 1 - size / size of the first row. Latencies are medians per call with 1 or 64 images.
    """

    name: str
    runtime: str
    stages: list[str]
    images: int
    accuracy: float
    loss: float
    drop: float
    agreement: float
    macs: int | None
    params: int
    size_bytes: int
    compression: float
    latency_ms: float
    latency_p95_ms: float
    latency_batch64_ms: float
    latency_batch64_p95_ms: float


class Candidate(NamedTuple):
    """A network to compare: its name, the network itself and the size of its file in bytes."""

    name: str
    network: Network
    size_bytes: int


def compare(candidates: Sequence[Candidate], data: Dataset, progress: Progress) -> list[Row]:
    """Measure networks on the test images; the first is the reference of drops, agreement and compression."""
    tune_allocator()
    results = [measure_accuracy(each.network, data, f"evaluating {each.name}", progress) for each in candidates]
    sample = next(eval_batches(data.test, data.spec, batch_size=max(BATCHES)))[0].contiguous().numpy()
    timings = []
    for index, size in enumerate(BATCHES):
        progress.step(f"timing batches of {size}", index, len(BATCHES))
        batch = np.resize(sample, (size, *sample.shape[1:]))
        timings.append(latencies([each.network for each in candidates], [batch] * len(candidates)))
    first, reference = candidates[0], results[0]
    return [
        Row(
            name=candidate.name,
            runtime=candidate.network.runtime,
            stages=list(candidate.network.stages),
            images=len(result.classes),
            accuracy=result.accuracy,
            loss=result.loss,
            drop=reference.accuracy - result.accuracy,
            agreement=agreement(reference, result),
            macs=candidate.network.macs(sample.shape[1:]),
            params=candidate.network.params,
            size_bytes=candidate.size_bytes,
            compression=1 - candidate.size_bytes / first.size_bytes,
            latency_ms=single.p50_ms,
            latency_p95_ms=single.p95_ms,
            latency_batch64_ms=batch64.p50_ms,
            latency_batch64_p95_ms=batch64.p95_ms,
        )
        for candidate, result, single, batch64 in zip(candidates, results, *timings, strict=True)
    ]


def measure_accuracy(network: Network, data: Dataset, label: str, progress: Progress) -> Evaluation:
    """Evaluate one network on the test images."""
    total = len(data.test)
    return evaluate(network, eval_batches(data.test, data.spec), lambda done: progress.step(label, done, total))
