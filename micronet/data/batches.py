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

from micronet import distributed
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
    split: Split, spec: DataSpec, batch_size: int, *, seed: int, epoch: int, start: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield augmented (images, labels) of one epoch from batch ``start`` on; those before are not read.

    Of several processes each gets its part of every batch, so that all together see what one alone would.
    """
    generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
    order = torch.randperm(len(split), generator=generator)
    sizes = batch_sizes(len(split), batch_size)
    flip, side = spec.augment == "crop-flip", split.image_shape[1]
    moves = [None if spec.augment == "none" else draw_moves(size, side, generator, flip=flip) for size in sizes]
    parts = [distributed.my_part(size) for size in sizes]
    indices = [whole[part] for whole, part in zip(torch.split(order[: sum(sizes)], sizes), parts, strict=True)]
    normalize = Normalize.from_spec(spec)
    batches = _read(split, indices[start:])
    for (images, labels), move, part in zip(batches, moves[start:], parts[start:], strict=True):
        yield normalize(images if move is None else augment(images, move[:, part])), labels


def plain_batches(split: Split, spec: DataSpec, batch_size: int = EVALUATION_BATCH) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (images, labels) in order, never augmented."""
    normalize = Normalize.from_spec(spec)
    for images, labels in _read(split, list(torch.split(torch.arange(len(split)), batch_size))):
        yield normalize(images), labels


def draw_moves(count: int, side: int, generator: torch.Generator, *, flip: bool) -> Tensor:
    """Draw how each of ``count`` images of ``side`` pixels moves: (3, count) top, left, and 1 where it is mirrored."""
    shifts = torch.randint(2 * _padding(side) + 1, (2, count), generator=generator)
    mirrored = torch.rand(count, generator=generator) < 0.5 if flip else torch.zeros(count, dtype=torch.bool)
    return torch.cat([shifts, mirrored[None].long()])


def augment(images: Tensor, moves: Tensor) -> Tensor:
    """Shift each image by up to an eighth of its side (black edges) and mirror those that ``moves`` says.

    images: (B, C, H, W) uint8; moves: (3, B) as ``draw_moves`` gives; returns the images' shape and dtype.
    """
    count, _, height, width = images.shape
    top, left, mirrored = moves
    windows = F.pad(images, (_padding(height),) * 4).unfold(2, height, 1).unfold(3, width, 1)
    cropped = windows[torch.arange(count), :, top, left]
    if not mirrored.any():
        return cropped
    return torch.where(mirrored.bool().view(-1, 1, 1, 1), cropped.flip(-1), cropped)


def batch_sizes(images: int, batch_size: int) -> list[int]:
    """Return how many images each batch of an epoch holds, over all processes.

    The last is smaller; it is left out where it holds one image, or not one for each process, unless it is the only
    one.
    """
    whole, rest = divmod(images, batch_size)
    kept = rest >= max(2, distributed.processes()) or (whole == 0 and rest > 0)
    return [batch_size] * whole + [rest] * kept


def _padding(side: int) -> int:
    return round(side * CROP_PADDING_SHARE)


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
