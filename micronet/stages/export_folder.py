"""The work of ``export`` for targets that are folders: write, open, compare with torch, time."""

from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import onnx

from micronet import registry
from micronet.core.files import files_in, temporary_folder
from micronet.core.folders import Folder
from micronet.errors import FailedError, first_line
from micronet.evaluation.latency import latencies
from micronet.evaluation.network import Network
from micronet.models.device import Inputs, as_arrays, head
from micronet.onnx.check import LARGEST_ROUNDED_ERROR, Agreement, compare_network, require_close
from micronet.onnx.export import with_pairs
from micronet.onnx.integer_words import describe, describe_saturation
from micronet.onnx.speed import without_quantizers
from micronet.runtimes.config import RuntimeOptions
from micronet.stages.export import agreeing, checked_inputs, explaining_noise, exported, require_image
from micronet.stages.stage import Context, Outcome
from micronet.tasks.task import CLASSIFICATION

if TYPE_CHECKING:
    from micronet.stages.export_target import Export


class FolderNetwork(Network, Protocol):
    """A network in a folder."""

    def integer_layers(self) -> dict[str, Any] | None:
        """Return what its runtime executes in integers, as ``integers.count_layers`` does; None if it is float."""


@runtime_checkable
class Streaming(Protocol):
    """A network whose runtime can compute several samples at a time."""

    def throughput(self, sample: Any) -> dict[str, Any]:
        """Return ``images_per_s`` and ``streams``."""


def export_folder(config: "Export", context: Context) -> Outcome:
    """Write a network for a target and compare it with torch.

    Returns:
        The folder; and ``classes``, ``error``, ``images`` and ``changed`` (see ``Agreement``), ``left_float``, and of a
        quantized network ``integers``: what its runtime executed in integers, and how fast; ``sizes`` and
        ``throughput`` where the target says them.

    Raises:
        MicronetError: The target lacks an operator, or its package is not installed.
        FailedError: Its outputs do not agree with torch's.
    """
    target = registry.load_object(registry.TARGETS[config.target])
    if not target.PAIRS:  # it runs what ``pack`` makes
        require_image(config, context.artifact, f"--target {config.target}")
    artifact, given = checked_inputs(config, context)
    (progress := context.progress).step("exporting", 0, 1)
    classes = not isinstance(given[0], Inputs) and (artifact.data or {}).get("task", CLASSIFICATION) == CLASSIFICATION
    rounds, fp16 = "quantize" in [each.stage for each in artifact.history], config.precision == "fp16"
    name = f"the network in {config.target}"

    def compare(proto: onnx.ModelProto) -> tuple[_Written, Agreement]:
        written = _write(config.target, proto, place, fp16=fp16)
        agreement = compare_network(artifact.model, written.network, given, classes=classes)
        try:
            require_close(agreement, name, rounds=rounds, classes=classes, fp16=fp16)
        except FailedError as error:
            causes = describe_saturation(written.network.integer_layers() or {})
            raise FailedError("; ".join([str(error), *causes])) from error
        return written, agreement

    with temporary_folder() as place, explaining_noise(artifact.model, given[0]):
        proto, ((folder, network, note), agreement) = agreeing(
            lambda gates: exported(artifact, given[0], progress, pairs=target.PAIRS, gates=gates), compare, progress
        )
        about: dict[str, Any] = {"target": config.target, **agreement._asdict(), "left_float": artifact.left_float}
        if "sizes" in note:
            about["sizes"] = note["sizes"]
        _check_order(network, given[0], name)
        if (integers := network.integer_layers()) is not None:
            if not (config.timing.skip_timing or context.temporary):
                plain = without_quantizers(proto if target.PAIRS else with_pairs(proto))
                integers |= _timed(config.target, network, plain, place, as_arrays(head(given[0], 1)))
            about["integers"] = {**integers, "words": describe(integers, target.TITLE)}
        if isinstance(network, Streaming) and not (config.timing.skip_timing or context.temporary):
            about["throughput"] = network.throughput(as_arrays(head(given[0], 1)))
        files = {str(path.relative_to(folder)): path.read_bytes() for path in files_in(folder)}
    return Outcome(Folder(files, note), about)


class _Written(NamedTuple):
    """A network in a folder, opened with one thread, and its note."""

    folder: Path
    network: FolderNetwork
    note: dict[str, Any]


def _write(name: str, proto: onnx.ModelProto, place: Path, *, fp16: bool = False) -> _Written:
    """Write a network for a target into a new folder in a place."""
    target, folder = registry.load_object(registry.TARGETS[name]), Path(mkdtemp(dir=place))
    note = {"target": name, **target.write(proto, folder, fp16=fp16)}
    return _Written(folder, target.open_folder(folder, note, RuntimeOptions(threads=1)), note)


def _check_order(network: FolderNetwork, inputs: Any, name: str) -> None:
    """Raise FailedError if a network's outputs for one sample depend on the batch that it computed before."""
    found = [network(as_arrays(each)) for each in (inputs, head(inputs, 1))]  # the larger batch first
    several, one = (each if isinstance(each, list) else [each] for each in found)
    for own, other in zip((each[:1] for each in several), one, strict=True):
        if np.abs(own - other).max() > LARGEST_ROUNDED_ERROR * np.abs(own).max():
            raise FailedError(f"{name} computes one sample wrongly after a batch of several; nothing was written")


def _timed(name: str, network: FolderNetwork, plain: onnx.ModelProto, place: Path, sample: Any) -> dict[str, Any]:
    """Time a network and the float one in turns, with one thread and one sample, as ``speed.measure_speed`` does."""
    try:
        floats = _write(name, plain, place)
        ours, theirs = (found.p50_ms for found in latencies([network, floats.network], [sample, sample]))
    except Exception as error:  # a courtesy: whatever a runtime raises must not spoil the export
        return {"skipped": first_line(error)}
    return {"int8_ms": round(ours, 4), "float_ms": round(theirs, 4)}
