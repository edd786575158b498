"""Folders of images: ``train/<class>/*`` and ``test/<class>/*`` (or ``val``; with both, ``val`` validates)."""

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from micronet.data.dataset import DataSource
from micronet.data.image_files import SUFFIXES, list_images
from micronet.data.split import FileSplit, ImageSplit
from micronet.errors import MicronetError


def folder(root: Path, image_size: int | None) -> DataSource:
    """Open a folder. Without an image size the first image's is taken; it must then be square."""
    splits = {name: root / name for name in ("train", "val", "test") if (root / name).is_dir()}
    test = splits.get("test") or splits.get("val")
    if test is None:
        raise MicronetError(f"{root} has no test/ or val/ folder; expected train/<class>/*.jpg and test/<class>/*.jpg")
    train = splits.get("train")
    classes = sorted(entry.name for entry in (train or test).iterdir() if entry.is_dir() and entry.name[0] != ".")
    if len(classes) < 2:
        raise MicronetError(f"{train or test} holds {len(classes)} class folders; at least two are needed")
    size = image_size or _first_size(train or test, classes)

    def reader(place: Path | None) -> Callable[[], ImageSplit]:
        if place is None:
            raise MicronetError(f"{root} has no train/ folder, which this command needs")
        return partial(_read, place, classes, size)

    return DataSource(
        classes=classes,
        train=lambda: reader(train)(),
        test=reader(test),
        validation=reader(splits["val"]) if "val" in splits and "test" in splits else None,
        augment="crop-flip",
    )


def _read(place: Path, classes: list[str], size: int) -> ImageSplit:
    strangers = sorted(
        entry.name for entry in place.iterdir() if entry.is_dir() and entry.name[0] != "." and entry.name not in classes
    )
    if strangers:
        raise MicronetError(f"{place} has classes that the training images lack: {', '.join(strangers[:5])}")
    found = [(str(path), label) for label, name in enumerate(classes) for path in list_images(place / name)]
    empty = set(range(len(classes))) - {label for _, label in found}
    if found and empty and place.name == "train":
        raise MicronetError(
            f"{place} has classes without images: {', '.join(classes[label] for label in sorted(empty))}"
        )
    if not found:
        flat = f"images, but not in folders named by their class as {place.parent / 'train'} has them"
        none = f"no images ({', '.join(sorted(SUFFIXES))})"
        raise MicronetError(f"{place} holds {flat if list_images(place) else none}")
    labels = torch.tensor([label for _, label in found])
    return FileSplit.of([path for path, _ in found], labels, size)


def _first_size(place: Path, classes: list[str]) -> int:
    for path in itertools.chain.from_iterable(list_images(place / name) for name in classes):
        try:
            with Image.open(path) as image:
                width, height = image.size
        except OSError as error:
            raise MicronetError(f"{path} cannot be read as an image ({error}); mend it or take it away") from error
        if width != height:
            raise MicronetError(f"{path} is {width}x{height}; say how large a square to cut with --image-size")
        return width
    raise MicronetError(f"{place} holds no images ({', '.join(sorted(SUFFIXES))})")
