"""How each image of an epoch is seen: shifted a little and perhaps mirrored, on whole uint8 tensors.

A batch's crops are one gather from a strided view of the padded images, so that they cost less than a hundredth of a
training step.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from micronet.data.dataset import Augment
from micronet.data.split import Split

CROP_PADDING_SHARE = 1 / 8  # 4 pixels of 32, as CIFAR's usual recipe


@dataclass(frozen=True)
class Views:
    """How images are augmented: the window of the padded image that is seen, and whether it is mirrored.

    ``corners``: (B, 2) int64, top and left. ``mirrored``: (B,) bool, or None where no image is.
    """

    corners: Tensor
    mirrored: Tensor | None

    @classmethod
    def draw(cls, split: Split, augment: Augment, generator: torch.Generator) -> "Views | None":
        """Draw the views of all images of a split: shifts of up to an eighth of the side, half of them mirrored."""
        if augment == "none":
            return None
        corners = torch.randint(2 * _padding(split.image_shape[1]) + 1, (len(split), 2), generator=generator)
        return cls(corners, torch.rand(len(split), generator=generator) < 0.5 if augment == "crop-flip" else None)

    def of(self, indices: Tensor) -> "Views":
        """Return the views of some images."""
        return Views(self.corners[indices], None if self.mirrored is None else self.mirrored[indices])

    def apply(self, images: Tensor) -> Tensor:
        """Return (B, C, H, W) uint8 images as they are seen, black where a window leaves the image."""
        count, _, height, width = images.shape
        windows = F.pad(images, (_padding(height),) * 4).unfold(2, height, 1).unfold(3, width, 1)
        cropped = windows[torch.arange(count, device=images.device), :, self.corners[:, 0], self.corners[:, 1]]
        if self.mirrored is None:
            return cropped
        return torch.where(self.mirrored.view(-1, 1, 1, 1), cropped.flip(-1), cropped)


def _padding(side: int) -> int:
    return round(side * CROP_PADDING_SHARE)
