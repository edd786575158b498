"""One split of a data set: labelled uint8 images, in memory or decoded from files when asked for."""

from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

from micronet.errors import MicronetError


class Split(Protocol):
    """Labelled images. ``labels``: (N,) int64."""

    labels: Tensor

    def __len__(self) -> int:
        """Return N."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""

    @property
    def in_memory(self) -> bool:
        """Whether ``images`` is a mere look-up."""

    def images(self, indices: Tensor) -> Tensor:
        """Return the images at ``indices`` (B,) int64 as (B, C, H, W) uint8."""

    def subset(self, indices: Tensor) -> "Split":
        """Return the split of the given images, in the given order."""


def draw(split: Split, count: int, seed: int) -> Split:
    """Return ``count`` images (or all) drawn with a seed: a folder's first ones would all be of one class."""
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    return split.subset(order[:count])


class MemorySplit:
    """Images held as one (N, C, H, W) uint8 tensor."""

    in_memory = True

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self._images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        _, channels, height, width = self._images.shape
        return channels, height, width

    def images(self, indices: Tensor) -> Tensor:
        """Return the images at ``indices``."""
        return self._images[indices]

    def subset(self, indices: Tensor) -> "MemorySplit":
        """Return the split of the given images."""
        return MemorySplit(self._images[indices], self.labels[indices])


class FileSplit:
    """Image files, decoded, resized (short side) and centre-cropped to a square when asked for."""

    in_memory = False

    def __init__(self, paths: list[Path], labels: Tensor, image_size: int) -> None:
        self.paths = paths
        self.labels = labels
        self._size = image_size

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(3, size, size)."""
        return 3, self._size, self._size

    def images(self, indices: Tensor) -> Tensor:
        """Decode the images at ``indices``."""
        return torch.stack([decode(self.paths[index], self._size) for index in indices.tolist()])

    def subset(self, indices: Tensor) -> "FileSplit":
        """Return the split of the given files."""
        return FileSplit([self.paths[index] for index in indices.tolist()], self.labels[indices], self._size)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return one image and its label, for torch's DataLoader."""
        return decode(self.paths[index], self._size), self.labels[index]


def decode(path: Path, size: int) -> Tensor:
    """Read one image file as (3, size, size) uint8 RGB. Raises MicronetError where it is no readable image."""
    try:
        with Image.open(path) as image:
            rgb = _eight_bits(ImageOps.exif_transpose(image)).convert("RGB")
            if rgb.size != (size, size):
                rgb = _square(rgb, size)
            return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise MicronetError(f"{path} cannot be read as an image ({error}); mend it or take it away") from error


def resize(images: Tensor, size: int | None) -> Tensor:
    """Resample (N, C, H, W) uint8 images to ``size`` pixels a side, bilinear with antialiasing."""
    if size is None or images.shape[-2:] == (size, size):
        return images
    resampled = F.interpolate(images.float(), (size, size), mode="bilinear", antialias=True, align_corners=False)
    return resampled.round().clamp(0, 255).to(torch.uint8)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bits, which a plain conversion would clip to white; refuse float pixels."""
    if image.mode == "F":
        raise ValueError("its pixels are floats of unknown range")
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) // 257).astype(np.uint8))
    return image


def _square(image: Image.Image, size: int) -> Image.Image:
    width, height = image.size
    scale = size / min(width, height)
    wide, high = max(size, round(width * scale)), max(size, round(height * scale))
    left, top = (wide - size) // 2, (high - size) // 2
    return image.resize((wide, high), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))
