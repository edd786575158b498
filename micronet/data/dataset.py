"""A data set: three splits, class names and the preprocessing that a network is trained with.

The best epoch is chosen on ``validation``, a seeded part of the training images; ``test`` is only reported.
Splits are read when first used, so ``evaluate`` never decodes training images.
"""

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from micronet.core.image_size import size_of
from micronet.data.image_files import FileSplit, image_memory
from micronet.data.samples import SampleSplit
from micronet.data.spec import DataSpec as DataSpec
from micronet.data.split import ImageSplit, Split, random_subset
from micronet.errors import MicronetError, count

if TYPE_CHECKING:
    from micronet.tasks.task import Task

VALIDATION_SHARE = 0.1
STATISTICS_IMAGES = 10_000  # enough for four digits of the means
STATISTICS_PIXELS = 500_000  # per batch
CALIBRATION_SAMPLES = "also used for calibration"
VALIDATION_SAMPLES = "also used for validation"
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


@dataclass(frozen=True)
class DataSource:
    """Where samples come from: functions that read the splits, and class names if there are classes."""

    train: Callable[[], Split]
    test: Callable[[], Split] | None  # None: the validation samples serve as test samples
    classes: list[str] | None = None
    validation: Callable[[], Split] | None = None
    augment: str = "none"
    is_images: bool = True  # False if the splits are SampleSplits
    tests_training_samples: bool = False  # because there are too few to split
    is_labelled: bool = True  # False if the task needs labels, but there are only inputs
    is_grey: Callable[[], bool] = lambda: False  # whether image files, which are read as RGB, have no colours


class Dataset:
    """Three splits, the spec that describes them, and the task that they are for."""

    def __init__(self, source: DataSource, spec: DataSpec, task: "Task") -> None:
        self._source, self.task = source, task
        self._reference: Callable[[Any], Any] | None = None
        self._partial = replace(spec, classes=source.classes, augment=source.augment)
        self.classes = source.classes
        self._cache_bytes = image_memory()  # still free for decoded images

    @cached_property
    def spec(self) -> DataSpec:
        """The complete spec; image size, channels, mean and std that are not given come from the training images."""
        spec = self._partial
        if (inputs := self.inputs) is not None:
            return replace(spec, inputs=inputs)
        if spec.image_size is None or spec.channels is None:
            shape = images_of(self.train if spec.mean is None else self.test).image_shape
            spec = replace(spec, channels=shape[0], image_size=size_of(*shape[1:]))
        if spec.mean is None or spec.std is None:
            mean, std = _statistics(images_of(self.train))
            spec = replace(spec, mean=mean, std=std)
        if len(spec.mean or []) != spec.channels:
            raise wrong_channels(len(spec.mean or []), spec.channels)
        return spec

    @property
    def fitting_spec(self) -> DataSpec:
        """The spec for a new network; of samples in memory that may be images, with their size and classes."""
        if self.task.least_classes is None:
            return self.spec
        known = replace(self.spec, classes=[str(number) for number in range(self.task.least_classes)])
        shape = known.inputs[0]["shape"] if known.inputs and len(known.inputs) == 1 else []
        if len(shape) != 3:
            return known
        return replace(known, channels=shape[0], image_size=size_of(*shape[1:]))

    @cached_property
    def _fit_and_validation(self) -> tuple[Split, Split]:
        whole = self._prepared(self._source.train())
        if self._source.validation is not None:
            return whole, self._prepared(self._source.validation())
        order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(self._partial.seed))
        held = max(1, round(len(whole) * VALIDATION_SHARE))
        if held >= len(whole):
            raise MicronetError(
                f"{count(len(whole), whole.noun)} cannot be split into training and validation {whole.noun}s; add "
                "more, or raise --limit"
            )
        return whole.subset(order[held:]), whole.subset(order[:held])

    @cached_property
    def inputs(self) -> list[dict[str, Any]] | None:
        """The inputs, as in the spec; None for images."""
        samples = None if self._source.is_images else self.test
        return samples.describe() if isinstance(samples, SampleSplit) else None

    @property
    def _input_names(self) -> list[str]:
        """The names of the inputs of the network that the data are for, in its order."""
        return [each["name"] for each in self._partial.inputs or [] if each.get("name")]

    @property
    def train(self) -> Split:
        """The images or other samples that weights are trained on."""
        return self._fit_and_validation[0]

    @property
    def validation(self) -> Split:
        """The images or other samples that the best epoch is chosen on."""
        return self._fit_and_validation[1]

    @cached_property
    def test(self) -> Split:
        """The images or other samples that accuracy is reported on."""
        return self.validation if self._source.test is None else self._prepared(self._source.test())

    @cached_property
    def is_grey(self) -> bool:
        """Whether the image files have no colours; a network for one channel then gets one."""
        return self._source.is_grey()

    @property
    def image_height(self) -> int:
        """The height of training images in pixels; 0 if the samples are not images."""
        return self.train.image_shape[1] if isinstance(self.train, ImageSplit) else 0

    @property
    def tested_on(self) -> str:
        """What the test samples were used for before, in words; empty if they are samples of their own."""
        if self._source.test is None:
            return VALIDATION_SAMPLES
        return CALIBRATION_SAMPLES if self._source.tests_training_samples else ""

    @property
    def is_labelled(self) -> bool:
        """Whether the task's loss and metrics can be computed; otherwise, the inputs alone are of use."""
        return self._source.is_labelled

    def with_reference(self, predict: Callable[[Any], Any]) -> "Dataset":
        """Return the same data with the outputs of a predictor as targets, if the task needs a reference network."""
        if not self.task.needs_reference:
            return self
        data = copy.copy(self)
        data._reference = predict
        return data

    def referenced(self, batches: Iterable[tuple[Any, Any]]) -> Iterable[tuple[Any, Any]]:
        """Yield batches with the targets of the reference network, if the task needs one.

        Raises MicronetError if it needs one and there is none, or if labels are needed and there are none.
        """
        if not self.is_labelled:
            raise MicronetError(
                f"the data have no labels, but --task {self.task.name} needs them; pass batches of (inputs, labels), "
                "or compare outputs with those of the float network with --task agreement"
            )
        if not self.task.needs_reference:
            return batches
        if (predict := self._reference) is None:
            raise MicronetError(
                f"--task {self.task.name} compares a network with its float original, but no original was given; "
                "pass both files to micronet compare or, for training, pass the original with --distill"
            )
        from micronet.evaluation.accuracy import run_batch

        return ((inputs, run_batch(predict, inputs)) for inputs, _ in batches)

    def _prepared(self, split: Split) -> Split:
        """Apply the limit, and cache decoded images if all of them fit in the memory that is left."""
        limit = self._partial.limit
        if limit is not None and limit < len(split):
            split = random_subset(split, limit, self._partial.seed)
        if isinstance(split, SampleSplit) and self._input_names:
            return split.in_order(self._input_names)
        if not isinstance(split, FileSplit):
            return split
        if self._partial.channels == 1 and self.is_grey:
            split = split.as_grey()
        size_bytes = len(split) * math.prod(split.image_shape)
        if size_bytes > self._cache_bytes:
            return split
        self._cache_bytes -= size_bytes
        return split.with_cache()


def images_of(split: Split) -> ImageSplit:
    """Return a split of images; raise MicronetError if its samples are none."""
    if isinstance(split, ImageSplit):
        return split
    raise MicronetError("images are required, but the inputs of this data set are tensors without a mean and std")


def wrong_channels(expected: int, got: int | None) -> MicronetError:
    """Return the error for images with another number of channels than a network's."""
    return MicronetError(
        f"the network expects images with {expected} channels, but those in the data set have {got}; use a data set "
        f"with {expected} channels, or train a new network on this one"
    )


def _statistics(split: ImageSplit) -> tuple[list[float], list[float]]:
    """Return the mean and standard deviation per channel, of pixels scaled to 0..1, to four digits."""
    split = random_subset(split, STATISTICS_IMAGES, seed=0)
    channels, height, width = split.image_shape
    counts = torch.zeros(channels, 256, dtype=torch.float64)  # of each pixel value
    for images in split.stream(torch.split(torch.arange(len(split)), max(1, STATISTICS_PIXELS // (height * width)))):
        for channel in range(channels):
            counts[channel] += torch.bincount(images[:, channel].flatten(), minlength=256)
    shares, values = counts / counts.sum(1, keepdim=True), torch.arange(256).double() / 255
    mean = shares @ values
    variance = shares @ values.square() - mean.square()
    std = variance.clamp(min=1e-4).sqrt()
    return [round(value, 4) for value in mean.tolist()], [round(value, 4) for value in std.tolist()]
