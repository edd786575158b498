"""Batches of a split: shuffled, augmented and normalised as whole uint8 tensors.

The order and augmentation of an epoch depend only on (seed, epoch), however many processes decode the images, so a
resumed training ends bit-identical.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor
from torch.nn import functional as F

from micronet.core import ranks
from micronet.data.dataset import DataSpec, images_of, wrong_channels
from micronet.data.samples import SampleSplit
from micronet.data.split import Split, channels_first

CROP_PADDING_SHARE = 1 / 8  # of an image's height: 4 pixels of 32, the usual recipe for CIFAR
MAX_EVAL_BATCH, MIN_EVAL_BATCH = 256, 16  # images per batch; more than 256 are no faster on a CPU
EVAL_BATCH_PIXELS = 2**21  # large images come in smaller batches: a deep network's maps stay below a few GB
EVAL_BATCH_SAMPLES = 16  # for inputs that are not images: they may be large
CPU = torch.device("cpu")


class Normalize:
    """Turns uint8 images into a network's float32 input by the mean and std of its spec."""

    def __init__(self, spec: DataSpec, device: torch.device = CPU) -> None:
        mean, std = torch.tensor(spec.mean), torch.tensor(spec.std)
        self.scale, self.shift = (1 / (255 * std)).to(device), (-mean / std).to(device)

    def __call__(self, images: Tensor) -> Tensor:
        """(B, C, H, W) uint8 -> (B, C, H, W) float32 in channels-last memory: (x / 255 - mean) / std."""
        if images.shape[1] != len(self.scale):
            raise wrong_channels(len(self.scale), images.shape[1])
        normalised = images.contiguous(memory_format=torch.channels_last).float()
        count, channels, height, width = images.shape
        # Scaling whole rows is three times as fast as scaling pixels of a few channels.
        rows = normalised.permute(0, 2, 3, 1).view(count, height, width * channels)
        scale, shift = (each.expand(width, channels).flatten() for each in (self.scale, self.shift))
        rows.mul_(scale).add_(shift)
        return normalised


def train_batches(
    split: Split,
    spec: DataSpec,
    batch_size: int,  # over all ranks
    *,
    seed: int,
    epoch: int,
    start: int = 0,  # the first batch to yield; those before it are not read
    device: torch.device = CPU,
    flip: str = "random",  # or "alternating": a mirrored image is not mirrored in the next epoch
    cutout: int = 0,  # height and width of a grey square in each image
) -> Iterator[tuple[Any, Any]]:
    """Yield the augmented images (B, C, H, W) and labels (B,) of one epoch, or other samples as they are.

    With several ranks, each gets its part of every batch; together they see what a single process would. For a GPU,
    each batch is copied as bytes from pinned memory while the previous one is in use, and normalised there.
    """
    generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
    order = torch.randperm(len(split), generator=generator)
    sizes = batch_sizes(len(split), batch_size)
    if isinstance(split, SampleSplit):
        shards = [whole[ranks.shard(len(whole))] for whole in torch.split(order[: sum(sizes)], sizes)]
        return split.stream(shards[start:])
    split = images_of(split)
    augmentation, (_, height, width) = AUGMENTATIONS[spec.augment], split.image_shape
    drawn = [augmentation.draw(size, height, generator) for size in sizes]
    parts = [ranks.shard(size) for size in sizes]
    batches = [whole[part] for whole, part in zip(torch.split(order[: sum(sizes)], sizes), parts, strict=True)]
    own = [whole[:, part] for whole, part in zip(drawn, parts, strict=True)]
    if flip == "alternating" and mirrors(spec):
        turns = alternate(len(split), seed, epoch)
        own = [torch.cat([numbers[:-1], turns[None, indices]]) for numbers, indices in zip(own, batches, strict=True)]
    centres = [torch.randint(height, (2, size), generator=generator) for size in sizes]
    if width != height:  # images of HxH pixels get the numbers that earlier versions drew
        centres = [torch.stack([rows, columns * width // height]) for rows, columns in centres]
    holes = [whole[:, part] for whole, part in zip(centres, parts, strict=True)]
    normalize = Normalize(spec, device)

    def prepare(images: Tensor, indices: Tensor, transforms: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
        inputs, targets = split.separate(augmentation.apply(images, transforms), indices)
        if cutout:
            inputs = cut_out(inputs, centres, cutout, spec)
        if device.type == "cuda":
            inputs = inputs.pin_memory()
        return normalize(inputs.to(device, non_blocking=True)), targets.to(device)

    prepared = map(prepare, split.stream(batches[start:]), batches[start:], own[start:], holes[start:])
    return _one_ahead(prepared) if device.type == "cuda" else prepared


def eval_batches(
    split: Split, spec: DataSpec, batch_size: int | None = None, only: slice = slice(None)
) -> Iterator[tuple[Any, Any]]:
    """Yield images (B, C, H, W) and labels (B,), or other samples with their targets, in order, not augmented.

    The default ``batch_size`` keeps a CPU busy and fits in memory. ``only``: which of the batches to yield.
    """
    if isinstance(split, SampleSplit):
        yield from split.stream(torch.split(torch.arange(len(split)), batch_size or EVAL_BATCH_SAMPLES)[only])
        return
    split = images_of(split)
    normalize = Normalize(spec)
    _, height, width = split.image_shape
    fitting = max(MIN_EVAL_BATCH, min(MAX_EVAL_BATCH, EVAL_BATCH_PIXELS // (height * width)))
    batches = torch.split(torch.arange(len(split)), batch_size or fitting)[only]
    for indices, images in zip(batches, split.stream(batches), strict=True):
        inputs, targets = split.separate(images, indices)
        yield normalize(inputs), targets


def draw_transforms(count: int, height: int, generator: torch.Generator, *, flip: bool) -> Tensor:
    """Draw the augmentation of ``count`` images, (3, count) int64: top and left of the window, 1 to mirror it."""
    corners = torch.randint(2 * _padding(height) + 1, (2, count), generator=generator)
    mirrored = torch.rand(count, generator=generator) < 0.5 if flip else torch.zeros(count, dtype=torch.bool)
    return torch.cat([corners, mirrored[None].long()])


def augment(images: Tensor, transforms: Tensor) -> Tensor:
    """Shift each image by up to an eighth of its height, with black edges, and mirror some.

    One look-up of windows crops the whole batch, which costs less than 1 % of a training step. ``images``: (B, C, H, W)
    uint8, on the CPU; ``transforms``: (3, B) from ``draw_transforms``. The result has channels-last memory.
    """
    pixels = images.permute(0, 2, 3, 1).numpy()
    count, height, width, channels = pixels.shape
    top, left, mirrored = transforms.numpy()
    border = _padding(height)
    padded = np.zeros((count, height + 2 * border, width + 2 * border, channels), np.uint8)
    padded[:, border : border + height, border : border + width] = pixels
    rows = padded.reshape(count, height + 2 * border, (width + 2 * border) * channels)  # each row contiguous
    windows = sliding_window_view(rows, (height, width * channels), (1, 2))
    shifted = windows[np.arange(count), top, left * channels].reshape(pixels.shape)
    flipped = mirrored.nonzero()
    shifted[flipped] = torch.from_numpy(shifted[flipped]).flip(2).numpy()  # four times as fast as numpy's flip
    return channels_first(torch.from_numpy(shifted))


def mirrors(spec: DataSpec) -> bool:
    """Return True if some images of a data set are mirrored; the last number drawn for an image then says which."""
    return spec.augment.endswith("flip")


def alternate(count: int, seed: int, epoch: int) -> Tensor:
    """Return (count,) int64, 1 to mirror an image: a random half in odd epochs, the other half in even ones.

    From the second epoch on, each image has been seen both ways equally often (Jordan 2024, arXiv:2404.00498, 3.6).
    """
    first = torch.randint(2, (count,), generator=torch.Generator().manual_seed(seed))
    return first if epoch % 2 else 1 - first


def cut_out(images: Tensor, centres: Tensor, size: int, spec: DataSpec) -> Tensor:
    """Give each image a square of the mean colour (DeVries and Taylor 2017, arXiv:1708.04552).

    ``images``: (B, C, H, W) uint8; ``centres``: (2, B) rows and columns; ``size``: of the square, which may reach over
    the edges, in pixels.
    """
    size = min(size, 2 * max(images.shape[2:]))  # enough to cover an image from any centre
    rows, columns = (torch.arange(length) - centre[:, None] + size // 2 for length, centre in
                     zip(images.shape[2:], centres, strict=True))  # fmt: skip
    inside = [(offset >= 0) & (offset < size) for offset in (rows, columns)]
    hole = (inside[0][:, :, None] & inside[1][:, None, :])[:, None]
    colour = (255 * torch.tensor(spec.mean)).round().to(torch.uint8)
    return torch.where(hole, colour.view(1, -1, 1, 1), images)


def resized(batches: Iterable[tuple[Tensor, Tensor]], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches whose images (B, C, H, W) are scaled to a height of ``size`` pixels; 0: as they are."""
    for images, labels in batches:
        if size and images.shape[2] != size:
            width = max(1, round(images.shape[3] * size / images.shape[2]))
            images = F.interpolate(images, (size, width), mode="bilinear", antialias=True)
        yield images, labels


class Augmentation(NamedTuple):
    """Random changes of training images (B, C, H, W) uint8 of some height.

    ``draw(count, height, generator)`` returns numbers (K, count), and ``apply(images, numbers)`` the changed images.
    """

    draw: Callable[[int, int, torch.Generator], Tensor]
    apply: Callable[[Tensor, Tensor], Tensor]


AUGMENTATIONS = {
    "none": Augmentation(lambda count, height, generator: torch.empty(0, count), lambda images, numbers: images),
    "crop": Augmentation(partial(draw_transforms, flip=False), augment),
    "crop-flip": Augmentation(partial(draw_transforms, flip=True), augment),
}


def batch_sizes(images: int, batch_size: int) -> list[int]:
    """Return the number of images in each batch of an epoch, over all ranks.

    The last batch may be smaller. It is dropped if it has a single image, or fewer images than ranks, unless it is the
    only batch.
    """
    whole, rest = divmod(images, batch_size)
    keep_rest = rest >= max(2, ranks.world_size()) or (whole == 0 and rest > 0)
    return [batch_size] * whole + [rest] * keep_rest


def _one_ahead(batches: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each batch after the next one's copy has begun."""
    waiting = next(batches)
    for following in batches:
        yield waiting
        waiting = following
    yield waiting


def _padding(height: int) -> int:
    return round(height * CROP_PADDING_SHARE)
