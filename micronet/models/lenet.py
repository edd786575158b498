"""A small LeNet (LeCun et al. 1998) of two 5x5 convolutions and two linear layers."""

from functools import partial

from torch import Tensor, nn

from micronet.core.image_size import ImageSize, sides
from micronet.errors import MicronetError
from micronet.models.layers import check_image_size, flatten, scale_width

SMALLEST_IMAGE = 16  # pixels, for two unpadded 5x5 convolutions, each followed by a pool


class LeNet(nn.Module):
    """Two convolutions and two linear layers, with pools, ReLUs, one dropout and optional batch norms.

    Args:
        widths: The channels of the convolutions and the features of the hidden layer; overrides ``width``.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 1,
        image_size: ImageSize = 28,
        width: float = 1.0,
        widths: list[int] | None = None,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        check_image_size(image_size, SMALLEST_IMAGE, "lenet")
        widths = widths or [scale_width(channels, width) for channels in (10, 20, 50)]
        if len(widths) != 3 or min(widths) < 1:
            raise MicronetError(f"widths is {widths}; lenet needs three positive integers")
        first, second, hidden = widths
        rows, columns = (((side - 4) // 2 - 4) // 2 for side in sides(image_size))
        self.conv1 = nn.Conv2d(in_channels, first, 5)
        self.bn1 = nn.BatchNorm2d(first) if batch_norm else nn.Identity()
        self.pool1 = nn.MaxPool2d(2)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(first, second, 5)
        self.bn2 = nn.BatchNorm2d(second) if batch_norm else nn.Identity()
        self.pool2 = nn.MaxPool2d(2)
        self.relu2 = nn.ReLU(inplace=True)
        self.fc1 = nn.Linear(second * rows * columns, hidden)
        self.bn3 = nn.BatchNorm1d(hidden) if batch_norm else nn.Identity()
        self.relu3 = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout()
        self.fc2 = nn.Linear(hidden, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) images -> (N, classes) scores."""
        x = self.relu1(self.pool1(self.bn1(self.conv1(x))))
        x = self.relu2(self.pool2(self.bn2(self.conv2(x))))
        x = self.dropout(self.relu3(self.bn3(self.fc1(flatten(x)))))
        scores: Tensor = self.fc2(x)
        return scores


lenet = LeNet  # two convolutions and two linear layers, 0.02 M parameters, for 28x28 grey images
# the same with batch norms, whose scales the bn-scale pruning criterion uses
lenet_bn = partial(LeNet, batch_norm=True)
