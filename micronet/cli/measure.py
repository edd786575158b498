"""What ``evaluate`` and ``compare`` share: opening networks and data, measuring. Imports torch, so import it late."""

from dataclasses import replace
from pathlib import Path

from micronet.cli import console
from micronet.cli.options import DataOptions, ReportOptions
from micronet.cli.stages import open_like
from micronet.data.batches import plain_batches
from micronet.data.dataset import DataSpec
from micronet.errors import MicronetError
from micronet.evaluation import check_scores
from micronet.report import Row, compare
from micronet.runtime.network import Network, open_network
from micronet.runtime.options import RuntimeOptions


def measure(files: list[Path], data: DataOptions, runtime: RuntimeOptions, report: ReportOptions) -> list[Row]:
    """Open every network, the data the first one remembers (or that are named), and measure them all."""
    networks = [(file, open_network(file, runtime)) for file in files]
    like = next((network.data for _, network in networks if network.data), DataSpec())
    for file, network in networks:
        _check_same_input(file, network, like)
    dataset = open_like(data, replace(like, limit=None))  # a trial trains on few images; its test need not be so
    image, _ = next(plain_batches(dataset.test, dataset.spec, batch_size=1))
    for file, network in networks:
        check_scores(network, image, len(dataset.spec.classes or []), str(file))
    with console.progress(report.quiet or report.json) as progress:
        return compare(networks, dataset, progress)


def _check_same_input(file: Path, network: Network, like: DataSpec) -> None:
    """Raise MicronetError where a network wants its images prepared in another way than the first."""
    other = network.data
    if other is not None and (other.mean, other.std, other.image_size) != (like.mean, like.std, like.image_size):
        raise MicronetError(
            f"{file} expects other images (size {other.image_size}, mean {other.mean}) than the first file "
            f"(size {like.image_size}, mean {like.mean}); evaluate it on its own"
        )
