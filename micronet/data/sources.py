"""The built-in data sets, and the user's own arrays.

``digits`` comes with the package (source and licence: ``digits.md``). torchvision downloads the others once, into
``$MICRONET_DATA`` (default ``~/.cache/micronet``).
"""

import os
from collections.abc import Callable, Mapping
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch

from micronet.data.dataset import DataSource
from micronet.data.split import ImageSplit, MemorySplit, resize
from micronet.errors import FailedError, MicronetError

DIGITS_SIZE = 32


def digits(image_size: int | None) -> DataSource:
    """Open the UCI handwritten digits: 8x8 scans of 17 grey levels, resized to 32x32 RGB by default."""
    with resources.files("micronet.data").joinpath("digits.npz").open("rb") as file, np.load(file) as archive:
        stored = {key: archive[key] for key in archive.files}

    def read(part: str) -> Callable[[], ImageSplit]:
        grey = torch.from_numpy(stored[f"x_{part}"]).unsqueeze(1).expand(-1, 3, -1, -1)
        labels = torch.from_numpy(stored[f"y_{part}"]).long()
        pixels = (grey.float() * (255 / 16)).round().to(torch.uint8)
        return lambda: MemorySplit(resize(pixels, image_size or DIGITS_SIZE), labels)

    return DataSource([str(digit) for digit in range(10)], read("train"), read("test"), augment="crop")


def open_arrays(stored: Mapping[str, Any], image_size: int | None) -> DataSource:
    """Open arrays.

    Args:
        stored: ``x_train`` and ``x_test``, uint8 images (N, H, W), (N, H, W, C) or (N, C, H, W) with C of 1 or 3;
            ``y_train`` and ``y_test``, integer labels (N,) from 0; optionally ``classes``, the class names.
    """
    missing = [key for key in ("x_train", "y_train", "x_test", "y_test") if key not in stored]
    if missing:
        raise MicronetError(
            f"the data set has no {', '.join(missing)}; expected arrays x_train, y_train, x_test and y_test"
        )
    train, test = (
        _from_arrays(part, stored[f"x_{part}"], stored[f"y_{part}"], image_size) for part in ("train", "test")
    )
    count = int(max(train.labels.max(), test.labels.max())) + 1
    classes = [str(name) for name in stored["classes"]] if "classes" in stored else [str(i) for i in range(count)]
    if len(classes) < count:
        raise MicronetError(
            f"the data set names {len(classes)} classes, but has a label {count - 1}; expected labels from 0 to "
            f"{len(classes) - 1}"
        )
    return DataSource(classes, lambda: train, lambda: test)


def _from_arrays(part: str, x: Any, y: Any, image_size: int | None) -> MemorySplit:
    x, y = np.ascontiguousarray(x), np.asarray(y)
    if x.dtype != np.uint8 or y.dtype.kind not in "iu":
        raise MicronetError(
            f"x_{part} is {x.dtype} and y_{part} is {y.dtype}; expected uint8 images and integer labels"
        )
    if x.ndim == 3:
        x = x[:, None]
    elif x.ndim == 4 and x.shape[1] not in (1, 3) and x.shape[3] in (1, 3):
        x = x.transpose(0, 3, 1, 2)
    if x.ndim != 4 or x.shape[1] not in (1, 3) or x.shape[2] != x.shape[3]:
        raise MicronetError(f"x_{part} has shape {x.shape}; expected square images with 1 or 3 channels")
    if len(x) == 0 or y.shape != (len(x),) or y.min() < 0:
        raise MicronetError(
            f"x_{part} has {len(x)} images and y_{part} has shape {y.shape}; expected one label, 0 or more, per image"
        )
    return MemorySplit(resize(torch.from_numpy(x), image_size), torch.from_numpy(y.astype(np.int64)))


def _torchvision(name: str, augment: str, image_size: int | None) -> DataSource:
    from torchvision import datasets

    root = Path(os.environ.get("MICRONET_DATA", "~/.cache/micronet")).expanduser()

    def read(*, train: bool) -> Any:
        try:
            return getattr(datasets, name)(root, train=train, download=True)
        except (OSError, RuntimeError) as error:
            raise FailedError(
                f"{name} could not be downloaded to {root} ({error}); use your own images with --data FOLDER"
            ) from error

    def split(*, train: bool) -> ImageSplit:
        data = read(train=train)
        pixels = torch.as_tensor(data.data)
        images = pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
        return MemorySplit(resize(images, image_size), torch.as_tensor(data.targets))

    classes = list(read(train=False).classes)
    return DataSource(classes, partial(split, train=True), partial(split, train=False), augment=augment)


cifar10 = partial(_torchvision, "CIFAR10", "crop-flip")  # Krizhevsky 2009: 60,000 colour images of 32x32
cifar100 = partial(_torchvision, "CIFAR100", "crop-flip")  # the same in 100 classes
mnist = partial(_torchvision, "MNIST", "crop")  # LeCun et al. 1998: 70,000 grey images of 28x28
fashion_mnist = partial(_torchvision, "FashionMNIST", "crop-flip")  # Xiao et al. 2017: 70,000 grey images of 28x28
