"""Batches of a split: shuffled, augmented and normalised on whole uint8 tensors.

One look-up of windows crops a whole batch, so augmentation costs less than a hundredth of a training step. Every
epoch's order and augmentation follow from (seed, epoch) alone, however many processes decode the images, which is what
makes a resumed training end bit-identical.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from micronet.core import ranks
from micronet.data.dataset import DataSpec
from micronet.data.image_files import channels_first
from micronet.data.split import ImageSplit
from micronet.errors import MicronetError

CROP_PADDING_SHARE = 1 / 8  # 4 pixels of 32, as CIFAR's usual recipe
MOST_EVALUATED, FEWEST_EVALUATED = 256, 16  # images a batch; more are no faster on a CPU
EVALUATION_PIXELS = 2**21  # a batch: large images in fewer, so that a deep network's maps stay below a few gigabytes
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Normalize:
    """Turns uint8 images into the float32 input a network expects: scale * x + shift, a number a channel each."""

    scale: Tensor
    shift: Tensor

    @classmethod
    def from_spec(cls, spec: DataSpec, device: torch.device = CPU) -> "Normalize":
        """Build it from a spec whose mean and std are known."""
        if spec.mean is None or spec.std is None:
            raise ValueError("the spec has no mean and std")
        mean, std = torch.tensor(spec.mean), torch.tensor(spec.std)
        return cls((1 / (255 * std)).to(device), (-mean / std).to(device))

    def __call__(self, images: Tensor) -> Tensor:
        """(B, C, H, W) uint8 -> (B, C, H, W) float32 in channels-last memory: (x / 255 - mean) / std."""
        if images.shape[1] != len(self.scale):
            raise MicronetError(
                f"the network expects images of {len(self.scale)} channels, the data have {images.shape[1]}"
            )
        normalised = images.contiguous(memory_format=torch.channels_last).float()
        count, channels, height, width = images.shape
        # Whole rows are scaled three times as fast as pixels of a few channels.
        rows = normalised.permute(0, 2, 3, 1).view(count, height, width * channels)
        scale, shift = (each.expand(width, channels).flatten() for each in (self.scale, self.shift))
        rows.mul_(scale).add_(shift)
        return normalised


def train_batches(
    split: ImageSplit,
    spec: DataSpec,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    start: int = 0,
    device: torch.device = CPU,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield augmented (images, labels) of one epoch from batch ``start`` on; those before are not read.

    Of several processes each gets its part of every batch, so that all together see what one alone would. On a GPU a
    batch is copied from pinned memory as bytes while the one before is in use, and normalised there.
    """
    generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
    order = torch.randperm(len(split), generator=generator)
    sizes = batch_sizes(len(split), batch_size)
    flip, side = spec.augment == "crop-flip", split.image_shape[1]
    moves = [None if spec.augment == "none" else draw_moves(size, side, generator, flip=flip) for size in sizes]
    parts = [ranks.shard(size) for size in sizes]
    batches = [whole[part] for whole, part in zip(torch.split(order[: sum(sizes)], sizes), parts, strict=True)]
    own = [move if move is None else move[:, part] for move, part in zip(moves, parts, strict=True)]
    normalize = Normalize.from_spec(spec, device)

    def prepare(images: Tensor, indices: Tensor, move: Tensor | None) -> tuple[Tensor, Tensor]:
        seen = images if move is None else augment(images, move)
        if device.type == "cuda":
            seen = seen.pin_memory()
        return normalize(seen.to(device, non_blocking=True)), split.labels[indices].to(device)

    prepared = map(prepare, split.stream(batches[start:]), batches[start:], own[start:])
    return _ahead(prepared) if device.type == "cuda" else prepared


def eval_batches(
    split: ImageSplit, spec: DataSpec, batch_size: int | None = None, turns: slice = slice(None)
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (images, labels) in order, never augmented; by default as many as fill a machine and fit its memory.

    ``turns``: which of the batches.
    """
    normalize = Normalize.from_spec(spec)
    _, height, width = split.image_shape
    fitting = max(FEWEST_EVALUATED, min(MOST_EVALUATED, EVALUATION_PIXELS // (height * width)))
    batches = torch.split(torch.arange(len(split)), batch_size or fitting)[turns]
    for indices, images in zip(batches, split.stream(batches), strict=True):
        yield normalize(images), split.labels[indices]


def draw_moves(count: int, side: int, generator: torch.Generator, *, flip: bool) -> Tensor:
    """Draw how each of ``count`` images of ``side`` pixels moves: (3, count) top, left, and 1 where it is mirrored."""
    shifts = torch.randint(2 * _padding(side) + 1, (2, count), generator=generator)
    mirrored = torch.rand(count, generator=generator) < 0.5 if flip else torch.zeros(count, dtype=torch.bool)
    return torch.cat([shifts, mirrored[None].long()])


def augment(images: Tensor, moves: Tensor) -> Tensor:
    """Shift each image by up to an eighth of its side (black edges) and mirror those that ``moves`` says.

    images: (B, C, H, W) uint8, on the CPU; moves: (3, B) as ``draw_moves`` gives; returns the images' shape and dtype,
    a pixel's channels side by side in memory.
    """
    pixels = images.permute(0, 2, 3, 1).numpy()
    count, height, width, channels = pixels.shape
    top, left, mirrored = moves.numpy()
    rim = _padding(height)
    framed = np.zeros((count, height + 2 * rim, width + 2 * rim, channels), np.uint8)
    framed[:, rim : rim + height, rim : rim + width] = pixels
    rows = framed.reshape(count, height + 2 * rim, (width + 2 * rim) * channels)  # each one run of bytes
    windows = sliding_window_view(rows, (height, width * channels), (1, 2))
    found = windows[np.arange(count), top, left * channels].reshape(pixels.shape)
    turned = mirrored.nonzero()
    found[turned] = torch.from_numpy(found[turned]).flip(2).numpy()  # numpy takes four times as long to flip
    return channels_first(torch.from_numpy(found))


def batch_sizes(images: int, batch_size: int) -> list[int]:
    """Return how many images each batch of an epoch holds, over all processes.

    The last is smaller; it is left out where it holds one image, or not one for each process, unless it is the only
    one.
    """
    whole, rest = divmod(images, batch_size)
    kept = rest >= max(2, ranks.world_size()) or (whole == 0 and rest > 0)
    return [batch_size] * whole + [rest] * kept


def _ahead(batches: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each batch when the copy of the next one has begun."""
    waiting = next(batches)
    for following in batches:
        yield waiting
        waiting = following
    yield waiting


def _padding(side: int) -> int:
    return round(side * CROP_PADDING_SHARE)
