"""What ``evaluate`` and ``compare`` share: opening networks and data, measuring. Imports torch, so import it late."""

from pathlib import Path
from typing import Any

from micronet.cli import console
from micronet.cli.options import DataOptions, ReportOptions
from micronet.cli.stages import open_to_test
from micronet.data.batches import eval_batches
from micronet.data.dataset import DataSpec
from micronet.errors import MicronetError
from micronet.evaluation.accuracy import check_scores
from micronet.evaluation.network import Network
from micronet.evaluation.report import Row, compare
from micronet.runtimes.config import RuntimeOptions
from micronet.runtimes.network import open_network


def measure(files: list[Path], data: DataOptions, runtime: RuntimeOptions, report: ReportOptions) -> list[Row]:
    """Open every network, the data the first one remembers (or that are named), and measure them all."""
    networks = [(file, open_network(file, runtime)) for file in files]
    like = _expected([network.data for _, network in networks if network.data])
    for file, network in networks:
        _check_same_input(file, network, like)
    dataset = open_to_test(data, like)
    image, _ = next(eval_batches(dataset.test, dataset.spec, batch_size=1))
    for file, network in networks:
        check_scores(network, image, len(dataset.spec.classes or []), str(file))
    with console.progress(report.quiet) as progress:
        return compare(networks, dataset, progress)


def _expected(specs: list[DataSpec]) -> DataSpec:
    """Return what the networks expect of their images: the first one's word, completed by those that know more."""
    known: dict[str, Any] = {}
    for spec in specs:
        known = {**{key: value for key, value in spec.to_json().items() if value is not None}, **known}
    return DataSpec(**known)


def _check_same_input(file: Path, network: Network, like: DataSpec) -> None:
    """Raise MicronetError where a network wants its images prepared in another way than the first."""
    for name in ("image_size", "mean", "std"):
        own = getattr(network.data, name, None)
        if own is not None and own != getattr(like, name):
            raise MicronetError(
                f"{file} expects images of {name} {own}, a file before it {getattr(like, name)}; evaluate it on its own"
            )
