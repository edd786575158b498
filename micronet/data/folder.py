"""Folders of images: ``train/<class>/*`` and ``test/<class>/*``.

``val`` is the validation split if there is also a ``test``; otherwise it is the test split.
"""

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from micronet.data.dataset import DataSource
from micronet.data.image_files import SUFFIXES, FileSplit, list_images
from micronet.data.split import ImageSplit
from micronet.errors import MicronetError


def open_folder(root: Path, image_size: int | None) -> DataSource:
    """Open a folder; without an image size, use the first image's, which must then be square."""
    splits = {name: root / name for name in ("train", "val", "test") if (root / name).is_dir()}
    test = splits.get("test") or splits.get("val")
    if test is None:
        raise MicronetError(
            f"{root} has no test/ or val/ folder; expected images in {root}/train/CLASS/ and {root}/test/CLASS/"
        )
    train = splits.get("train")
    classes = sorted(entry.name for entry in (train or test).iterdir() if entry.is_dir() and entry.name[0] != ".")
    if len(classes) < 2:
        raise MicronetError(f"{train or test} needs at least two class folders; found {len(classes)}")
    size = image_size or _first_size(train or test, classes)

    def reader(part: Path | None) -> Callable[[], ImageSplit]:
        if part is None:
            raise MicronetError(
                f"{root} has no train/ folder, which this command needs; put images into {root}/train/CLASS/"
            )
        return partial(_read, part, classes, size)

    return DataSource(
        classes=classes,
        train=lambda: reader(train)(),
        test=reader(test),
        validation=reader(splits["val"]) if "val" in splits and "test" in splits else None,
        augment="crop-flip",
    )


def _read(part: Path, classes: list[str], size: int) -> ImageSplit:
    unknown = sorted(
        entry.name for entry in part.iterdir() if entry.is_dir() and entry.name[0] != "." and entry.name not in classes
    )
    if unknown:
        raise MicronetError(
            f"{part} has classes that are not among the training images: {', '.join(unknown[:5])}; "
            f"rename or remove these folders, or add them to {part.parent / 'train'}"
        )
    found = [(str(path), label) for label, name in enumerate(classes) for path in list_images(part / name)]
    empty = set(range(len(classes))) - {label for _, label in found}
    if found and empty and part.name == "train":
        raise MicronetError(
            f"{part} has classes without images: {', '.join(classes[label] for label in sorted(empty))}; "
            "add images, or remove these folders"
        )
    if not found:
        if list_images(part):
            raise MicronetError(f"the images in {part} are not in class folders; move them to {part}/CLASS/")
        raise _no_images(part)
    labels = torch.tensor([label for _, label in found])
    return FileSplit([path for path, _ in found], labels, size)


def _first_size(part: Path, classes: list[str]) -> int:
    for path in itertools.chain.from_iterable(list_images(part / name) for name in classes):
        try:
            with Image.open(path) as image:
                width, height = image.size
        except OSError as error:
            raise MicronetError(f"{path} cannot be read as an image ({error}); fix or remove it") from error
        if width != height:
            raise MicronetError(
                f"{path} is {width}x{height}, not square; add --image-size N to resize and crop images to N x N"
            )
        return width
    raise _no_images(part)


def _no_images(part: Path) -> MicronetError:
    return MicronetError(f"{part} has no images in its class folders; supported: {', '.join(sorted(SUFFIXES))}")
