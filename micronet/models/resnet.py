"""Residual networks (He et al. 2015, arXiv:1512.03385) with CIFAR's stem: one 3x3 convolution and no pool."""

from functools import partial

from torch import Tensor, nn

from micronet.models.layers import Add, flatten, scale_width


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = _shortcut(in_channels, channels, stride)
        self.add = Add()
        self.relu2 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, channels, H/stride, W/stride)."""
        out = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        joined: Tensor = self.relu2(self.add(out, self.shortcut(x)))
        return joined


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut; the last has four times the channels."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut = _shortcut(in_channels, out_channels, stride)
        self.add = Add()
        self.relu3 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, 4 * channels, H/stride, W/stride)."""
        out = self.relu2(self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x))))))
        joined: Tensor = self.relu3(self.add(self.bn3(self.conv3(out)), self.shortcut(x)))
        return joined


class ResNet(nn.Module):
    """A 3x3 stem and four groups of residual blocks; the last three groups halve the image size."""

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        depths: tuple[int, int, int, int],
        num_classes: int = 10,
        in_channels: int = 3,
        width: float = 1.0,
    ) -> None:
        super().__init__()
        widths = [scale_width(channels, width) for channels in (64, 128, 256, 512)]
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        channels = widths[0]
        groups: list[nn.Module] = []
        for index, (depth, group_width) in enumerate(zip(depths, widths, strict=True)):
            blocks = []
            for stride in (2 if index else 1, *[1] * (depth - 1)):
                blocks.append(block(channels, group_width, stride))
                channels = group_width * block.expansion
            groups.append(nn.Sequential(*blocks))
        self.layers = nn.Sequential(*groups)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) images -> (N, classes) scores."""
        x = self.layers(self.relu(self.bn1(self.conv1(x))))
        scores: Tensor = self.fc(flatten(self.pool(x)))
        return scores


resnet18 = partial(ResNet, BasicBlock, (2, 2, 2, 2))  # 11.2 M parameters, 0.56 GMACs at 3x32x32
resnet34 = partial(ResNet, BasicBlock, (3, 4, 6, 3))  # 21.3 M parameters, 1.16 GMACs at 3x32x32
resnet50 = partial(ResNet, Bottleneck, (3, 4, 6, 3))  # 23.5 M parameters, 1.30 GMACs at 3x32x32
resnet101 = partial(ResNet, Bottleneck, (3, 4, 23, 3))  # 42.5 M parameters, 2.51 GMACs at 3x32x32
resnet152 = partial(ResNet, Bottleneck, (3, 8, 36, 3))  # 58.2 M parameters, 3.72 GMACs at 3x32x32


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    convolution = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels))
