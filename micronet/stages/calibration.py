"""Images to calibrate on, and statistics of them in a cache. Imports torch, so import it late."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from micronet.core.progress import Progress
from micronet.data.batches import eval_batches
from micronet.data.dataset import Dataset
from micronet.data.image_files import FileSplit, list_images
from micronet.data.split import ImageSplit, random_subset
from micronet.errors import MicronetError
from micronet.quantization.config import RangeConfig
from micronet.quantization.histogram import Statistics, load_statistics, save_statistics
from micronet.training.distributed import from_rank_zero

BATCH = 64


def calibration_batches(
    dataset: Dataset, config: RangeConfig, seed: int, device: torch.device | None = None
) -> Iterator[Tensor]:
    """Yield batches of images (N, C, H, W), never augmented, to calibrate on."""
    split: ImageSplit = dataset.train if config.calib_data is None else _folder(config.calib_data, dataset)
    for inputs, _ in eval_batches(random_subset(split, config.calib_batches * BATCH, seed), dataset.spec, BATCH):
        yield inputs.to(device)


def cached(
    cache: Path | None, depends_on: Iterable[bytes], collect: Callable[[], Statistics], progress: Progress
) -> Statistics:
    """Return statistics from a cache if it exists; otherwise collect them, and write the cache if one is named.

    Args:
        cache: The file.
        depends_on: The bytes of the network and of the inputs; a cache of others is refused.
        collect: Collects the statistics.
        progress: Where to report what is read or written.
    """
    if cache is None:
        return collect()
    digest = hashlib.sha256()
    for part in depends_on:
        digest.update(part)
    if from_rank_zero(cache.exists):
        progress.line(f"activation statistics from {cache}")
        return load_statistics(cache, digest.hexdigest())
    statistics = collect()
    from_rank_zero(lambda: save_statistics(statistics, cache, digest.hexdigest()))
    progress.line(f"wrote {cache}")
    return statistics


def _folder(place: Path, dataset: Dataset) -> ImageSplit:
    paths = list_images(place) if place.is_dir() else []
    if not paths:
        raise MicronetError(f"--calib-data {place} is not a folder that contains images")
    return FileSplit(paths, torch.zeros(len(paths), dtype=torch.int64), dataset.spec.image_size or 0)
