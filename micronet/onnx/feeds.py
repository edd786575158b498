"""The inputs that an ONNX model takes, and runs of it on images from a folder."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from micronet.core.image_size import size_of
from micronet.data.image_files import decode
from micronet.errors import MicronetError
from micronet.evaluation.network import Scores

Feed = dict[str, NDArray[Any]]  # an array for every input of a model, by name
CHANNELS = (1, 3, 4)
VALUES_AT_ONCE = 2**21  # of one input: all inner tensors of a run are in memory at the same time
MOST_ROWS = 64


@dataclass(frozen=True)
class Input:
    """One input of a model: its name, its type, and its sizes, None for those that are dynamic."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} ({', '.join('?' if size is None else str(size) for size in self.shape)})"


def inputs_of(proto: onnx.ModelProto) -> list[Input]:
    """Return the inputs of a model, without the stored tensors that old files also list."""
    stored = {tensor.name for tensor in proto.graph.initializer}
    found = []
    for entry in proto.graph.input:
        kind = entry.type.tensor_type
        if entry.name in stored:
            continue
        if not kind.elem_type:
            raise MicronetError(f"the model's input {entry.name} is not a tensor of a known type; export it again")
        sizes = tuple(dim.dim_value if dim.dim_value > 0 else None for dim in kind.shape.dim)
        found.append(Input(entry.name, np.dtype(helper.tensor_dtype_to_np_dtype(kind.elem_type)), sizes))
    return found


def batched(entry: Input, values: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Yield runs of rows: as many as a model takes at once or, if that is dynamic, as memory allows.

    A fixed batch size that does not divide the rows repeats the last row.
    """
    size = entry.shape[0] if entry.shape else None
    rows = size or max(1, min(MOST_ROWS, VALUES_AT_ONCE // max(1, values[:1].size)))
    for start in range(0, len(values), rows):
        part = values[start : start + rows]
        missing = rows - len(part) if size else 0
        yield np.concatenate([part, np.repeat(part[-1:], missing, 0)]) if missing else part


@dataclass(frozen=True)
class ImageInput:
    """How images become a model's input.

    Attributes:
        entry: The input.
        size: Channels, height and width.
        channels_last: The input is (N, H, W, C) instead of (N, C, H, W).
        mean: Per channel, of pixels scaled to 0..1; None for no normalization.
        std: Likewise.
    """

    entry: Input
    size: tuple[int, int, int]
    channels_last: bool = False
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None

    def read(self, paths: Sequence[Path]) -> Iterator[Feed]:
        """Yield runs of images from files, resized to cover the size and then cropped at the centre."""
        rows = next(batched(self.entry, np.broadcast_to(np.float32(0), (MOST_ROWS, *self.size))))
        channels, size = self.size[0], size_of(*self.size[1:])
        for start in range(0, len(paths), len(rows)):
            found = [decode(path, size, channels).numpy() for path in paths[start : start + len(rows)]]
            images: NDArray[np.float32] = np.stack(found).transpose(0, 3, 1, 2).astype(np.float32)
            yield from self.feeds(images / np.float32(255), normalized=False)

    def feeds(self, images: NDArray[np.float32], *, normalized: bool = True) -> Iterator[Feed]:
        """Yield runs of images (N, C, H, W) float32, normalized or else of pixels from 0 to 1."""
        mean, std = (np.array(each or [empty], np.float32).reshape(1, -1, 1, 1)
                     for each, empty in ((self.mean, 0.0), (self.std, 1.0)))  # fmt: skip
        if self.entry.dtype.kind == "u":
            pixels = images * std + mean if normalized else images
            images = np.clip(np.round(pixels * 255), 0, 255)
        elif not normalized:
            images = (images - mean) / std
        placed = images.transpose(0, 2, 3, 1) if self.channels_last else images
        for part in batched(self.entry, np.ascontiguousarray(placed, self.entry.dtype)):
            yield {self.entry.name: part}

    def predict(self, run: Callable[[Feed], Sequence[Any]], images: NDArray[np.float32]) -> Scores:
        """Return a model's output for normalized images, or its outputs, in as many runs as its batch size takes.

        ``run``: returns the model's outputs for a feed.
        """
        runs = [run(feed) for feed in self.feeds(images)]
        outputs = [np.concatenate(each)[: len(images)] for each in zip(*runs, strict=True)]
        return outputs[0] if len(outputs) == 1 else outputs


def is_channels_last(entry: Input, layout: str) -> bool:
    """Return whether an image input is (N, H, W, C): as ``layout`` says or, if it is auto, by the fixed sizes."""
    if layout != "auto":
        return layout == "nhwc"
    return entry.shape[1] not in CHANNELS and entry.shape[3] in CHANNELS


def image_size(entry: Input, given: tuple[int, int, int] | None, *, channels_last: bool) -> tuple[int, int, int]:
    """Return the channels, height and width of an image input; MicronetError if some are neither fixed nor given."""
    _, *own = (entry.shape[index] for index in ((0, 3, 1, 2) if channels_last else (0, 1, 2, 3)))
    sizes = [have or want for have, want in zip(own, given or (3, None, None), strict=True)]
    if given is not None and list(given) != sizes:
        raise MicronetError(f"--input-shape is {','.join(map(str, given))}, but the model takes {entry}; change it")
    if any(size is None for size in sizes):
        raise MicronetError(f"the model's input {entry} has no fixed size; pass it with --input-shape 3,HEIGHT,WIDTH")
    channels, height, width = (int(size or 0) for size in sizes)
    if channels not in CHANNELS:
        raise MicronetError(
            f"the model's input {entry} has {channels} channels, but images have 1, 3 or 4; pass its values as an "
            ".npz file with --calib-data, or change --layout"
        )
    return channels, height, width
