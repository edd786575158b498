"""What ``evaluate`` and ``compare`` share: opening networks and data, measuring. Imports torch, so import it late."""

from dataclasses import replace
from pathlib import Path

from micronet.cli import console
from micronet.cli.options import DataOptions, ReportOptions
from micronet.cli.stages import DEFAULT_DATA
from micronet.data.batches import plain_batches
from micronet.data.dataset import Dataset, DataSpec
from micronet.data.load import load_data
from micronet.errors import MicronetError
from micronet.report import Row, compare
from micronet.runtime.network import Network, open_network
from micronet.runtime.options import RuntimeOptions


def measure(files: list[Path], data: DataOptions, runtime: RuntimeOptions, report: ReportOptions) -> list[Row]:
    """Open every network, the data the first one remembers (or that are named), and measure them all."""
    networks = [(file, open_network(file, runtime)) for file in files]
    like = next((network.data for _, network in networks if network.data), DataSpec())
    for file, network in networks:
        _check_same_input(file, network, like)
    name = data.data or (None if like.name else DEFAULT_DATA)
    like = replace(like, limit=None)  # a trial's training was on few images; its test need not be
    dataset = load_data(name, image_size=data.image_size, limit=data.limit, like=like)
    for file, network in networks:
        _check_scores(file, network, dataset)
    with console.progress(report.quiet or report.json) as progress:
        return compare(networks, dataset, progress)


def _check_scores(file: Path, network: Network, data: Dataset) -> None:
    """Raise MicronetError where one test image does not go through a network to one score a class."""
    image, _ = next(plain_batches(data.test, data.spec, batch_size=1))
    try:
        shape = network(image.numpy()).shape
    except MicronetError:
        raise
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise MicronetError(f"{file} does not take images of shape {tuple(image.shape[1:])}: {reason}") from error
    classes = len(data.spec.classes or [])
    if shape != (1, classes):
        raise MicronetError(f"{file} gives scores of shape {shape[1:]} an image; the data have {classes} classes")


def _check_same_input(file: Path, network: Network, like: DataSpec) -> None:
    """Raise MicronetError where a network wants its images prepared in another way than the first."""
    other = network.data
    if other is not None and (other.mean, other.std, other.image_size) != (like.mean, like.std, like.image_size):
        raise MicronetError(
            f"{file} expects other images (size {other.image_size}, mean {other.mean}) than the first file "
            f"(size {like.image_size}, mean {like.mean}); evaluate it on its own"
        )
