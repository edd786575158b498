"""Images with masks, one class number per pixel: ``train/images/NAME.jpg`` and ``train/masks/NAME.png``.

``val`` is the validation split if there is also a ``test``; otherwise it is the test split. A folder with ``images/``
and ``masks/`` alone is split at random. A mask travels as a last channel of its image, so every augmentation moves
both; it is stored as 255 - class, so the black edge of a shifted image is ignored.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from micronet.core.image_size import ImageSize, sides, size_of
from micronet.data.dataset import DataSource
from micronet.data.folder import square_size
from micronet.data.image_files import cover, decode, list_images, open_image, upright_size
from micronet.data.split import ImageSplit, channels_first, random_subset
from micronet.errors import MicronetError

IGNORED = 255  # the class of pixels without one, as in Pascal VOC and Cityscapes
TEST_SHARE = 0.2
PARTS = ("train", "val", "test")
MODES = ("L", "P", "I", "I;16", "1")  # Pillow's modes with one integer per pixel
LABELS = ("masks", "labels")  # names of the folder of masks


class Pair(NamedTuple):
    """The files of an image and its mask."""

    image: Path
    label: Path


class MaskSplit(ImageSplit):
    """Files of images and masks, decoded when they are first needed."""

    def __init__(self, pairs: Sequence[Pair], size: ImageSize, channels: int, classes: int = IGNORED) -> None:
        self._pairs, self._size, self._classes = list(pairs), size, classes
        self.image_shape = (channels, *sides(size))
        self.labels = torch.zeros(len(pairs), dtype=torch.int64)
        self._pixels: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self._pairs)

    def subset(self, indices: Tensor) -> "MaskSplit":
        """Return the images at ``indices``, with their masks, as a split."""
        split = MaskSplit([self._pairs[int(i)] for i in indices], self._size, self.image_shape[0], self._classes)
        split._pixels = {new: self._pixels[int(old)] for new, old in enumerate(indices) if int(old) in self._pixels}
        return split

    def fingerprint(self) -> str:
        """Return the names of the images."""
        return " ".join(image.name for image, _ in self._pairs)

    def stream(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield the images of each batch of indices, each with 255 - its mask as a last channel."""
        for indices in batches:
            yield channels_first(torch.stack([self._decode(int(index)) for index in indices]))

    def separate(self, pixels: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images (B, C, H, W) uint8 and the masks (B, H, W) int64 of what ``stream`` yielded."""
        return pixels[:, :-1], 255 - pixels[:, -1].long()

    def _decode(self, index: int) -> Tensor:
        if index not in self._pixels:
            image, mask = self._pairs[index]
            _check_sizes(image, mask)
            pixels, classes = decode(image, self._size), read_mask(mask, self._size)
            if (highest := _highest(classes)) >= self._classes:
                raise MicronetError(
                    f"{mask} has class {highest}; expected 0 to {self._classes - 1}, as in the training masks or "
                    f"classes.txt, or {IGNORED} for ignored pixels"
                )
            if self.image_shape[0] == 1:
                pixels = pixels[:, :, :1]
            self._pixels[index] = torch.cat([pixels, 255 - classes[:, :, None]], 2)
        return self._pixels[index]


def open_masks(root: Path, image_size: ImageSize | None) -> DataSource:
    """Open a folder of images and masks; without an image size, use the first image's, which must then be square."""
    if not root.is_dir():
        raise MicronetError(f"--task segmentation needs a folder with images/ and masks/, but {root} is not a folder")
    splits = {name: root / name for name in PARTS if (root / name).is_dir()}
    if not splits:
        whole = _read(root, image_size)
        names = _class_names(root, whole)
        order = random_subset(whole, len(whole), seed=0)
        tested = max(1, round(len(whole) * TEST_SHARE))
        train, test = order.subset(torch.arange(tested, len(whole))), order.subset(torch.arange(tested))
        return DataSource(lambda: train, lambda: test, names, augment="crop-flip")
    tested_in = splits.get("test") or splits.get("val")
    if tested_in is None or "train" not in splits:
        raise MicronetError(f"{root} needs train/ and test/ (or val/), each with images/ and masks/")
    first = _read(splits["train"], image_size)
    size, names = size_of(*first.image_shape[1:]), _class_names(root, first)
    return DataSource(
        train=lambda: first,
        test=partial(_read, tested_in, size, len(names)),
        classes=names,
        validation=partial(_read, splits["val"], size, len(names)) if "val" in splits and "test" in splits else None,
        augment="crop-flip",
    )


def list_pairs(folder: Path) -> list[Pair]:
    """Pair ``images/NAME.jpg`` with ``masks/NAME.png``; raise MicronetError if an image has no mask."""
    names = [name for name in LABELS if (folder / name).is_dir()]
    lacking = [*([] if (folder / "images").is_dir() else ["images/"]), *([] if names else [f"{LABELS[0]}/"])]
    if lacking:
        raise MicronetError(
            f"{folder} has no {' and no '.join(lacking)}; segmentation reads images/NAME.jpg and masks/NAME.png"
        )
    place = folder / (names[0] if names else LABELS[0])
    masks = {path.stem: path for path in list_images(place)}
    images = list_images(folder / "images")
    if not images:
        raise MicronetError(f"{folder / 'images'} contains no images; expected images/NAME.jpg and masks/NAME.png")
    missing = [path for path in images if path.stem not in masks]
    if missing:
        raise MicronetError(f"{missing[0]} has no mask; expected {place / missing[0].stem}.png")
    return [Pair(path, masks[path.stem]) for path in images]


def read_mask(path: Path, size: ImageSize) -> Tensor:
    """Read a mask as (H, W) uint8, resized without mixing classes, then cropped like its image."""
    whole = Image.fromarray(_read_classes(path).numpy())
    return torch.from_numpy(np.array(cover(whole, size, Image.Resampling.NEAREST)))


def _read_classes(path: Path) -> Tensor:
    """Read the classes of a mask file, (H, W) uint8."""
    with open_image(path) as image:
        if image.mode not in MODES:
            raise MicronetError(
                f"{path} is not a mask: its pixel format is {image.mode}; expected one integer per pixel"
            )
        if image.format in ("JPEG", "MPO"):
            raise MicronetError(f"{path} is a JPEG, whose compression changes class numbers; save masks as PNG")
        classes = np.array(image).astype(np.int64)
        if classes.max(initial=0) > IGNORED or classes.min(initial=0) < 0:
            raise MicronetError(f"{path} has class {classes.max()}; expected 0 to 254, or 255 for ignored pixels")
        return torch.from_numpy(classes.astype(np.uint8))


def find_class(root: Path, least: int) -> str | None:
    """Return "FILE has class N" of a mask with a class of at least ``least`` in a folder of masks, or None."""
    places = [place for place in (root, *(root / part for part in PARTS)) if (place / "images").is_dir()]
    for place in places:
        for _, mask in list_pairs(place):
            if (highest := _highest(_read_classes(mask))) >= least:
                return f"{mask} has class {highest}"
    return None


def _check_sizes(image: Path, mask: Path) -> None:
    """Raise MicronetError if an image, turned upright, and its mask have different sizes."""
    height, width = upright_size(image)
    with open_image(mask) as opened:
        if opened.size != (width, height):
            raise MicronetError(
                f"{mask} has {opened.height}x{opened.width} pixels (height x width), but its image {image} has "
                f"{height}x{width}; resize the mask with nearest-neighbor interpolation"
            )


def _highest(classes: Tensor) -> int:
    """Return the highest class of a mask, without ignored pixels."""
    return int(torch.where(classes == IGNORED, 0, classes).max())


def _read(folder: Path, image_size: ImageSize | None, classes: int = IGNORED) -> MaskSplit:
    pairs = list_pairs(folder)
    with open_image(pairs[0][0]) as image:
        mode = image.mode
    return MaskSplit(pairs, image_size or square_size(pairs[0].image), 1 if mode in ("L", "1", "I;16") else 3, classes)


def _class_names(root: Path, split: MaskSplit) -> list[str]:
    """Return the names in ``classes.txt``, a line for each class; without one, the numbers up to the masks' highest.

    Masks with higher classes are refused from now on.
    """
    listed = root / "classes.txt"
    if listed.is_file():
        names = [line.strip() for line in listed.read_text(encoding="utf-8").splitlines() if line.strip()]
    else:
        highest = max(_highest(read_mask(mask, size_of(*split.image_shape[1:]))) for _, mask in split._pairs)
        names = [str(number) for number in range(highest + 1)]
        if highest == 0:
            raise MicronetError(
                f"the masks in {root} have only class 0 and ignored pixels ({IGNORED}); store the number of its class "
                "in each pixel, for example 1 for a foreground"
            )
    split._classes = len(names)
    return names
