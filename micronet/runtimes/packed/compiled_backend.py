"""Running a packed network with compiled kernels, on threads that share images, or the rows of one image."""

import logging
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from micronet.errors import MicronetError
from micronet.packed.program import Program
from micronet.runtimes.packed.kernels.cpu import BLOCK_PIXELS, DIFFERENCE_TABLE, ITEM_BYTES, UINT8
from micronet.runtimes.packed.kernels.instructions import INSTRUCTION
from micronet.runtimes.packed.kernels.interpreter import execute
from micronet.runtimes.packed.kernels.kernel_cache import enable_cache, why_not_kept
from micronet.runtimes.packed.lowering import Lowering
from micronet.runtimes.packed.memory import CACHE_LINE, DTYPES, Workspace, aligned_zeros
from micronet.runtimes.packed.numpy_backend import MAX_BATCH, Scores, score_in_batches

CACHE_BYTES = 1 << 19  # an instruction's input and output should fit in a core's own cache
MAX_IMAGE_BYTES = 1 << 34
MIN_SHARED_WORK = 5_000_000  # vector products per image (milliseconds) from which threads share its rows
PATIENCE_SECONDS = 1.5  # how long loading the kernels may take before a warning explains the delay


class ExecutionPlan:
    """A program's instructions and constants. Raises UnsupportedProgram if the kernels do not support the program.

    calls: the instructions before encoding. image_bytes: size of the workspace per image. largest_map: bytes of the
    largest feature map. flat: for each result, if it is a flattened feature map.
    """

    def __init__(self, program: Program) -> None:
        lowering = Lowering(program)
        self.calls, self.flat = lowering.calls, [flat for _, flat in lowering.results]
        self._results = [each for each, _ in lowering.results]
        self._images, self._maps = lowering.images, lowering.maps
        self.image_bytes = 0
        for each in self._maps:
            each.buffer, self.image_bytes = self.image_bytes, self.image_bytes + each.image_bytes
        self.instructions = np.array([call.encode(lowering.constants) for call in self.calls], INSTRUCTION)
        self.constants = lowering.constants.arrays()
        if self.image_bytes > MAX_IMAGE_BYTES:
            raise MicronetError(
                f"the packed network needs {self.image_bytes >> 30} GiB of memory per image, more than the limit of "
                f"{MAX_IMAGE_BYTES >> 30} GiB; recreate the file if it is corrupted, or use the ONNX file instead"
            )
        self.largest_map = max(each.image_bytes for each in self._maps)

    def workspace(self, images: int) -> Workspace:
        """Return memory for the feature maps of a batch, with their padding filled in."""
        x_steps = [call.x.pixel_bytes * call.fields.get("stride_x", 1) for call in self.calls]
        overrun = BLOCK_PIXELS * max(x_steps) + CACHE_LINE  # the last block of pixels reads beyond its map
        memory = aligned_zeros(-(-(self.image_bytes * images + overrun) // CACHE_LINE) * CACHE_LINE, np.uint8)
        for each in self._maps:
            if each.dtype == UINT8 and each.zero_point:
                memory[each.buffer * images : (each.buffer + each.image_bytes) * images] = each.zero_point
        results = [each.view_nhwc(memory, images) for each in self._results]
        return Workspace(memory, self._images.view_nchw(memory, images), results)


class CompiledNetwork:
    """A program ready to run. Raises UnsupportedProgram if the kernels do not support it."""

    def __init__(self, program: Program, threads: int) -> None:
        self._plan = ExecutionPlan(program)
        self._threads = threads
        table = self._plan.instructions
        products = table["rows"] * table["columns"] * table["vectors"] * table["run_count"] * table["run_bytes"]
        self._work = int((products // ITEM_BYTES).sum())
        self._start_threads()
        self._workspaces: dict[int, list[Workspace]] = {}  # unused ones, by batch size
        self._max_batch = max(1, min(MAX_BATCH, CACHE_BYTES // (2 * self._plan.largest_map)))

    def _start_threads(self) -> None:
        self._process = os.getpid()
        self._pool = ThreadPoolExecutor(self._threads) if self._threads > 1 else None
        self._all_threads = threading.Lock()  # threads that wait for each other must all be running

    def __call__(self, images: NDArray[np.float32]) -> Scores:
        """Compute the outputs for images (N, C, H, W), such as scores (N, K)."""
        if self._process != os.getpid():  # a fork does not inherit threads
            self._start_threads()
        if 0 < len(images) < self._threads and self._work >= MIN_SHARED_WORK:
            return self._score(images, self._pool)
        return score_in_batches(self._score, images, self._max_batch, self._threads, self._pool)

    def _score(self, images: NDArray[np.float32], pool: ThreadPoolExecutor | None = None) -> Scores:
        """Score a batch; with a pool on all its threads, each with a share of every instruction's rows."""
        plan, count, threads = self._plan, len(images), self._threads
        unused = self._workspaces.setdefault(count, [])
        try:
            workspace = unused.pop()
        except IndexError:
            workspace = plan.workspace(count)
        workspace.images[...] = images
        arguments = plan.instructions, count, workspace.memory, plan.constants, DIFFERENCE_TABLE
        counter = np.zeros(1, np.int64)
        if pool is None:
            execute(*arguments, 0, 1, counter)
        else:
            with self._all_threads:
                try:
                    list(pool.map(lambda thread: execute(*arguments, thread, threads, counter), range(threads)))
                except BaseException:
                    counter[0] = 1 << 62  # release the threads that wait at the barrier
                    raise
        maps = [each.transpose(0, 3, 1, 2) for each in workspace.results]
        shaped = [each.reshape(count, -1) if flat else each for each, flat in zip(maps, plan.flat, strict=True)]
        outputs = [np.array(each, order="C") for each in shaped]
        unused.append(workspace)
        return outputs[0] if len(outputs) == 1 else outputs


@cache  # once per process
def compile_kernels() -> None:
    """Compile the kernels for this processor, or load them from the disk. Raises RuntimeError if numba cannot."""
    enable_cache(execute)  # without a writable cache, every start would take half a minute
    how_often = ", but only once"
    if obstacle := why_not_kept():
        how_often = f" in every run, because {obstacle}; set XDG_CACHE_HOME to a folder that you can write to"
    message = f"compiling kernels for this processor; this takes about half a minute{how_often}"
    warning = threading.Timer(PATIENCE_SECONDS, logging.getLogger(__name__).warning, [message])
    warning.daemon = True
    warning.start()
    try:
        no_instructions: Any = np.zeros(1, INSTRUCTION)
        constants = tuple(np.zeros(0, dtype) for dtype in DTYPES.values())
        memory, counter = np.zeros(64, np.uint8), np.zeros(1, np.int64)
        execute(no_instructions, 0, memory, constants, DIFFERENCE_TABLE, 0, 1, counter)
    finally:
        warning.cancel()
