"""A split of a data set: labelled uint8 images, in memory or decoded from files on demand."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from micronet.data.image_files import ImageFiles, channels_first


class ImageSplit(Protocol):
    """Labelled images. ``labels``: (N,) int64."""

    labels: Tensor

    def __len__(self) -> int:
        """Return N."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""

    def images(self, indices: Tensor) -> Tensor:
        """Return the images at ``indices`` (B,) int64 as (B, C, H, W) uint8."""

    def stream(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield the images of each batch of indices, decoded ahead of their use if that takes time."""

    def subset(self, indices: Tensor) -> "ImageSplit":
        """Return the images at ``indices``, in that order, as a split."""


def random_subset(split: ImageSplit, count: int, seed: int) -> ImageSplit:
    """Return at most ``count`` images, drawn at random: a folder's first images would all be of one class."""
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    return split.subset(order[:count])


class MemorySplit:
    """Images (N, C, H, W) uint8 in memory."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self._pixels = images.permute(0, 2, 3, 1).contiguous()
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        _, height, width, channels = self._pixels.shape
        return channels, height, width

    def images(self, indices: Tensor) -> Tensor:
        """Return the images at ``indices``."""
        return channels_first(self._pixels.index_select(0, indices))  # twice as fast as [indices]

    def stream(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield the images of each batch of indices."""
        return map(self.images, batches)

    def subset(self, indices: Tensor) -> "MemorySplit":
        """Return the images at ``indices`` as a split."""
        return MemorySplit(self.images(indices), self.labels[indices])


class FileSplit:
    """Images decoded from files on demand. ``rows``: (N,) int64, their positions in ``files``."""

    def __init__(self, files: ImageFiles, rows: Tensor, labels: Tensor) -> None:
        self._files, self._rows, self.labels = files, rows, labels

    @classmethod
    def of(cls, paths: Sequence[Path | str], labels: Tensor, image_size: int) -> "FileSplit":
        """Build a split of all ``paths``."""
        return cls(ImageFiles(paths, image_size), torch.arange(len(paths)), labels)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(3, size, size)."""
        return 3, self._files.size, self._files.size

    @property
    def size_bytes(self) -> int:
        """Size of all decoded images."""
        return len(self) * 3 * self._files.size**2

    def images(self, indices: Tensor) -> Tensor:
        """Return the images at ``indices``, decoded in this process."""
        return self._files.read(self._rows[indices])

    def stream(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield the images of each batch of indices, decoded ahead by worker processes."""
        return self._files.stream([self._rows[indices] for indices in batches])

    def subset(self, indices: Tensor) -> "FileSplit":
        """Return the images at ``indices`` as a split, which shares this one's cache."""
        return FileSplit(self._files, self._rows[indices], self.labels[indices])

    def with_cache(self) -> "FileSplit":
        """Return the same images, each of which will be decoded only once."""
        return FileSplit(self._files.with_cache(self._rows), torch.arange(len(self)), self.labels)


def resize(images: Tensor, size: int | None) -> Tensor:
    """Resize (N, C, H, W) uint8 images to (size, size), bilinear with antialiasing."""
    if size is None or images.shape[-2:] == (size, size):
        return images
    resampled = F.interpolate(images.float(), (size, size), mode="bilinear", antialias=True, align_corners=False)
    return resampled.round().clamp(0, 255).to(torch.uint8)
