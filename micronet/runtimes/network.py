"""Open any network file as a predictor; what several runtimes need for that."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from micronet import registry
from micronet.core.files import FOLDER, NOTE, check_file_kind
from micronet.core.folders import read_note
from micronet.data.spec import DataSpec
from micronet.errors import MicronetError
from micronet.runtimes.config import RuntimeOptions

if TYPE_CHECKING:
    from micronet.evaluation.network import Network

MOST_OFF = 0.02  # of a step between two pixels; rounding in float32 leaves far less of it


def open_network(path: Path, options: RuntimeOptions) -> "Network":
    """Open a file with the runtime for its suffix; raise MicronetError if it is missing, damaged or of another kind."""
    check_file_kind(path, *registry.PREDICTORS, FOLDER)
    if path.is_dir():
        return _open_folder(path, options)
    if path.suffix not in registry.PREDICTORS:
        if not path.exists():
            raise MicronetError(f"{path} does not exist; check the path")
        kinds = ", ".join(registry.PREDICTORS)
        raise MicronetError(f"{path} is not a network file; expected {kinds} or a folder from micronet export")
    place = registry.PREDICTORS[path.suffix]
    if path.suffix == ".onnx":
        place = registry.ONNX_RUNTIMES[options.runtimes[0]]
    network: Network = registry.load_object(place)(path, options)
    return network


def _open_folder(path: Path, options: RuntimeOptions) -> "Network":
    """Open a folder that ``export`` wrote."""
    note = read_note(path)
    target = registry.TARGETS.get(note["target"], "")
    if not target.startswith("micronet."):
        raise MicronetError(f"{path} is for the target {note['target']}, which has no folders here; export it again")
    module = registry.load_object(target)
    if unlisted := [name for name in module.FILES if name not in note["files"]]:
        raise MicronetError(f"{path / unlisted[0]} is not listed in {path / NOTE}; export the network again")
    network: Network = module.open_folder(path, note, options)
    return network


def described(metadata: dict[str, Any]) -> tuple[DataSpec | None, Sequence[str]]:
    """Return the data and the stages that a file's metadata name."""
    data = metadata.get("data")
    stages = [str(record.get("stage")) for record in metadata.get("history") or []]
    return DataSpec.from_json(data) if data else None, stages


def to_pixels(images: NDArray[np.float32], spec: DataSpec) -> NDArray[np.uint8]:
    """Return the pixels, (N, C, H, W) uint8, of normalized images, for networks that normalize their input themselves.

    Raises MicronetError if the mean and standard deviation are not known, or if the images do not come from pixels.
    """
    if spec.std is None or spec.mean is None:
        raise MicronetError(
            "the model takes 8-bit pixels but does not record how to normalize its images; export it again with "
            "micronet export-onnx --embed-preprocessing"
        )
    std, mean = (np.array(values, np.float32).reshape(1, -1, 1, 1) for values in (spec.std, spec.mean))
    found = (images * std + mean) * 255
    pixels = found.round().clip(0, 255)
    if not (np.abs(found - pixels) <= MOST_OFF).all():  # NaN is not
        raise MicronetError(
            "the network takes 8-bit pixels, but these images are not (pixels / 255 - mean) / std of any; pass images "
            "that are, with the mean and std of the network's data, or export it to a target that takes floats "
            "(--target packed)"
        )
    return pixels.astype(np.uint8)
