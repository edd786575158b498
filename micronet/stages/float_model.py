"""A float ONNX file to quantize: where its inputs come from, and how images become inputs."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import onnx

from micronet.core.image_size import parse_size, sides, size_of
from micronet.data.dataset import Dataset, DataSpec
from micronet.data.load import load_data
from micronet.data.memory import MemoryData
from micronet.errors import MicronetError, count
from micronet.onnx.config import InputConfig
from micronet.onnx.feeds import ImageInput, image_size, inputs_of, is_channels_last
from micronet.runtimes.onnxruntime import metadata
from micronet.stages.config import DataConfig
from micronet.stages.onnx_files import is_raw


@dataclass(frozen=True)
class FloatModel:
    """A float ONNX model, its ``file`` (for messages), where its inputs come from, and how images become inputs."""

    proto: onnx.ModelProto
    file: Path
    data: DataConfig
    seed: int
    inputs: InputConfig = field(default_factory=InputConfig)

    @property
    def data_name(self) -> str | None:
        """The name of the model's data set, as given or remembered by the model; None if it is not known."""
        named: str | None = self.data.data or (metadata(self.proto).get("data") or {}).get("name")
        return named

    @property
    def has_data(self) -> bool:
        """Whether the model's data set is known."""
        return bool(self.data_name)

    @property
    def takes_arrays(self) -> bool:
        """Whether its data are arrays without labels; of remembered ones, whether or not they are still there."""
        remembered = metadata(self.proto).get("data") or {}
        return is_raw(self.data_name or "") or (self.data.data is None and bool(remembered.get("inputs")))

    def open_data(self) -> Dataset:
        """Open the data set; MicronetError if it is not known."""
        if not self.has_data:
            raise MicronetError(
                f"{self.file} does not record its data set; specify one with --data, or calibration inputs with "
                "--calib-data: a folder of images, or an .npz file with one array for each input"
            )
        remembered, image = metadata(self.proto).get("data"), self.image_input()
        like = DataSpec.from_json(remembered) if remembered else DataSpec(seed=self.seed)
        if self.inputs.mean is not None:
            mean, std = self.inputs.normalization
            like = replace(like, mean=mean, std=std)
        size = None if isinstance(self.data.data, MemoryData) else size_of(*image.size[1:])
        return load_data(self.data.data, image_size=size, limit=self.data.limit, like=like, task=self.data.task)

    def image_input(self, spec: DataSpec | None = None) -> ImageInput:
        """Return how images become the model's input; MicronetError if it does not take one image."""
        entries, config = inputs_of(self.proto), self.inputs
        if len(entries) != 1 or len(entries[0].shape) != 4:
            described = ", ".join(map(str, entries))
            raise MicronetError(
                f"the model has {count(len(entries), 'input')} ({described}), not one image; pass its inputs as an "
                ".npz file with --calib-data"
            )
        channels_last = is_channels_last(entries[0], config.layout)
        remembered = spec or DataSpec.from_json(metadata(self.proto).get("data"))
        asked = parse_size(self.data.image_size)
        given = config.shape or (None if asked is None else (remembered.channels or 3, *sides(asked)))
        size = image_size(entries[0], given, channels_last=channels_last)
        mean, std = config.normalization if config.mean is not None else (remembered.mean, remembered.std)
        return ImageInput(entries[0], size, channels_last, mean, std)
