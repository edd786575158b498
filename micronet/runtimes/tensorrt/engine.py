"""TensorRT engines run on an NVIDIA GPU. Untried on hardware: written against the API, tested with a fake of it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from micronet.data.dataset import DataSpec
from micronet.errors import FailedError, MicronetError, first_line
from micronet.evaluation.network import Scores
from micronet.runtimes.config import RuntimeOptions
from micronet.runtimes.pixels import to_pixels
from micronet.runtimes.tensorrt.about import REBUILD, library_of, read_about
from micronet.runtimes.tensorrt.gpu import gpu_number, open_gpu
from micronet.runtimes.tensorrt.library import logger

_NOT_OPENED = f"not opened; if it was made for another GPU, {REBUILD}"

Shape = tuple[int, ...]


class Range(NamedTuple):
    """The input shapes of one optimization profile, both ends included."""

    profile: int
    low: Shape
    high: Shape

    def holds_image(self, shape: Shape) -> bool:
        """Tell whether images of a shape (C, H, W) are within, whatever their number."""
        low, high = self.low[1:], self.high[1:]
        return len(shape) == len(low) and all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))

    def __str__(self) -> str:
        return " to ".join("x".join(map(str, shape)) for shape in dict.fromkeys((self.low, self.high)))


class Memory(NamedTuple):
    """A tensor's place: page-locked on the host, which copies faster, and on the GPU."""

    host: NDArray[Any]
    device: Any


class EnginePredictor:
    """An engine with its memory and one stream; ``runtime`` tells which of the two libraries made it.

    A batch larger than a profile's largest is run in parts, a smaller one than its smallest is filled up with zeros.
    """

    def __init__(self, path: Path, options: RuntimeOptions) -> None:
        self._path = path
        self.about = about = read_about(path)
        number = gpu_number(options.device, path)
        self._trt = library_of(path, about)
        self._log = logger(self._trt)
        self._cuda = open_gpu(number, path)
        with self._one_line():
            self.gpu = str(self._cuda.Device(number).name())
            self._stream = self._cuda.Stream()
            self._engine = self._opened()
            self._context = self._working(self._engine.create_execution_context(), "no room to run in")
        self._input, self._outputs = self._tensors()
        self.ranges = self._ranges()
        self._memory: dict[Shape, dict[str, Memory]] = {}
        self._prepared: Shape | None = None
        found = about.get("metadata") or {}
        self.runtime = str(about["backend"])
        self.data = DataSpec.from_json(found["data"]) if found.get("data") else None
        self.stages: Sequence[str] = [str(record.get("stage")) for record in found.get("history") or []]
        self.params = int(about.get("params") or 0)

    def __call__(self, images: Any) -> Scores:
        """Score images: (N, C, H, W) float32 -> the first output as float32, (N, K) or (N, K, h, w)."""
        scores = []
        with self._one_line():
            for part, fitting in self._parts(images):
                memory = self._copy_in(part, fitting)
                self._execute()
                output = memory[self._outputs[0]]
                self._cuda.memcpy_dtoh_async(output.host, output.device, self._stream)
                self._stream.synchronize()
                scores.append(output.host[: len(part)].astype(np.float32))
        return np.concatenate(scores)

    def device_ms(self, images: Any) -> float:
        """Return the milliseconds that the GPU computes on images (N, C, H, W), by CUDA events, copies left out."""
        start, end = self._cuda.Event(), self._cuda.Event()
        spent = 0.0
        with self._one_line():
            for part, fitting in self._parts(images):
                self._copy_in(part, fitting)
                start.record(self._stream)
                self._execute()
                end.record(self._stream)
                end.synchronize()
                spent += float(start.time_till(end))
        return spent

    def macs(self, image_shape: tuple[int, int, int]) -> int | None:
        """Return None: an engine does not tell."""
        return None

    def _opened(self) -> Any:
        self._log.clear()
        self._runtime = self._trt.Runtime(self._log)
        return self._working(self._runtime.deserialize_cuda_engine(self._path.read_bytes()), _NOT_OPENED)

    def _tensors(self) -> tuple[str, list[str]]:
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        modes = {name: self._engine.get_tensor_mode(name) for name in names}
        inputs = [name for name in names if modes[name] == self._trt.TensorIOMode.INPUT]
        if len(inputs) != 1:
            raise MicronetError(f"{self._path} has {len(inputs)} inputs; expected one, the images")
        return inputs[0], [name for name in names if modes[name] == self._trt.TensorIOMode.OUTPUT]

    def _ranges(self) -> list[Range]:
        fixed = tuple(self._engine.get_tensor_shape(self._input))
        if -1 not in fixed:
            return [Range(0, fixed, fixed)]
        found = []
        for index in range(self._engine.num_optimization_profiles):
            low, _, high = self._engine.get_tensor_profile_shape(self._input, index)
            found.append(Range(index, tuple(low), tuple(high)))
        return found

    def _parts(self, images: NDArray[np.float32]) -> Iterator[tuple[NDArray[np.float32], Range]]:
        """Cut a batch into what a profile takes at once."""
        fitting = [each for each in self.ranges if each.holds_image(images.shape[1:])]
        if not fitting:
            shape, ranges = "x".join(map(str, images.shape)), " or ".join(map(str, self.ranges))
            raise MicronetError(f"{self._path} is built for inputs of {ranges}, got {shape}; {REBUILD} --max-shape …")
        exact = [each for each in fitting if each.low[0] <= len(images) <= each.high[0]]
        chosen = exact[0] if exact else max(fitting, key=lambda each: each.high[0])
        for start in range(0, len(images), chosen.high[0]):
            yield images[start : start + chosen.high[0]], chosen

    def _copy_in(self, images: NDArray[np.float32], fitting: Range) -> dict[str, Memory]:
        memory = self._prepare((max(len(images), fitting.low[0]), *images.shape[1:]), fitting.profile)
        entry = memory[self._input]
        eight_bit = entry.host.dtype == np.uint8
        entry.host[: len(images)] = to_pixels(images, self.data or DataSpec()) if eight_bit else images
        entry.host[len(images) :] = 0
        self._cuda.memcpy_htod_async(entry.device, entry.host, self._stream)
        return memory

    def _prepare(self, shape: Shape, profile: int) -> dict[str, Memory]:
        """Tell the context the input's shape and where every tensor lies; the memory is kept for the next time."""
        if self._prepared != shape:  # a shape that two profiles hold stays in the one it is in
            self._prepared = None
            if self._context.active_optimization_profile != profile:
                handle = self._stream.handle
                self._working(self._context.set_optimization_profile_async(profile, handle), "profile refused")
            self._working(self._context.set_input_shape(self._input, shape), f"input shape {shape} refused")
            if shape not in self._memory:
                self._memory[shape] = {name: self._allocate(name) for name in (self._input, *self._outputs)}
            for name, place in self._memory[shape].items():
                self._working(self._context.set_tensor_address(name, int(place.device)), f"address of {name} refused")
            self._prepared = shape
        return self._memory[shape]

    def _allocate(self, name: str) -> Memory:
        shape, kind = tuple(self._context.get_tensor_shape(name)), self._engine.get_tensor_dtype(name)
        if -1 in shape:
            raise MicronetError(
                f"{self._path}: the shape of {name} depends on the images' contents; give it a fixed one"
            )
        try:
            dtype = self._trt.nptype(kind)
        except TypeError:
            raise MicronetError(f"{self._path}: {name} is {kind}, which NumPy lacks; make it float32") from None
        host = self._cuda.pagelocked_empty(shape, dtype)
        return Memory(host, self._cuda.mem_alloc(host.nbytes))

    def _execute(self) -> None:
        self._working(self._context.execute_async_v3(self._stream.handle), "the run failed")

    def _working(self, result: Any, otherwise: str) -> Any:
        """Return what a call gave. Raises FailedError with the library's own words where that is None or False."""
        if result is None or result is False:
            said = self._log.errors()
            raise FailedError(f"{self._path}: {otherwise}" + (f" ({said[-1]})" if said else ""))
        return result

    @contextmanager
    def _one_line(self) -> Iterator[None]:
        try:
            yield
        except self._cuda.Error as error:
            raise FailedError(f"{self._path}: {first_line(error)}") from error
