"""The network and the images of the device checks: tiny, but with every kind of layer that a device could break."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from micronet.artifact.artifact import Artifact
from micronet.data.dataset import Dataset, DataSource, DataSpec
from micronet.data.split import MemorySplit
from micronet.models.build import ModelSpec
from micronet.models.layers import Add
from micronet.tasks.classification import DEFAULT_TASK
from micronet.tasks.task import Task
from micronet.training.config import NO_HOOKS, RunContext, TrainConfig, TrainHooks
from micronet.training.loop import fit_artifact

FACTORY = "tests.devices.network:tiny"
DATA = "tests.devices.network:arrays"
CLASSES = ["dark", "red", "green", "blue"]
CPU = torch.device("cpu")
QUICK = TrainConfig(epochs=1, batch_size=16, lr=0.02, optimizer="sgd")  # Adam turns noise into steps of lr


class Tiny(nn.Module):
    """Three convolutions, one of them depthwise, with batch norms; a residual sum, a pool and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.conv3, self.bn3 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.add, self.relu2 = Add(), nn.ReLU(inplace=True)
        self.pool, self.average = nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1)
        self.fc1, self.relu3, self.fc2 = nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, len(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 8, 8) images -> (N, 4) scores."""
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(self.add(self.bn3(self.conv3(self.bn2(self.conv2(x)))), x))
        x = torch.flatten(self.average(self.pool(x)), 1)
        scores: Tensor = self.fc2(self.relu3(self.fc1(x)))
        return scores


def tiny() -> Tiny:
    """Build the network; the factory that artifacts of it name."""
    return Tiny()


@cache
def _noise() -> tuple[Tensor, Tensor]:
    """Return 96 images of coloured noise (N, 3, 8, 8) uint8, and their labels (N,)."""
    labels = torch.arange(96) % len(CLASSES)
    images = torch.randint(0, 160, (96, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    for index, label in enumerate(labels.tolist()):
        if label:
            images[index, label - 1] += 90
    return images.to(torch.uint8), labels


@cache
def dataset(task: Task = DEFAULT_TASK) -> Dataset:
    """Return the images as a data set: 64 to train on, 16 to validate, 16 to test."""
    images, labels = _noise()
    splits = [MemorySplit(images[part], labels[part]) for part in (slice(64), slice(64, 80), slice(80, 96))]
    source = DataSource(lambda: splits[0], lambda: splits[2], CLASSES, lambda: splits[1], augment="crop-flip")
    return Dataset(source, DataSpec(DATA, image_size=8, channels=3), task)


def arrays() -> dict[str, Any]:
    """Return the images as ``data="tests.devices.network:arrays"`` expects them."""
    images, labels = (tensor.numpy() for tensor in _noise())
    return {"x_train": images[:80], "y_train": labels[:80], "x_test": images[80:], "y_test": labels[80:]}


@cache
def _weights() -> dict[str, Tensor]:
    """Return the state of the network after a short training in plain torch, on the CPU."""
    torch.manual_seed(0)
    model, images, labels = tiny(), _images(), dataset().train.labels
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model.state_dict()


def _images() -> Tensor:
    split = dataset().train
    return split.images(torch.arange(len(split))).float() / 128 - 1


def trained(device: torch.device) -> nn.Module:
    """Return the network, trained, on a device."""
    model = tiny()
    model.load_state_dict(_weights())
    return model.to(device)


def batches(device: torch.device) -> list[Tensor]:
    """Return two batches of training images on a device."""
    return list(_images().to(device).split(32))


def fit(
    model: nn.Module, device: torch.device, folder: Path, config: TrainConfig = QUICK, hooks: TrainHooks = NO_HOOKS,
    **run: Any,
) -> Artifact:  # fmt: skip
    """Train a network by the product's own loop, its files in ``folder``."""
    context = RunContext(folder / "fitted.safetensors", device, force=not run.get("resume"), **run)
    return fit_artifact(artifact(model), dataset(), config, context, hooks)


def artifact(model: nn.Module) -> Artifact:
    """Return the artifact of a network, without a history."""
    return Artifact(model, ModelSpec(FACTORY), [])
