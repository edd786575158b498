"""Images to calibrate on, drawn from the training images or a folder. Imports torch, so import it late."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from micronet.data.batches import eval_batches
from micronet.data.dataset import Dataset
from micronet.data.image_files import FileSplit, list_images
from micronet.data.split import ImageSplit, random_subset
from micronet.errors import MicronetError
from micronet.quantization.calibration_config import RangeConfig

BATCH = 64


def calibration_batches(
    dataset: Dataset, config: RangeConfig, seed: int, device: torch.device | None = None
) -> Iterator[Tensor]:
    """Yield batches of images (N, C, H, W), never augmented, to calibrate on."""
    split: ImageSplit = dataset.train if config.calib_data is None else _folder(config.calib_data, dataset)
    for inputs, _ in eval_batches(random_subset(split, config.calib_batches * BATCH, seed), dataset.spec, BATCH):
        yield inputs.to(device)


def _folder(place: Path, dataset: Dataset) -> ImageSplit:
    paths = list_images(place) if place.is_dir() else []
    if not paths:
        raise MicronetError(f"--calib-data {place} is not a folder that contains images")
    return FileSplit(paths, torch.zeros(len(paths), dtype=torch.int64), dataset.spec.image_size or 0)
