"""Compare networks on the same data: every figure measured, as rows and as a Markdown table."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from micronet.core.machine import tune_allocator
from micronet.core.progress import Progress, Silent
from micronet.data.batches import eval_batches
from micronet.data.dataset import Dataset
from micronet.evaluation.accuracy import Evaluation, agreement, evaluate
from micronet.evaluation.latency import latencies
from micronet.evaluation.network import Network

BATCHES = (1, 64)


@dataclass(frozen=True)
class Row:
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

    def to_json(self) -> dict[str, Any]:
        """Return the row as a JSON object."""
        return asdict(self)


@dataclass(frozen=True)
class Candidate:
    """A network to compare: its name, the network itself and the size of its file in bytes."""

    name: str
    network: Network
    size_bytes: int


def compare(candidates: Sequence[Candidate], data: Dataset, progress: Progress | None = None) -> list[Row]:
    """Measure networks on the test images; latencies are measured in turns.

    Args:
        candidates: The networks; the first is the reference of drops, agreement and compression.
        data: Where the test images come from.
        progress: Where progress is reported.
    """
    tune_allocator()
    progress = progress or Silent()
    results = [measure_accuracy(each.network, data, f"evaluating {each.name}", progress) for each in candidates]
    sample = next(eval_batches(data.test, data.spec, batch_size=max(BATCHES)))[0].contiguous().numpy()
    timings = []
    for index, size in enumerate(BATCHES):
        progress.step(f"timing batches of {size}", index, len(BATCHES))
        batch = np.resize(sample, (size, *sample.shape[1:]))
        timings.append(latencies([each.network for each in candidates], [batch] * len(candidates)))
    rows = []
    for index, candidate in enumerate(candidates):
        network = candidate.network
        rows.append(
            Row(
                name=candidate.name,
                runtime=network.runtime,
                stages=list(network.stages),
                images=results[index].images,
                accuracy=results[index].accuracy,
                loss=results[index].loss,
                drop=results[0].accuracy - results[index].accuracy,
                agreement=agreement(results[0], results[index]),
                macs=network.macs((sample.shape[1], sample.shape[2], sample.shape[3])),
                params=network.params,
                size_bytes=candidate.size_bytes,
                compression=1 - candidate.size_bytes / candidates[0].size_bytes,
                latency_ms=timings[0][index].p50_ms,
                latency_p95_ms=timings[0][index].p95_ms,
                latency_batch64_ms=timings[1][index].p50_ms,
                latency_batch64_p95_ms=timings[1][index].p95_ms,
            )
        )
    return rows


def measure_accuracy(network: Network, data: Dataset, label: str, progress: Progress) -> Evaluation:
    """Evaluate one network on the test images."""
    total = len(data.test)
    return evaluate(network, eval_batches(data.test, data.spec), lambda done: progress.step(label, done, total))
