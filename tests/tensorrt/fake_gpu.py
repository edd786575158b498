"""A GPU in NumPy: as much of ``tensorrt`` and ``pycuda.driver`` as running an engine takes.

What is put on a stream happens when the stream, or an event on it, is waited for, so that a result read too early is
not there yet. An engine is JSON: its input, its profiles and the name of what it computes (``COMPUTE``).
"""

import hashlib
import json
import sys
from enum import Enum
from types import ModuleType

import numpy as np

VERSION = "10.99.0.1"
MS_PER_IMAGE = 0.25
NUMPY = {"FLOAT": np.float32, "HALF": np.float16, "UINT8": np.uint8}


def class_scores(images):
    """Return (N, 3) scores that tell images, their channels and their order apart."""
    means = images.astype(np.float32).mean((2, 3))
    return np.stack([means.sum(1), means[:, 0] * 2, means[:, -1] - images[:, 0, 0, -1]], 1)


def pixel_scores(images):
    """Return (N, 2, H / 8, W / 8): the second class where it is bright."""
    bright = images[:, 0, ::8, ::8].astype(np.float32)
    return np.stack([-bright, bright], 1)


COMPUTE = {"classes": class_scores, "pixels": pixel_scores}


def write_engine(path, low, high=None, *, profiles=None, compute="classes", kind="FLOAT", out="FLOAT", **about):
    """Write an engine for inputs of ``low`` to ``high``, or of several profiles, and the JSON beside it."""
    profiles = profiles or [(low, low if high is None else high)]
    ends = {size for ends in profiles for size in ends}
    shape = [sizes[0] if len(set(sizes)) == 1 else -1 for sizes in zip(*ends, strict=True)]
    engine = {"shape": shape, "profiles": profiles, "compute": compute, "kind": kind, "out": out}
    path.write_text(json.dumps(engine))
    told = {
        "backend": "tensorrt",
        "version": VERSION,
        "precision": "fp32",
        "metadata": None,
        "engine_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        **about,
    }
    path.with_name(f"{path.name}.json").write_text(json.dumps(told))
    return path


class Gpu:
    """The two modules, and what happened on them."""

    def __init__(self, count=1):
        self.memory = {}  # address -> array
        self.allocations = 0
        self.contexts = []
        self.runs = []  # what engines were given
        self.count = count
        self.broken = None  # what the next allocation says
        self.fails = False  # whether runs fail
        self.cuda = self._cuda()
        self.trt = self._tensorrt()

    def install(self, monkeypatch):
        package = ModuleType("pycuda")
        package.driver = self.cuda
        for name, module in {"pycuda": package, "pycuda.driver": self.cuda, "tensorrt": self.trt}.items():
            monkeypatch.setitem(sys.modules, name, module)
        return self

    def _cuda(gpu):
        cuda = ModuleType("pycuda.driver")

        class Error(Exception):
            pass

        class PageLocked(np.ndarray):
            pass

        class Device:
            @staticmethod
            def count():
                return gpu.count

            def __init__(self, number):
                self.number = number

            def name(self):
                return f"Fake {self.number}"

            def retain_primary_context(self):
                return Context(self.number)

        class Context:
            def __init__(self, number):
                self.number = number

            def push(self):
                gpu.contexts.append(self.number)

            @staticmethod
            def pop():
                gpu.contexts.pop()

        class Stream:
            def __init__(self):
                self.waiting, self.ms = [], 0.0
                self.handle = id(self)
                gpu.stream = self

            def synchronize(self):
                while self.waiting:
                    self.waiting.pop(0)()

        class Event:
            def record(self, stream):
                self.stream, self.at = stream, None
                stream.waiting.append(lambda: setattr(self, "at", stream.ms))
                return self

            def synchronize(self):
                self.stream.synchronize()
                return self

            def time_till(self, event):
                return event.at - self.at

        class DeviceAllocation:
            def __init__(self, size):
                gpu.allocations += 1
                self.address = 4096 * gpu.allocations
                gpu.memory[self.address] = np.zeros(size, np.uint8)

            def free(self):
                assert not gpu.stream.waiting, "memory is freed that the GPU may still use"
                del gpu.memory[self.address]

            def __int__(self):
                return self.address

        def mem_alloc(size):
            assert gpu.contexts, "no context is current"
            if gpu.broken:
                raise Error(gpu.broken)
            return DeviceAllocation(size)

        def pagelocked_empty(shape, dtype):
            return np.full(shape, 77, dtype).view(PageLocked)

        def memcpy_htod_async(dest, src, stream):
            assert isinstance(src, PageLocked) and src.flags.c_contiguous
            stream.waiting.append(lambda: gpu.memory[int(dest)].__setitem__(slice(None), src.view(np.uint8).ravel()))

        def memcpy_dtoh_async(dest, src, stream):
            assert isinstance(dest, PageLocked)
            stream.waiting.append(
                lambda: dest.view(np.uint8).reshape(-1).__setitem__(slice(None), gpu.memory[int(src)])
            )

        for item in (Error, Device, Stream, Event, mem_alloc, pagelocked_empty, memcpy_htod_async, memcpy_dtoh_async):
            setattr(cuda, item.__name__, item)
        cuda.init = lambda: None
        return cuda

    def _tensorrt(gpu):
        trt = ModuleType("tensorrt")
        trt.__version__ = VERSION

        class ILogger:
            INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

        class Runtime:
            def __init__(self, logger):
                self.logger = logger

            def deserialize_cuda_engine(self, data):
                try:
                    return Engine(json.loads(data), self.logger)
                except ValueError:
                    self.logger.log(ILogger.ERROR, "magic tag does not match")
                    return None

        class Engine:
            num_io_tensors = 2

            def __init__(self, about, logger):
                self.about, self.logger = about, logger
                self.num_optimization_profiles = len(about["profiles"])

            def get_tensor_name(self, index):
                return ("input", "output")[index]

            def get_tensor_mode(self, name):
                return trt.TensorIOMode.INPUT if name == "input" else trt.TensorIOMode.OUTPUT

            def get_tensor_dtype(self, name):
                return self.about["kind" if name == "input" else "out"]

            def get_tensor_shape(self, name):
                return self.about["shape"]

            def get_tensor_profile_shape(self, name, index):
                low, high = self.about["profiles"][index]
                return [low, low, high]

            def create_execution_context(self):
                return Execution(self)

        class Execution:
            def __init__(self, engine):
                self.engine, self.shape, self.addresses = engine, None, {}
                self.active_optimization_profile = 0

            def set_optimization_profile_async(self, index, handle):
                assert handle == gpu.stream.handle
                self.active_optimization_profile, self.shape = index, None
                return True

            def set_input_shape(self, name, shape):
                low, high = self.engine.about["profiles"][self.active_optimization_profile]
                self.shape = shape
                return all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))

            def get_tensor_shape(self, name):
                return self.shape if name == "input" else self._compute(np.zeros(self.shape)).shape

            def set_tensor_address(self, name, address):
                self.addresses[name] = address
                return True

            def execute_async_v3(self, handle):
                assert handle == gpu.stream.handle and self.shape is not None
                if gpu.fails:
                    self.engine.logger.log(ILogger.ERROR, "an illegal memory access")
                    return False
                gpu.stream.waiting.append(self._execute)
                return True

            def _execute(self):
                about, places = self.engine.about, {name: gpu.memory[at] for name, at in self.addresses.items()}
                images = places["input"].view(NUMPY[about["kind"]]).reshape(self.shape)
                places["output"].view(NUMPY[about["out"]])[:] = self._compute(images).ravel()
                gpu.runs.append(images.copy())
                gpu.stream.ms += MS_PER_IMAGE * len(images)

            def _compute(self, images):
                return COMPUTE[self.engine.about["compute"]](images)

        def nptype(kind):
            if kind not in NUMPY:
                raise TypeError(kind)
            return NUMPY[kind]

        trt.ILogger, trt.Runtime, trt.nptype = ILogger, Runtime, nptype
        trt.TensorIOMode = Enum("TensorIOMode", "NONE INPUT OUTPUT")
        return trt
