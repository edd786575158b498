"""Folders of images: ``train/<class>/*`` and ``test/<class>/*``.

``val`` is the validation split if there is also a ``test``; otherwise it is the test split.
"""

import itertools
from functools import partial
from pathlib import Path

import torch

from micronet.core.image_size import ImageSize
from micronet.data.dataset import DataSource
from micronet.data.image_files import SUFFIXES, FileSplit, are_grey, list_images, upright_size
from micronet.data.split import random_subset
from micronet.errors import MicronetError

TEST_SHARE = 0.25  # of images that come without parts


def open_folder(root: Path, image_size: ImageSize | None) -> DataSource:
    """Open a folder; without an image size, use the first image's, which must then be square."""
    splits = {name: root / name for name in ("train", "val", "test") if (root / name).is_dir()}
    test = splits.get("test") or splits.get("val")
    if test is None:
        raise MicronetError(f"{root} has no test/ or val/ folder; put the images into train/CLASS/ and test/CLASS/")
    described = splits.get("train", test)
    classes = _class_names(described)
    if len(classes) < 2:
        raise MicronetError(f"{described} must contain at least two class folders; found {len(classes)}")
    size = image_size or _first_size(described, classes)
    return DataSource(
        classes=classes,
        train=partial(_read, root / "train", classes, size),
        test=partial(_read, test, classes, size),
        validation=partial(_read, splits["val"], classes, size) if "val" in splits and "test" in splits else None,
        augment="crop-flip",
        is_grey=lambda: are_grey([path for name in classes for path in list_images(described / name)]),
    )


def open_unlabeled(root: Path, image_size: ImageSize | None) -> DataSource | None:
    """Open any folder of images, whose labels do not matter; return None if it holds none.

    ``train`` and ``test`` or ``val`` are used as they are; of other folders, a quarter of the images are for testing.
    """
    paths = list_images(root)
    if not paths:
        return None
    size = image_size or square_size(paths[0])
    parts = [list_images(root / name) for name in ("train", "test", "val") if (root / name).is_dir()]
    if len(parts) > 1:
        train, test = (_unlabeled(part, size) for part in parts[:2])
    else:
        whole = _unlabeled(paths, size)
        whole = random_subset(whole, len(whole), seed=0)
        tested = max(1, round(len(whole) * TEST_SHARE))
        train, test = whole.subset(torch.arange(tested, len(whole))), whole.subset(torch.arange(tested))
    return DataSource(lambda: train, lambda: test, is_grey=lambda: are_grey(paths))


def _unlabeled(paths: list[Path], size: ImageSize) -> FileSplit:
    return FileSplit(paths, torch.zeros(len(paths), dtype=torch.int64), size)


def _class_names(part: Path) -> list[str]:
    return sorted(entry.name for entry in part.iterdir() if entry.is_dir() and entry.name[0] != ".")


def _read(part: Path, classes: list[str], size: ImageSize) -> FileSplit:
    if not part.is_dir():
        raise MicronetError(f"{part.parent} has no train/ folder; put the training images into {part}/CLASS/")
    if unknown := set(_class_names(part)) - set(classes):
        raise MicronetError(
            f"{part} contains classes without training images: {', '.join(sorted(unknown)[:5])}; rename or remove "
            f"these folders, or add images to {part.parent / 'train'}"
        )
    found = [(str(path), label) for label, name in enumerate(classes) for path in list_images(part / name)]
    if not found and list_images(part):
        raise MicronetError(f"the images in {part} are not in class folders; move them to {part}/CLASS/")
    if not found:
        raise _no_images(part)
    empty = set(range(len(classes))) - {label for _, label in found}
    if empty and part.name == "train":
        raise MicronetError(
            f"{part} has empty class folders: {', '.join(classes[label] for label in sorted(empty))}; add images or "
            "remove the folders"
        )
    labels = torch.tensor([label for _, label in found])
    return FileSplit([path for path, _ in found], labels, size)


def _first_size(part: Path, classes: list[str]) -> int:
    for path in itertools.chain.from_iterable(list_images(part / name) for name in classes):
        return square_size(path)
    raise _no_images(part)


def square_size(path: Path) -> int:
    """Return the height and width of an image file; raise MicronetError if it is not square."""
    height, width = upright_size(path)
    if width != height:
        raise MicronetError(
            f"{path} is {height}x{width} (height x width), not square; add --image-size {height}x{width} to resize and "
            "crop all images to that size, or --image-size N for NxN"
        )
    return width


def _no_images(part: Path) -> MicronetError:
    return MicronetError(
        f"{part} has no images in its class folders; add some (supported file types: {', '.join(sorted(SUFFIXES))})"
    )
