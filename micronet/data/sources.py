"""The data sets known by name, and arrays that a user brings.

``digits`` is inside the package (see ``digits.md`` beside it for source and licence); the others are torchvision's
and are downloaded once, into ``$MICRONET_DATA`` (default ``~/.cache/micronet``).
"""

import os
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from micronet.data.dataset import Augment, DataSource
from micronet.data.split import ImageSplit, MemorySplit, resize
from micronet.errors import FailedError, MicronetError

DIGITS_SIZE = 32


def digits(image_size: int | None) -> DataSource:
    """Open the UCI handwritten digits: 8x8 scans with 17 grey levels, shown as RGB at 32x32 unless told otherwise."""
    with resources.files("micronet.data").joinpath("digits.npz").open("rb") as file, np.load(file) as stored:
        held = {key: stored[key] for key in stored.files}

    def read(part: str) -> Callable[[], ImageSplit]:
        grey = torch.from_numpy(held[f"x_{part}"]).unsqueeze(1).expand(-1, 3, -1, -1)
        labels = torch.from_numpy(held[f"y_{part}"]).long()
        pixels = (grey.float() * (255 / 16)).round().to(torch.uint8)
        return lambda: MemorySplit(resize(pixels, image_size or DIGITS_SIZE), labels)

    return DataSource([str(digit) for digit in range(10)], read("train"), read("test"), augment="crop")


def cifar10(image_size: int | None) -> DataSource:
    """Open CIFAR-10 (Krizhevsky 2009): 60,000 colour images of 32x32."""
    return _torchvision("CIFAR10", image_size, "crop-flip")


def cifar100(image_size: int | None) -> DataSource:
    """Open CIFAR-100 (Krizhevsky 2009): 60,000 colour images of 32x32 in 100 classes."""
    return _torchvision("CIFAR100", image_size, "crop-flip")


def mnist(image_size: int | None) -> DataSource:
    """Open MNIST (LeCun et al. 1998): 70,000 grey images of 28x28."""
    return _torchvision("MNIST", image_size, "crop")


def fashion_mnist(image_size: int | None) -> DataSource:
    """Open Fashion-MNIST (Xiao et al. 2017): 70,000 grey images of 28x28."""
    return _torchvision("FashionMNIST", image_size, "crop-flip")


def arrays(held: Mapping[str, Any], image_size: int | None) -> DataSource:
    """Open arrays: ``x_train``, ``y_train``, ``x_test``, ``y_test`` and, if wanted, ``classes`` (names).

    x: uint8, (N, H, W), (N, H, W, C) or (N, C, H, W) with C of 1 or 3. y: integers from 0.
    """
    missing = [key for key in ("x_train", "y_train", "x_test", "y_test") if key not in held]
    if missing:
        raise MicronetError(f"the data lack {', '.join(missing)}; expected x_train, y_train, x_test, y_test")
    splits = {part: _from_arrays(part, held[f"x_{part}"], held[f"y_{part}"], image_size) for part in ("train", "test")}
    count = int(max(split.labels.max() for split in splits.values())) + 1
    classes = [str(name) for name in held["classes"]] if "classes" in held else [str(i) for i in range(count)]
    if len(classes) < count:
        raise MicronetError(f"the data name {len(classes)} classes but label up to {count - 1}")
    return DataSource(classes, lambda: splits["train"], lambda: splits["test"])


def _from_arrays(part: str, x: Any, y: Any, image_size: int | None) -> MemorySplit:
    x, y = np.ascontiguousarray(x), np.asarray(y)
    if x.dtype != np.uint8 or y.dtype.kind not in "iu":
        raise MicronetError(f"x_{part} is {x.dtype} and y_{part} {y.dtype}; expected uint8 images, integer labels")
    if x.ndim == 3:
        x = x[:, None]
    elif x.ndim == 4 and x.shape[1] not in (1, 3) and x.shape[3] in (1, 3):
        x = x.transpose(0, 3, 1, 2)
    if x.ndim != 4 or x.shape[1] not in (1, 3) or x.shape[2] != x.shape[3]:
        raise MicronetError(f"x_{part} has shape {x.shape}; expected square images of 1 or 3 channels")
    if len(x) == 0 or y.shape != (len(x),) or y.min() < 0:
        raise MicronetError(f"x_{part} has {len(x)} images, y_{part} shape {y.shape}; expected one label >= 0 an image")
    return MemorySplit(resize(torch.from_numpy(x), image_size), torch.from_numpy(y.astype(np.int64)))


def _torchvision(name: str, image_size: int | None, augment: Augment) -> DataSource:
    from torchvision import datasets

    root = Path(os.environ.get("MICRONET_DATA", "~/.cache/micronet")).expanduser()

    def read(train: bool) -> Any:
        try:
            return getattr(datasets, name)(root, train=train, download=True)
        except (OSError, RuntimeError) as error:
            raise FailedError(
                f"{name} could not be downloaded to {root} ({error}); give images you have with --data FOLDER"
            ) from error

    def split(train: bool) -> ImageSplit:
        data = read(train)
        pixels = torch.as_tensor(data.data)
        images: Tensor = pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
        return MemorySplit(resize(images, image_size), torch.as_tensor(data.targets))

    return DataSource(list(read(False).classes), lambda: split(True), lambda: split(False), augment=augment)
