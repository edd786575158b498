"""Batches of a split: shuffled, augmented and normalised on whole uint8 tensors.

Random crops are one gather from a strided view of the padded batch, so augmentation costs less than a hundredth of a
training step on the images that fit in memory. Every epoch's order and augmentation follow from (seed, epoch) alone,
which is what makes a resumed training end bit-identical.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from micronet.data.dataset import DataSpec
from micronet.data.split import FileSplit, Split
from micronet.errors import MicronetError
from micronet.machine import usable_cores

CROP_PADDING_SHARE = 1 / 8  # 4 pixels of 32, as CIFAR's usual recipe
EVALUATION_BATCH = 256


@dataclass(frozen=True)
class Normalize:
    """Turns uint8 images into the float32 input a network expects."""

    mean: Tensor
    std: Tensor

    @classmethod
    def from_spec(cls, spec: DataSpec) -> "Normalize":
        """Build it from a spec whose mean and std are known."""
        if spec.mean is None or spec.std is None:
            raise ValueError("the spec has no mean and std")
        return cls(torch.tensor(spec.mean), torch.tensor(spec.std))

    def __call__(self, images: Tensor) -> Tensor:
        """(B, C, H, W) uint8 -> (B, C, H, W) float32 in channels-last memory: (x / 255 - mean) / std."""
        if images.shape[1] != len(self.mean):
            raise MicronetError(
                f"the network expects images of {len(self.mean)} channels, the data have {images.shape[1]}"
            )
        scale = (1 / (255 * self.std)).view(1, -1, 1, 1)
        shift = (-self.mean / self.std).view(1, -1, 1, 1)
        return images.to(torch.float32, memory_format=torch.channels_last).mul_(scale).add_(shift)


def training_batches(
    split: Split, spec: DataSpec, batch_size: int, *, seed: int, epoch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield augmented (images, labels) of one epoch; the last, smaller batch too unless it holds one image."""
    generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
    order = torch.randperm(len(split), generator=generator)
    batches = [indices for indices in torch.split(order, batch_size) if len(indices) > 1 or len(order) == 1]
    normalize = Normalize.from_spec(spec)
    for images, labels in _read(split, batches):
        if spec.augment != "none":
            images = augment(images, generator, flip=spec.augment == "crop-flip")
        yield normalize(images), labels


def plain_batches(split: Split, spec: DataSpec, batch_size: int = EVALUATION_BATCH) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (images, labels) in order, never augmented."""
    normalize = Normalize.from_spec(spec)
    for images, labels in _read(split, list(torch.split(torch.arange(len(split)), batch_size))):
        yield normalize(images), labels


def augment(images: Tensor, generator: torch.Generator, *, flip: bool) -> Tensor:
    """Shift each image by up to an eighth of its side (black edges) and, with ``flip``, mirror half of them.

    images: (B, C, H, W) uint8; returns the same shape and dtype.
    """
    count, _, height, width = images.shape
    padding = round(height * CROP_PADDING_SHARE)
    windows = F.pad(images, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    top, left = torch.randint(2 * padding + 1, (2, count), generator=generator)
    cropped = windows[torch.arange(count), :, top, left]
    if not flip:
        return cropped
    mirrored = torch.rand(count, generator=generator) < 0.5
    return torch.where(mirrored.view(-1, 1, 1, 1), cropped.flip(-1), cropped)


def batch_count(split: Split, batch_size: int) -> int:
    """Return how many batches ``training_batches`` yields an epoch."""
    whole, rest = divmod(len(split), batch_size)
    return whole + (1 if rest > 1 or (rest == 1 and whole == 0) else 0)


def _read(split: Split, batches: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    if isinstance(split, FileSplit):
        loader: DataLoader[Any] = DataLoader(
            split,  # type: ignore[arg-type]  # a sequence is all that a DataLoader asks for
            batch_sampler=[indices.tolist() for indices in batches],
            num_workers=usable_cores(),
        )
        try:
            yield from loader
        except MicronetError as error:  # a worker's error carries its traceback in its text
            raise MicronetError(str(error).strip().splitlines()[-1].partition("MicronetError: ")[2]) from None
        return
    for indices in batches:
        yield split.images(indices), split.labels[indices]
