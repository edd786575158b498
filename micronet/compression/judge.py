"""How well a candidate does: by a data set's metrics, or by how close it is to an ONNX file on inputs alone."""

import math
from collections.abc import Callable, Sequence
from copy import copy
from statistics import stdev
from typing import Any, Protocol

import numpy as np
import torch

from micronet.data.batches import eval_batches
from micronet.data.dataset import CALIBRATION_SAMPLES, Dataset
from micronet.errors import MicronetError, unknown
from micronet.evaluation.accuracy import check_scores, run_batch
from micronet.evaluation.network import Network, Predictor
from micronet.models.device import batch_length, head
from micronet.onnx.feeds import Feed
from micronet.tasks.agreement import Agreement, Similarity
from micronet.tasks.task import Meter, Task

PARTS, MOST_IN_PART = 16, 64  # validation samples are split into at least 16 parts of at most 64
Report = Callable[[int, int], None]  # how many of all samples are done
Metrics = dict[str, float]


class Judge(Protocol):
    """What candidates are judged by.

    Attributes:
        task: The task.
        metric: The metric whose drop counts; None: the task's main one.
        noun: What a sample is called.
        samples: The number of validation samples.
        tested_on: What the test samples were used for before, in words; empty if they are samples of their own.
    """

    task: Task
    metric: str | None
    noun: str
    samples: int
    tested_on: str

    def sample(self) -> Any:
        """Return one input as an array, or a tuple of several inputs."""

    def measure(self, network: Network, report: Report, *, test: bool = False) -> list[Metrics]:
        """Return a network's metrics on all validation or test samples, and then what each of some parts adds to them.

        The mean and the standard error of the latter are those of the former; see ``_of_parts``.
        """


class DataJudge:
    """Judges by the metrics of a data set's task.

    Args:
        data: The data, with the outputs of the original if the task needs them.
        metric: The metric whose drop counts; None: the task's main one.
        adapt: How a network takes the data's inputs, if not as they are.
    """

    def __init__(
        self, data: Dataset, metric: str | None = None, adapt: Callable[[Network], Predictor] = lambda network: network
    ) -> None:
        self.data, self.metric, self.task, self._adapt = data, metric, data.task, adapt
        self.noun, self.samples, self.tested_on = data.validation.noun, len(data.validation), data.tested_on

    def sample(self) -> Any:
        """Return one input as an array, or a tuple of several inputs."""
        inputs = self._first()
        several = inputs if isinstance(inputs, tuple) else (inputs,)
        arrays = tuple(each.contiguous().numpy() for each in several)
        return arrays if isinstance(inputs, tuple) else arrays[0]

    def measure(self, network: Network, report: Report, *, test: bool = False) -> list[Metrics]:
        """Return a network's metrics on all validation or test samples, and then what each batch adds to them."""
        split, data = self.data.test if test else self.data.validation, self.data
        size = None if test else min(MOST_IN_PART, math.ceil(len(split) / PARTS))
        predict, meters, done = self._adapt(network), [data.task.meter()], 0
        for inputs, targets in data.referenced(eval_batches(split, data.spec, size)):
            outputs = run_batch(predict, inputs)
            meters.append(data.task.meter())
            for meter in (meters[0], meters[-1]):
                meter.update(outputs, targets)
            done += batch_length(inputs)
            report(done, len(split))
        return [meters[0].compute(), *_of_parts(*meters)]

    def check_metric(self, network: Network) -> None:
        """Raise MicronetError if the task does not have the metric, as far as some samples show."""
        inputs, targets = next(
            iter(self.data.referenced(eval_batches(self.data.validation, self.data.spec, MOST_IN_PART)))
        )
        meter = self.data.task.meter()
        meter.update(run_batch(self._adapt(network), inputs), targets)
        try:
            names = meter.compute()
        except Exception:  # whatever a user's meter raises for so few samples
            return
        quality(self, names)

    def check(self, network: Network, name: str) -> None:
        """Raise MicronetError if a network does not suit the data and their task."""
        check_scores(self._adapt(network), self._first(), self.data.spec, name, self.task)

    def _first(self) -> Any:
        """Return the first validation input, as a batch."""
        return head(next(eval_batches(self.data.validation, self.data.spec, batch_size=1))[0], 1)


class FeedJudge:
    """Judges an ONNX file's forms by how close they are to it, on inputs without labels.

    Args:
        feeds: The inputs.
        original: Returns the outputs of the file for a feed.
        metric: The metric whose drop counts; None: the relative error.
    """

    noun, tested_on = "sample", CALIBRATION_SAMPLES

    def __init__(
        self, feeds: Sequence[Feed], original: Callable[[Feed], Sequence[Any]], metric: str | None = None
    ) -> None:
        self.task: Task = Agreement()
        self.metric, self._feeds = metric, feeds
        self.samples = sum(len(next(iter(feed.values()))) for feed in feeds)
        self._reference = [[torch.from_numpy(np.asarray(each)) for each in original(feed)] for feed in feeds]

    def sample(self) -> Any:
        """Return the first input as an array, or a tuple of several inputs."""
        arrays = tuple(each[:1] for each in self._feeds[0].values())
        return arrays if len(arrays) > 1 else arrays[0]

    def measure(self, network: Network, report: Report, *, test: bool = False) -> list[Metrics]:
        """Return how close a network is to the original; the test samples are the validation samples."""
        similarities = [Similarity()]
        for done, (feed, reference) in enumerate(zip(self._feeds, self._reference, strict=True), 1):
            arrays = tuple(feed.values())
            outputs = network(arrays if len(arrays) > 1 else arrays[0])
            several = outputs if isinstance(outputs, list) else [outputs]
            similarities.append(Similarity())
            for similarity in (similarities[0], similarities[-1]):
                similarity.update([torch.from_numpy(np.asarray(each)) for each in several], reference)
            report(done, len(self._feeds))
        return [similarities[0].compute(), *_of_parts(*similarities)]


def _of_parts(whole: Meter, *parts: Meter) -> list[Metrics]:
    """Return the metrics of parts of the samples; none where the task, which may be the user's, has none of so few.

    Meters that add up ``totals`` give the pseudo-values of the jackknife (Tukey 1958): n metrics of all samples less
    n - 1 of all without the part. They are the parts' own values if the metric is a mean over samples and the
    parts are alike in size; the mean IoU of a few images says little of that of all.
    """
    totals = getattr(whole, "totals", None)
    if not isinstance(totals, torch.Tensor):
        return list(map(_metrics, parts))
    found, everything = [], _metrics(whole)
    for part in parts:
        rest: Any = copy(whole)
        rest.totals = totals - part.totals  # type: ignore[attr-defined]  # it is the same kind of meter
        without = _metrics(rest)
        n = len(parts)
        found.append({name: n * everything[name] - (n - 1) * without[name] for name in without if name in everything})
    return found


def _metrics(meter: Meter) -> Metrics:
    try:
        return {name: value for name, value in meter.compute().items() if math.isfinite(value)}
    except Exception:  # whatever a user's meter raises
        return {}


def error_of_drop(before: Sequence[float | None], after: Sequence[float | None]) -> float | None:
    """Return the standard error of a drop, by a metric of two networks on the same parts of the samples.

    It is that of the mean of the parts' drops, which are paired: samples that both networks get wrong do not widen it.
    None if there are not two parts.
    """
    drops = [a - b for a, b in zip(before, after, strict=False) if a is not None and b is not None]
    return stdev(drops) / math.sqrt(len(drops)) if len(drops) > 1 else None


def quality(judge: Judge, metrics: dict[str, float]) -> float:
    """Return the metric that counts, negated if less is better; MicronetError if the task does not have it."""
    name = judge.metric
    if name is None or name == judge.task.main:
        return judge.task.quality(metrics)
    if name not in metrics:
        raise unknown("metric", name, metrics)
    return metrics[name] if judge.task.prefers_more(name) else -metrics[name]


def quality_of_part(judge: Judge, metrics: dict[str, float]) -> float | None:
    """Return the metric that counts for a part of the samples; None if it has none, as that of too few samples."""
    try:
        return quality(judge, metrics)
    except (KeyError, MicronetError):
        return None


def repeated(sample: Any, batch: int) -> Any:
    """Return a batch that holds a sample several times."""
    if isinstance(sample, tuple):
        return tuple(repeated(each, batch) for each in sample)
    return np.resize(sample, (batch, *sample.shape[1:]))
