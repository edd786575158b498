"""Arrays with class numbers: images, or any other inputs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from micronet.core.image_size import ImageSize
from micronet.data.arrays import as_tensor
from micronet.data.batch_samples import BatchSamples
from micronet.data.dataset import DataSource
from micronet.data.labelled_names import PARTS, are_images, input_arrays, is_labelled
from micronet.data.npz import names_in, read_headers
from micronet.data.samples import SampleSplit
from micronet.data.split import MemorySplit, resize
from micronet.errors import MicronetError, count

OTHER_LABELS = "other labels need --task FILE.py:TASK, a class that reads them (docs/tasks.md)"
OTHER_INPUTS = f"{OTHER_LABELS}, and inputs without labels --task agreement"
MOST_CLASSES = 1_000_000


def open_arrays(stored: Mapping[str, Any], image_size: ImageSize | None) -> DataSource:
    """Open arrays with class numbers.

    Args:
        stored: ``x_train`` and ``x_test``, uint8 images (N, H, W), (N, H, W, C) or (N, C, H, W) with C of 1 or 3, or
            any other inputs (N, ...), which are passed on as they are; of several inputs, each has such a pair of
            names. ``y_train`` and ``y_test``, integer labels (N,) from 0; optionally ``classes``, the class names.
        image_size: What images are resized to.
    """
    stored = {name: np.asarray(each) for name, each in stored.items()}
    names = list(input_arrays(stored)) if is_labelled(stored) else ["x"]
    if missing := [each for name in (*names, "y") for part in PARTS if (each := f"{name}_{part}") not in stored]:
        raise MicronetError(
            f"the data set has the arrays {', '.join(map(str, stored)) or '(none)'}, but not {', '.join(missing)}; "
            f"expected x_train, y_train, x_test and y_test; {OTHER_INPUTS}"
        )
    labels = [_labels(stored, part, names[0]) for part in PARTS]
    classes = _classes(stored, labels)
    if are_images(stored):
        train, test = (_images(stored, part, own, image_size) for part, own in zip(PARTS, labels, strict=True))
        cure = " (channels x height x width); store both alike, or resize them with --image-size"
        _check_alike(_sides(train.image_shape), _sides(test.image_shape), "images", cure)
        return DataSource(lambda: train, lambda: test, classes)
    samples = [_samples(stored, part, own, names) for part, own in zip(PARTS, labels, strict=True)]
    for name, *both in zip(names, *(each.describe() for each in samples), strict=True):
        own, other = (f"{each['dtype']} {_sides(each['shape'])}".strip() for each in both)
        _check_alike(own, other, f"samples of {name}", "; store both alike")
    return DataSource(lambda: samples[0], lambda: samples[1], classes, is_images=False)


def holds_images(path: Path) -> bool:
    """Whether an .npz file holds labelled images for training and testing, rather than a network's inputs as they are.

    Raises MicronetError if the file is damaged.
    """
    return is_labelled(names_in(path)) and are_images(read_headers(path))


def _check_alike(train: str, test: str, noun: str, cure: str) -> None:
    """Raise MicronetError if test samples are described otherwise than those for training."""
    if train != test:
        raise MicronetError(f"the training {noun} are {train}, but the test {noun} are {test}{cure}")


def _sides(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _labels(stored: Mapping[str, Any], part: str, name: str) -> Tensor:
    """Return the class numbers of a part of the data, one per sample of the input ``name``."""
    x, y = stored[f"{name}_{part}"], stored[f"y_{part}"]
    if y.dtype.kind not in "iu":
        raise MicronetError(f"y_{part} is {y.dtype}; expected integer labels; {OTHER_LABELS}")
    if x.ndim == 0 or len(x) == 0 or y.shape != (len(x),) or y.min() < 0:
        raise MicronetError(
            f"{name}_{part} has {count(len(x) if x.ndim else 0, 'sample')} and y_{part} has shape {y.shape}; expected "
            "one label per sample, 0 or greater"
        )
    return torch.from_numpy(y.astype(np.int64))


def _classes(stored: Mapping[str, Any], labels: Sequence[Tensor]) -> list[str]:
    """Return the names of the classes: those stored, or the numbers."""
    number = 1 + max(int(each.max()) for each in labels)
    if number > MOST_CLASSES:
        raise MicronetError(
            f"the data set has label {number - 1}; labels count the classes from 0, and {MOST_CLASSES:,} is the most "
            "that is supported"
        )
    classes = [str(name) for name in stored["classes"]] if "classes" in stored else [str(i) for i in range(number)]
    if len(classes) < number:
        raise MicronetError(
            f"the data set lists {count(len(classes), 'class')} but has label {number - 1}; expected labels 0 to "
            f"{len(classes) - 1}"
        )
    return classes


def _images(stored: Mapping[str, Any], part: str, labels: Tensor, image_size: ImageSize | None) -> MemorySplit:
    x = np.ascontiguousarray(stored[f"x_{part}"])
    if x.dtype != np.uint8:
        raise MicronetError(f"x_{part} is {x.dtype}, but x_train is uint8; store both alike")
    if x.ndim == 3:
        x = x[:, None]
    elif x.ndim == 4 and x.shape[1] not in (1, 3) and x.shape[3] in (1, 3):
        x = x.transpose(0, 3, 1, 2)
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise MicronetError(
            f"x_{part} has shape {x.shape}; expected images with 1 or 3 channels, since it is uint8; store other "
            "inputs as float32 or int64"
        )
    return MemorySplit(resize(torch.from_numpy(x), image_size), labels)


def _samples(stored: Mapping[str, Any], part: str, labels: Tensor, names: Sequence[str]) -> SampleSplit:
    arrays = {name: stored[f"{name}_{part}"] for name in names}
    for name, array in arrays.items():
        if array.shape[:1] != (len(labels),):
            raise MicronetError(f"{name}_{part} has shape {array.shape}, but there are {count(len(labels), 'label')}")
    inputs = tuple(as_tensor(array, f"{name}_{part}") for name, array in arrays.items())
    return SampleSplit(BatchSamples([inputs], [labels], list(names), stacked=True), "the data set")
