"""Loading a data set by the name that the user gives to ``--data``: built in, a folder, a file, or the user's code.

``digits`` comes with the package (source and licence: ``digits.md``). torchvision downloads the other built-in data
sets once, into ``$MICRONET_DATA`` (default ``~/.cache/micronet``).
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from micronet import registry
from micronet.core.files import cache_folder
from micronet.core.image_size import ImageSize, parse_size
from micronet.data.dataset import Dataset, DataSource, DataSpec
from micronet.data.folder import open_folder
from micronet.data.labelled_arrays import open_arrays
from micronet.data.memory import NAME, MemoryData
from micronet.data.npz import read_npz
from micronet.data.spec import NoDataError, unknown_data
from micronet.data.split import ImageSplit, MemorySplit, resize
from micronet.errors import FailedError, MicronetError, count, explain_code_error
from micronet.tasks.task import CLASSIFICATION, Task, load_task

DIGITS_SIZE = 32


def load_data(
    name: str | None,
    *,
    image_size: int | str | list[int] | None = None,
    limit: int | None = None,
    like: DataSpec | None = None,
    task: str | None = None,
    network: nn.Module | None = None,
    testing: bool = False,
) -> Dataset:
    """Open a data set; images are read when they are first used.

    Args:
        name: A built-in data set, a folder, a ``.npz`` file, ``pkg.mod:factory`` or ``MemoryData``; None: the name in
            ``like``.
        image_size: In pixels, ``N`` for NxN or ``"HEIGHTxWIDTH"``; None: as in ``like``, or the images' own.
        limit: The maximum number of training images, and of test images.
        like: The spec of the network that the data set is for; its preprocessing overrides the data set's.
        task: What the data set is for; None: as in ``like``.
        network: The network that takes the data, if there is one: its forward says which items in memory are inputs.
        testing: Whether all data in memory are test samples; otherwise, they are for training and validation.
    """
    like = like or DataSpec()
    place = _place(name, like)
    size = parse_size(image_size) or like.image_size
    opened = load_task(task, like.task)
    if isinstance(place, MemoryData):
        source, opened = place.open(opened, like, network, testing=testing)
    else:
        source = opened.open(place, size)
    if image_size is not None and not source.is_images:
        where = "data in memory" if isinstance(place, MemoryData) else f"the inputs in {place}"
        raise MicronetError(f"--image-size has no effect on {where}; drop it")
    _check_classes(source, like, opened, place)
    is_built_in = place in registry.DATA and opened.name == CLASSIFICATION  # whatever folder has that name too
    return Dataset(
        source,
        replace(
            like,
            name=str(Path(place).resolve()) if Path(place).exists() and not is_built_in else str(place),
            image_size=size,
            limit=limit or (like.limit if name is None else None),
            task=opened.name,
        ),
        opened,
    )


def _place(name: str | None, like: DataSpec) -> str:
    """Return the data set that is named, or the one that a file records.

    Raises NoDataError if neither is known or it was in memory, MicronetError if the recorded one would run code.
    """
    place = name or like.name
    if place is None:
        raise NoDataError("the file does not record a data set; specify one with --data (and --image-size if needed)")
    if place == NAME and not isinstance(place, MemoryData):
        raise NoDataError(
            "the recorded data set was given in memory, from Python, so it is not known here; specify a data set with "
            "--data"
        )
    if name is None and ":" in place and not Path(place).exists():  # a file must not choose code to run
        raise MicronetError(
            f"the recorded data set {place} is Python code, which is not run automatically; to run it, add --data "
            f"{place}"
        )
    return place


def _check_classes(source: DataSource, like: DataSpec, task: Task, place: str) -> None:
    """Raise MicronetError if a data set has other classes than the network that it is for."""
    if like.classes is not None and source.classes is not None and like.classes != source.classes:
        stray = task.find_class(place, len(like.classes)) or f"{place} has {_count(source.classes)}"
        raise MicronetError(
            f"the network was trained on {_count(like.classes)}, but {stray}; use a data "
            "set with the same classes, or train a new network on this one"
        )


def open_images(name: str, image_size: ImageSize | None) -> DataSource:
    """Open labelled images: built in, a folder, a file, or the user's code."""
    path = Path(name)
    if name in registry.DATA:
        source: DataSource = registry.load_object(registry.DATA[name])(image_size)
        return source
    if path.is_dir():
        return open_folder(path, image_size)
    if path.suffix == ".npz":
        return open_arrays(read_npz(path), image_size)
    if ":" in name and not path.exists():  # a file of such a name must not make a recorded name run
        return open_arrays(_call(name), image_size)
    raise unknown_data(name)


def _call(name: str) -> Mapping[str, Any]:
    module, _, attribute = name.partition(":")
    try:
        with registry.importable_from(Path.cwd()):
            result = getattr(import_module(module), attribute)()
    except Exception as error:
        raise MicronetError(f"--data {name} failed {explain_code_error(error)}") from error
    if not isinstance(result, Mapping):
        raise MicronetError(f"--data {name} returned {type(result).__name__}; it must return a dict of arrays")
    return result


def _count(classes: list[str]) -> str:
    return f"{count(len(classes), 'class')} ({', '.join(classes[:3])}{', …' if len(classes) > 3 else ''})"


def digits(image_size: ImageSize | None) -> DataSource:
    """Open the UCI handwritten digits: 8x8 scans of 17 grey levels, resized to 32x32 RGB by default."""
    stored = read_npz(Path(__file__).with_name("digits.npz"))

    def read(part: str) -> ImageSplit:
        grey = torch.from_numpy(stored[f"x_{part}"]).unsqueeze(1).expand(-1, 3, -1, -1)
        pixels = (grey.float() * (255 / 16)).round().to(torch.uint8)
        return MemorySplit(resize(pixels, image_size or DIGITS_SIZE), torch.from_numpy(stored[f"y_{part}"]).long())

    return DataSource(partial(read, "train"), partial(read, "test"), list("0123456789"), augment="crop")


def _torchvision(name: str, augment: str, image_size: ImageSize | None) -> DataSource:
    from torchvision import datasets

    root = Path(os.environ.get("MICRONET_DATA") or cache_folder()).expanduser()

    def read(*, train: bool) -> Any:
        try:
            return getattr(datasets, name)(root, train=train, download=True)
        except (OSError, RuntimeError) as error:
            raise FailedError(
                f"{name} could not be downloaded to {root} ({error}); check the connection, or use --data FOLDER"
            ) from error

    def split(data: Any) -> ImageSplit:
        pixels = torch.as_tensor(data.data)
        images = pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
        return MemorySplit(resize(images, image_size), torch.as_tensor(data.targets))

    test = read(train=False)
    return DataSource(lambda: split(read(train=True)), lambda: split(test), list(test.classes), augment=augment)


cifar10 = partial(_torchvision, "CIFAR10", "crop-flip")  # Krizhevsky 2009: 60,000 colour images of 32x32
cifar100 = partial(_torchvision, "CIFAR100", "crop-flip")  # the same in 100 classes
mnist = partial(_torchvision, "MNIST", "crop")  # LeCun et al. 1998: 70,000 grey images of 28x28
fashion_mnist = partial(_torchvision, "FashionMNIST", "crop-flip")  # Xiao et al. 2017: 70,000 grey images of 28x28
