"""Run TensorRT engines on an NVIDIA GPU. Untested on hardware so far: written to the API, tested with a fake of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from micronet.core.config import accepts
from micronet.core.files import file_hash
from micronet.core.parse import parse_json, read_text
from micronet.data.dataset import DataSpec
from micronet.errors import FailedError, MicronetError, count, first_line
from micronet.evaluation.network import Scores
from micronet.runtimes.config import RuntimeOptions
from micronet.runtimes.network import described, to_pixels
from micronet.runtimes.tensorrt.library import gpu_number, library, logger, open_gpu

REBUILD = "build it again with micronet trt-build"
REQUIRED = ("backend", "version", "engine_sha256")  # strings without which an engine cannot be run
_NOT_OPENED = f"the engine cannot be opened; if it was built for another GPU, {REBUILD}"
CACHED_SHAPES = 4  # input shapes whose buffers are kept: a batch size and its remainder, for two image sizes

Shape = tuple[int, ...]


class ShapeRange(NamedTuple):
    """The input shapes of one optimization profile, both ends included."""

    profile: int
    low: Shape
    high: Shape

    def holds_image(self, shape: Shape) -> bool:
        """Return True if images of a shape (C, H, W) are in the range, in any number."""
        low, high = self.low[1:], self.high[1:]
        return len(shape) == len(low) and all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))

    def __str__(self) -> str:
        return " to ".join("x".join(map(str, shape)) for shape in dict.fromkeys((self.low, self.high)))


class Buffer(NamedTuple):
    """A tensor's memory: page-locked on the host, which copies faster, and on the GPU."""

    host: NDArray[Any]
    device: Any


class EnginePredictor:
    """An engine with its buffers and one stream; ``runtime`` names the library that built it.

    A batch above a profile's maximum is run in parts; one below its minimum is padded with zeros.
    """

    def __init__(self, path: Path, options: RuntimeOptions) -> None:
        self._path = path
        self.about = about = _read_about(path)
        number = gpu_number(options.device, path)
        self._trt = _library_of(path, about)
        self._log = logger(self._trt)
        self._cuda = open_gpu(number, path)
        with self._cuda_errors():
            self.gpu = str(self._cuda.Device(number).name())
            self._stream = self._cuda.Stream()
            self._log.clear()
            self._runtime = self._trt.Runtime(self._log)
            self._engine = self._check(self._runtime.deserialize_cuda_engine(path.read_bytes()), _NOT_OPENED)
            self._context = self._check(
                self._engine.create_execution_context(), "not enough GPU memory to run the engine"
            )
        self._input, self._outputs = self._tensors()
        self.ranges = self._ranges()
        self._buffers: dict[Shape, dict[str, Buffer]] = {}  # the shape used last comes last
        self._prepared: Shape | None = None
        self.runtime = str(about["backend"])
        self.data, self.stages = described(about.get("metadata") or {})
        self.params = int(about.get("params") or 0)

    def __call__(self, images: Any) -> Scores:
        """Return the first output, (N, K) or (N, K, h, w) float32, for images (N, C, H, W) float32."""
        scores = []
        with self._cuda_errors():
            for part, shapes in self._parts(images):
                buffers = self._copy_in(part, shapes)
                self._execute()
                output = buffers[self._outputs[0]]
                self._cuda.memcpy_dtoh_async(output.host, output.device, self._stream)
                self._stream.synchronize()
                scores.append(output.host[: len(part)].astype(np.float32))
        return np.concatenate(scores)

    def device_ms(self, images: Any) -> float:
        """Return the GPU's computing time for images (N, C, H, W) in milliseconds, by CUDA events, without copies."""
        start, end = self._cuda.Event(), self._cuda.Event()
        spent = 0.0
        with self._cuda_errors():
            for part, shapes in self._parts(images):
                self._copy_in(part, shapes)
                start.record(self._stream)
                self._execute()
                end.record(self._stream)
                end.synchronize()
                spent += float(start.time_till(end))
        return spent

    def macs(self, *shapes: tuple[int, ...]) -> int | None:
        """Return None: an engine does not hold this figure."""
        return None

    def _tensors(self) -> tuple[str, list[str]]:
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        inputs = [name for name in names if self._engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT]
        if len(inputs) != 1:
            raise MicronetError(
                f"{self._path} has {count(len(inputs), 'input')}; micronet can only run engines with one input"
            )
        return inputs[0], [name for name in names if name not in inputs]

    def _ranges(self) -> list[ShapeRange]:
        fixed = tuple(self._engine.get_tensor_shape(self._input))
        if -1 not in fixed:
            return [ShapeRange(0, fixed, fixed)]
        count = self._engine.num_optimization_profiles
        profiles = [self._engine.get_tensor_profile_shape(self._input, index) for index in range(count)]
        return [ShapeRange(index, tuple(low), tuple(high)) for index, (low, _, high) in enumerate(profiles)]

    def _parts(self, images: NDArray[np.float32]) -> Iterator[tuple[NDArray[np.float32], ShapeRange]]:
        """Split a batch into parts that fit a profile, and yield each with the profile's shapes."""
        fitting = [each for each in self.ranges if each.holds_image(images.shape[1:])]
        if not fitting:
            shape, ranges = "x".join(map(str, images.shape)), " or ".join(map(str, self.ranges))
            raise MicronetError(
                f"{self._path} was built for inputs of {ranges}, but got {shape}; {REBUILD} and a "
                "shape range (--min-shape to --max-shape) that includes it"
            )
        exact = [each for each in fitting if each.low[0] <= len(images) <= each.high[0]]
        chosen = exact[0] if exact else max(fitting, key=lambda each: each.high[0])
        for start in range(0, len(images), chosen.high[0]):
            yield images[start : start + chosen.high[0]], chosen

    def _copy_in(self, images: NDArray[np.float32], shapes: ShapeRange) -> dict[str, Buffer]:
        buffers = self._prepare((max(len(images), shapes.low[0]), *images.shape[1:]), shapes.profile)
        entry = buffers[self._input]
        takes_pixels = entry.host.dtype == np.uint8
        entry.host[: len(images)] = to_pixels(images, self.data or DataSpec()) if takes_pixels else images
        entry.host[len(images) :] = 0
        self._cuda.memcpy_htod_async(entry.device, entry.host, self._stream)
        return buffers

    def _prepare(self, shape: Shape, profile: int) -> dict[str, Buffer]:
        """Set the context's input shape and tensor addresses; return the buffers for this shape."""
        if self._prepared != shape:  # a shape that two profiles hold stays in its profile
            self._prepared = None
            if self._context.active_optimization_profile != profile:
                handle = self._stream.handle
                self._check(
                    self._context.set_optimization_profile_async(profile, handle), "TensorRT rejected the profile"
                )
            self._check(self._context.set_input_shape(self._input, shape), f"TensorRT rejected the input shape {shape}")
            cached = shape in self._buffers
            self._buffers[shape] = self._buffers.pop(shape) if cached else self._allocate_all()
            for name, buffer in self._buffers[shape].items():
                self._check(
                    self._context.set_tensor_address(name, int(buffer.device)),
                    f"TensorRT rejected the address of {name}",
                )
            self._prepared = shape
        return self._buffers[shape]

    def _allocate_all(self) -> dict[str, Buffer]:
        """Allocate buffers for the context's input shape; first free those of the shape unused for longest."""
        if len(self._buffers) >= CACHED_SHAPES:
            self._stream.synchronize()  # nothing may still use them
            for buffer in self._buffers.pop(next(iter(self._buffers))).values():
                buffer.device.free()
        return {name: self._allocate(name) for name in (self._input, *self._outputs)}

    def _allocate(self, name: str) -> Buffer:
        shape, dtype = tuple(self._context.get_tensor_shape(name)), self._engine.get_tensor_dtype(name)
        if -1 in shape:
            raise MicronetError(
                f"{self._path}: the shape of {name} depends on the image contents; build the engine from a model "
                "whose output shapes depend only on the input shape"
            )
        try:
            host = self._cuda.pagelocked_empty(shape, self._trt.nptype(dtype))
        except TypeError:
            raise MicronetError(
                f"{self._path}: {name} is {dtype}, which NumPy does not support; build the engine from a float32 model"
            ) from None
        return Buffer(host, self._cuda.mem_alloc(host.nbytes))

    def _execute(self) -> None:
        self._check(self._context.execute_async_v3(self._stream.handle), "running the engine failed")

    def _check(self, result: Any, failure: str) -> Any:
        """Return the result of a call; raise FailedError with the library's last error if it is None or False."""
        if result is None or result is False:
            reason = f" ({self._log.errors[-1]})" if self._log.errors else ""
            raise FailedError(f"{self._path}: {failure}{reason}")
        return result

    @contextmanager
    def _cuda_errors(self) -> Iterator[None]:
        """Turn pycuda's errors into one line."""
        try:
            yield
        except self._cuda.Error as error:
            raise FailedError(f"{self._path}: {first_line(error)}") from error


def _read_about(path: Path) -> dict[str, Any]:
    """Read an engine's JSON file; raise MicronetError if either file is missing or damaged, or if they do not match."""
    if not path.exists():
        raise MicronetError(f"{path} does not exist; create it with micronet trt-build")
    beside = path.with_name(path.name + ".json")
    if not beside.exists():
        raise MicronetError(
            f"{path} needs its description {beside.name} in the same folder; copy both files, or {REBUILD}"
        )
    try:
        about = parse_json(read_text(beside))
    except ValueError:
        about = None
    if not isinstance(about, dict) or not _is_sound(about):
        raise MicronetError(f"{beside} is corrupted; {REBUILD}")
    if about["engine_sha256"] != file_hash(path):
        raise MicronetError(f"{path} does not match {beside.name}: one of them is corrupted or was replaced; {REBUILD}")
    return about


def _is_sound(about: dict[str, Any]) -> bool:
    """Return True if what an engine's JSON file says has the right types."""
    kinds: dict[str, Any] = {**dict.fromkeys(REQUIRED, str), "metadata": dict[str, Any] | None, "params": int | None}
    if not all(accepts(kind, about.get(key)) for key, kind in kinds.items()):
        return False
    metadata = about.get("metadata") or {}
    parts: dict[str, Any] = {"data": dict[str, Any] | None, "history": list[dict[str, Any]] | None}
    return all(accepts(kind, metadata.get(key)) for key, kind in parts.items())


def _library_of(path: Path, about: dict[str, Any]) -> Any:
    """Import the library that built an engine; raise FailedError if it is missing or its version differs."""
    trt = library(about["backend"])
    if trt.__version__ != about["version"]:
        raise FailedError(
            f"{path} was built by {about['backend']} {about['version']}, but {trt.__version__} is installed; an engine "
            f"only runs with the version that built it; {REBUILD}"
        )
    return trt
