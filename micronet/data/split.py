"""A split of a data set: labelled uint8 images, in memory here, or in files (``image_files``)."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from micronet.core.image_size import ImageSize, cover_sides, sides


class Split(ABC):
    """Images or other samples, chosen by their indices. ``noun``: what messages call one of them."""

    noun: ClassVar[str]

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of samples."""

    @abstractmethod
    def subset(self, indices: Tensor) -> Any:
        """Return the samples at ``indices``, in that order, as a split."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a hash that changes with the choice of samples."""


S = TypeVar("S", bound=Split)


class ImageSplit(Split):
    """Labelled images."""

    noun = "image"
    labels: Tensor  # (N,) int64
    image_shape: tuple[int, int, int]  # (C, H, W) of every image

    def __len__(self) -> int:
        return len(self.labels)

    def fingerprint(self) -> str:
        """Return the hash of the labels."""
        return hashlib.sha256(self.labels.numpy().tobytes()).hexdigest()

    def separate(self, pixels: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images and the targets in what ``stream`` yielded for ``indices``, perhaps augmented."""
        return pixels, self.labels[indices]

    @abstractmethod
    def stream(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield the images (B, C, H, W) uint8 of each batch of indices (B,) int64, read ahead if that takes time."""

    @abstractmethod
    def subset(self, indices: Tensor) -> "ImageSplit":
        """Return the images at ``indices``, in that order, as a split."""

    def images(self, indices: Tensor) -> Tensor:
        """Return the images at ``indices`` (B,) int64 as (B, C, H, W) uint8."""
        return next(self.stream([indices]))


class MemorySplit(ImageSplit):
    """Images (N, C, H, W) uint8 in memory."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        _, channels, height, width = images.shape
        self.labels, self.image_shape = labels, (channels, height, width)
        self._pixels = images.permute(0, 2, 3, 1).contiguous()

    def stream(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield the images of each batch of indices."""
        for indices in batches:
            yield channels_first(self._pixels.index_select(0, indices))  # twice as fast as [indices]

    def subset(self, indices: Tensor) -> "MemorySplit":
        """Return the images at ``indices`` as a split."""
        return MemorySplit(self.images(indices), self.labels[indices])


def channels_first(pixels: Tensor) -> Tensor:
    """Return a (B, C, H, W) view of contiguous (B, H, W, C) pixels.

    Images of one channel get contiguous strides. Otherwise torch would take them for channels last, which
    ``models.device.memory_format`` rules out for some networks.
    """
    count, height, width, channels = pixels.shape
    return pixels.view(count, 1, height, width) if channels == 1 else pixels.permute(0, 3, 1, 2)


def random_subset(split: S, count: int, seed: int) -> S:
    """Return at most ``count`` samples, drawn at random: a folder's first images would all be of one class."""
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    chosen: S = split.subset(order[:count])
    return chosen


def resize(images: Tensor, size: ImageSize | None) -> Tensor:
    """Resize (N, C, H, W) uint8 images to cover a size, bilinear with antialiasing, then crop them at the centre."""
    if size is None or images.shape[-2:] == sides(size):
        return images
    height, width = images.shape[-2:]
    (rows, columns), (high, wide) = sides(size), cover_sides((height, width), size)
    resampled = F.interpolate(images.float(), (high, wide), mode="bilinear", antialias=True, align_corners=False)
    top, left = (high - rows) // 2, (wide - columns) // 2
    return resampled[..., top : top + rows, left : left + columns].round().clamp(0, 255).to(torch.uint8)
