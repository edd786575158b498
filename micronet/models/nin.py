"""Network in network (Lin et al. 2013, arXiv:1312.4400), plain and grouped, as in the original micronet.

The fourth convolution of ``nin`` is 5x5 (0.97 M parameters, 0.22 GMACs at 3x32x32), that of ``nin_3x3`` 3x3 (0.67 M,
0.147 GMACs, the figures of published tables). ``nin_gc`` has grouped convolutions (0.59 M, 0.158 GMACs).
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from math import lcm

from torch import Tensor, nn

from micronet.core.image_size import ImageSize
from micronet.errors import MicronetError, count
from micronet.models.layers import ChannelShuffle, ConvBNReLU, check_image_size, flatten, initialise, scale_width

SMALLEST_IMAGE = 8  # pixels, so that a 3x3 convolution has input after two poolings
_WIDTHS = (192, 160, 96, 192, 192, 192, 192, 192)
_GROUPED_WIDTHS = (256, 256, 256, 512, 512, 512, 1024, 1024)
_GROUPS = (1, 2, 2, 16, 4, 4, 32, 8, 1)
_POOL_AFTER = (2, 5)  # convolution indices


class NiN(nn.Module):
    """Eight convolutions and a ninth that scores the classes, with two max-pools and a global average pool.

    Channels are shuffled between two grouped convolutions.

    Args:
        widths: The eight numbers of channels; overrides ``width``.
        full_widths: The numbers of channels at ``width`` 1.
        groups: The groups of the nine convolutions. A width is a multiple of the groups before and after it.
        pool: The kernel size, stride and padding of the max-pools.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: ImageSize = 32,
        width: float = 1.0,
        widths: list[int] | None = None,
        conv4_kernel: int = 5,
        *,
        full_widths: Sequence[int] = _WIDTHS,
        groups: Sequence[int] = (1,) * 9,
        pool: tuple[int, int, int] = (3, 2, 1),
    ) -> None:
        super().__init__()
        check_image_size(image_size, SMALLEST_IMAGE, "nin")
        multiples = [lcm(*pair) for pair in pairwise(groups)]
        widths = widths or [scale_width(full, width, m) for full, m in zip(full_widths, multiples, strict=True)]
        _check_widths(widths, multiples)
        channels = [in_channels, *widths, num_classes]
        layers: list[nn.Module] = []
        for index, kernel_size in enumerate((5, 1, 1, conv4_kernel, 1, 1, 3, 1, 1)):
            if index and min(groups[index - 1 : index + 1]) > 1:
                layers.append(ChannelShuffle(groups[index - 1]))
            layers.append(ConvBNReLU(channels[index], channels[index + 1], kernel_size, groups=groups[index]))
            if index in _POOL_AFTER:
                layers.append(nn.MaxPool2d(*pool))
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) images -> (N, classes) scores."""
        return flatten(self.pool(self.features(x)))


nin = NiN  # 0.97 M parameters, 0.22 GMACs at 3x32x32; eight of nine convolutions can be pruned
nin_3x3 = partial(NiN, conv4_kernel=3)  # 0.67 M parameters, 0.15 GMACs at 3x32x32; no 5x5 but the first
# 0.59 M parameters, 0.16 GMACs at 3x32x32; grouped convolutions with channel shuffles
nin_gc = partial(NiN, conv4_kernel=3, full_widths=_GROUPED_WIDTHS, groups=_GROUPS, pool=(2, 2, 0))


def _check_widths(widths: list[int], multiples: list[int]) -> None:
    if len(widths) != len(multiples):
        raise MicronetError(f"widths has {count(len(widths), 'entry')}; this network needs {len(multiples)}")
    for index, (width, multiple) in enumerate(zip(widths, multiples, strict=True)):
        if width < 1 or width % multiple:
            raise MicronetError(f"width {index + 1} is {width}; expected a positive multiple of {multiple}")
