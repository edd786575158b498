"""Running a packed network with compiled kernels, on threads that share images, or the rows of one image."""

import logging
import os
import threading
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from micronet.packed.program import Program
from micronet.runtimes.packed.batches import MAX_BATCH, score_in_batches, start_pool
from micronet.runtimes.packed.execution_plan import ExecutionPlan
from micronet.runtimes.packed.feature_maps import Workspace
from micronet.runtimes.packed.kernels.cpu import DIFFERENCE_TABLE, ITEM_BYTES
from micronet.runtimes.packed.kernels.instructions import INSTRUCTION
from micronet.runtimes.packed.kernels.interpreter import execute
from micronet.runtimes.packed.kernels.kernel_cache import enable_cache

CACHE_BYTES = 1 << 19  # an instruction's input and output should fit in a core's own cache
MIN_SHARED_WORK = 5_000_000  # vector products per image (milliseconds) from which threads share its rows
PATIENCE_SECONDS = 1.5  # how long loading the kernels may take before a warning explains the delay


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
        self._pool = start_pool(self._threads)
        self._all_threads = threading.Lock()  # threads that wait for each other must all be running

    def __call__(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Score images (N, C, H, W) -> (N, K)."""
        if self._process != os.getpid():  # a fork does not inherit threads
            self._start_threads()
        if self._pool is not None and 0 < len(images) < self._threads and self._work >= MIN_SHARED_WORK:
            return self._score(images, share_rows=True)
        return score_in_batches(self._score, images, self._max_batch, self._threads, self._pool)

    def _score(self, images: NDArray[np.float32], *, share_rows: bool = False) -> NDArray[np.float32]:
        """Score a batch; with ``share_rows`` on all threads, each with a share of every instruction's rows."""
        plan, count = self._plan, len(images)
        unused = self._workspaces.setdefault(count, [])
        try:
            workspace = unused.pop()
        except IndexError:
            workspace = plan.workspace(count)
        workspace.images[...] = images
        arguments = plan.instructions, count, workspace.memory, plan.constants, DIFFERENCE_TABLE
        counter = np.zeros(1, np.int64)
        if share_rows and self._pool is not None:
            with self._all_threads:
                try:
                    futures = [
                        self._pool.submit(execute, *arguments, thread, self._threads, counter)
                        for thread in range(self._threads)
                    ]
                    for future in futures:
                        future.result()
                except BaseException:
                    counter[0] = 1 << 62  # release the threads that wait at the barrier
                    raise
        else:
            execute(*arguments, 0, 1, counter)
        found = workspace.scores.transpose(0, 3, 1, 2).reshape(count, -1) if plan.flat else workspace.scores
        scores: NDArray[np.float32] = np.array(found, order="C")
        unused.append(workspace)
        return scores


@cache  # once per process
def compile_kernels() -> None:
    """Compile the kernels for this processor, or load them from the disk. Raises RuntimeError if numba cannot."""
    enable_cache(execute)  # without a writable cache, every start would take half a minute
    warning = threading.Timer(PATIENCE_SECONDS, _explain_delay)
    warning.daemon = True
    warning.start()
    try:
        no_instructions: Any = np.zeros(1, INSTRUCTION)
        constants = tuple(np.zeros(0, dtype) for dtype in (np.uint8, np.int32, np.int64, np.float32))
        memory, counter = np.zeros(64, np.uint8), np.zeros(1, np.int64)
        execute(no_instructions, 0, memory, constants, DIFFERENCE_TABLE, 0, 1, counter)
    finally:
        warning.cancel()


def _explain_delay() -> None:
    logging.getLogger(__name__).warning("compiling kernels for this processor; this takes half a minute, once")
