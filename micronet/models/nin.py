"""Network in network (Lin et al. 2013, arXiv:1312.4400), plain and grouped, as in the original micronet.

Eight convolution blocks and a ninth that scores the classes. The fourth convolution of ``nin`` is 5x5 (0.97 M
parameters, 0.22 GMACs at 3x32x32), that of ``nin_3x3`` 3x3 (0.67 M, 0.147 GMACs, the figures of published tables).
``nin_gc`` groups its convolutions and shuffles channels between them (0.59 M, 0.158 GMACs).
"""

from itertools import pairwise
from math import lcm
from typing import NamedTuple

from torch import Tensor, nn

from micronet.errors import MicronetError
from micronet.models.layers import ChannelShuffle, ConvBNReLU, flatten, initialise, scale_width

SMALLEST_IMAGE = 8  # pixels, so that a 3x3 convolution has input after two poolings


class Block(NamedTuple):
    """A convolution block: kernel size, groups, and the groups of a channel shuffle before it (1: no shuffle)."""

    kernel_size: int
    groups: int = 1
    shuffle: int = 1


_PLAIN = [Block(5), Block(1), Block(1), Block(5), Block(1), Block(1), Block(3), Block(1), Block(1)]
_GROUPED = [
    Block(5),
    Block(1, 2),
    Block(1, 2, 2),
    Block(3, 16, 2),
    Block(1, 4, 16),
    Block(1, 4, 4),
    Block(3, 32, 4),
    Block(1, 8, 32),
    Block(1),
]
_POOL_AFTER = (2, 5)  # block indices


class NiN(nn.Module):
    """A chain of convolution blocks with two max-pools and a global average pool."""

    def __init__(self, blocks: list[Block], widths: list[int], pool: nn.MaxPool2d, in_channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for index, (block, width) in enumerate(zip(blocks, widths, strict=True)):
            if block.shuffle > 1:
                layers.append(ChannelShuffle(block.shuffle))
            layers.append(ConvBNReLU(channels, width, block.kernel_size, groups=block.groups))
            if index in _POOL_AFTER:
                layers.append(nn.MaxPool2d(pool.kernel_size, pool.stride, pool.padding))
            channels = width
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) images -> (N, classes) scores."""
        return flatten(self.pool(self.features(x)))


def nin(
    num_classes: int = 10,
    in_channels: int = 3,
    image_size: int = 32,
    width: float = 1.0,
    widths: list[int] | None = None,
    conv4_kernel: int = 5,
) -> NiN:
    """Build the plain network; ``widths`` (eight numbers) overrides ``width``."""
    _check_image(image_size)
    widths = widths or [scale_width(channels, width) for channels in (192, 160, 96, 192, 192, 192, 192, 192)]
    _check_widths(_PLAIN, widths)
    blocks = [block._replace(kernel_size=conv4_kernel) if i == 3 else block for i, block in enumerate(_PLAIN)]
    return NiN(blocks, [*widths, num_classes], nn.MaxPool2d(3, 2, 1), in_channels)


def nin_3x3(
    num_classes: int = 10,
    in_channels: int = 3,
    image_size: int = 32,
    width: float = 1.0,
    widths: list[int] | None = None,
) -> NiN:
    """Build the plain network with a 3x3 fourth convolution."""
    return nin(num_classes, in_channels, image_size, width, widths, conv4_kernel=3)


def nin_gc(
    num_classes: int = 10,
    in_channels: int = 3,
    image_size: int = 32,
    width: float = 1.0,
    widths: list[int] | None = None,
) -> NiN:
    """Build the grouped network; each width is a multiple of the groups before and after it."""
    _check_image(image_size)
    if widths is None:
        full = (256, 256, 256, 512, 512, 512, 1024, 1024)
        widths = [scale_width(c, width, multiple) for c, multiple in zip(full, _multiples(_GROUPED), strict=True)]
    _check_widths(_GROUPED, widths)
    return NiN(_GROUPED, [*widths, num_classes], nn.MaxPool2d(2, 2), in_channels)


def _multiples(blocks: list[Block]) -> list[int]:
    """Return what each width, except the class count, must be a multiple of."""
    return [lcm(block.groups, after.groups, after.shuffle) for block, after in pairwise(blocks)]


def _check_widths(blocks: list[Block], widths: list[int]) -> None:
    multiples = _multiples(blocks)
    if len(widths) != len(multiples):
        raise MicronetError(f"widths has {len(widths)} numbers; this network needs {len(multiples)}")
    for index, (width, multiple) in enumerate(zip(widths, multiples, strict=True)):
        if width < 1 or width % multiple:
            raise MicronetError(f"width {index + 1} is {width}; allowed: positive multiples of {multiple}")


def _check_image(image_size: int) -> None:
    if image_size < SMALLEST_IMAGE:
        raise MicronetError(f"image size {image_size} is too small for nin; use --image-size {SMALLEST_IMAGE} or more")
