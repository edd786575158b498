"""Batches of a split: shuffled, augmented and normalised on whole uint8 tensors.

Every epoch's order and augmentation follow from (seed, epoch) alone, however many processes decode the images, which is
what makes a resumed training end bit-identical.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from micronet.data.dataset import DataSpec
from micronet.data.split import Split
from micronet.data.views import Views
from micronet.errors import MicronetError

MOST_EVALUATED, FEWEST_EVALUATED = 256, 16  # images a batch; more are no faster on a CPU
EVALUATION_PIXELS = 2**21  # a batch: large images in fewer, so that a deep network's maps stay below a few gigabytes
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Normalize:
    """Turns uint8 images into the float32 input a network expects."""

    mean: Tensor
    std: Tensor

    @classmethod
    def from_spec(cls, spec: DataSpec, device: torch.device = CPU) -> "Normalize":
        """Build it from a spec whose mean and std are known."""
        if spec.mean is None or spec.std is None:
            raise ValueError("the spec has no mean and std")
        return cls(torch.tensor(spec.mean, device=device), torch.tensor(spec.std, device=device))

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
    split: Split, spec: DataSpec, batch_size: int, *, seed: int, epoch: int, device: torch.device = CPU
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield augmented (images, labels) of one epoch; the last, smaller batch too unless it holds one image.

    How an image is augmented follows from (seed, epoch, its index) alone. On a GPU a batch is copied from pinned memory
    as bytes while the one before is in use, and augmented and normalised there.
    """
    generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
    order = torch.randperm(len(split), generator=generator)
    views = Views.draw(split, spec.augment, generator)
    batches = [indices for indices in torch.split(order, batch_size) if len(indices) > 1 or len(order) == 1]
    normalize = Normalize.from_spec(spec, device)

    def prepare(images: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        if device.type == "cuda":
            images = images.pin_memory().to(device, non_blocking=True)
        seen = images if views is None else views.of(indices).apply(images)
        return normalize(seen), split.labels[indices].to(device)

    prepared = map(prepare, split.stream(batches), batches)
    return prepared if device.type == "cpu" else _ahead(prepared)


def plain_batches(split: Split, spec: DataSpec, batch_size: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (images, labels) in order, never augmented; by default as many as fill a machine and fit its memory."""
    normalize = Normalize.from_spec(spec)
    _, height, width = split.image_shape
    fitting = max(FEWEST_EVALUATED, min(MOST_EVALUATED, EVALUATION_PIXELS // (height * width)))
    batches = torch.split(torch.arange(len(split)), batch_size or fitting)
    for indices, images in zip(batches, split.stream(batches), strict=True):
        yield normalize(images), split.labels[indices]


def batch_count(split: Split, batch_size: int) -> int:
    """Return how many batches ``training_batches`` yields an epoch."""
    whole, rest = divmod(len(split), batch_size)
    return whole + (1 if rest > 1 or (rest == 1 and whole == 0) else 0)


def _ahead(batches: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each batch when the copy of the next one has begun."""
    waiting = next(batches)
    for following in batches:
        yield waiting
        waiting = following
    yield waiting
