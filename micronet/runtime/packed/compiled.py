"""Running a packed network by compiled steps, on threads over images, or over the rows of one image."""

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from micronet.runtime.packed.emit import TABLE
from micronet.runtime.packed.plan import Plan
from micronet.runtime.packed.program import Program
from micronet.runtime.packed.steps import execute
from micronet.runtime.packed.table import STEP

BATCH = 8  # images at once at most
CACHE = 1 << 19  # bytes; what lies between two steps should stay in the processor's own cache
PATIENCE = 1.5  # seconds a start may take before it is said why


class CompiledNetwork:
    """A program ready to run on threads. Raises plan.Unfit where the compiled steps do not have something."""

    def __init__(self, program: Program, threads: int) -> None:
        self._plan = Plan(program)
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None
        self._together = threading.Lock()  # threads that wait for one another must all be running
        self._spare: dict[int, list[NDArray[np.uint8]]] = {}
        self._size = max(1, min(BATCH, CACHE // (2 * self._plan.largest)))
        compile_steps()

    def __call__(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Score images (N, C, H, W), float32."""
        if self._pool is None:
            shares = [images]
        elif len(images) >= self._threads:
            ends = [len(images) * thread // self._threads for thread in range(self._threads + 1)]
            shares = [images[first:end] for first, end in pairwise(ends)]
        else:
            return self._score(images, rows=True)
        run = self._pool.map if self._pool else map
        return np.concatenate(list(run(self._in_batches, shares)))

    def _in_batches(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        parts = [images[start : start + self._size] for start in range(0, len(images), self._size)]
        return np.concatenate([self._score(part) for part in parts])

    def _score(self, images: NDArray[np.float32], *, rows: bool = False) -> NDArray[np.float32]:
        """Score images at once, with ``rows`` by all threads, each its share of every step's rows."""
        plan, count = self._plan, len(images)
        spare = self._spare.setdefault(count, [])
        try:
            memory = spare.pop()
        except IndexError:
            memory = plan.memory(count)
        plan.view(memory, plan.input, count)[...] = images.transpose(0, 2, 3, 1)
        given = plan.steps, count, memory, plan.constants, TABLE
        counter = np.zeros(1, np.int64)
        if rows and self._pool is not None:
            with self._together:
                work = [
                    self._pool.submit(execute, *given, thread, self._threads, counter)
                    for thread in range(self._threads)
                ]
                for each in work:
                    each.result()
        else:
            execute(*given, 0, 1, counter)
        found = plan.view(memory, plan.output, count)
        if plan.flat:
            found = found.transpose(0, 3, 1, 2).reshape(count, -1)
        scores: NDArray[np.float32] = np.array(found, order="C")
        spare.append(memory)
        return scores


def compile_steps() -> None:
    """Compile the steps for this processor, or read what an earlier process has compiled from the disk."""
    told = threading.Timer(PATIENCE, _tell)
    told.daemon = True
    told.start()
    try:
        none: Any = np.zeros(1, STEP)
        kinds = (np.uint8, np.int32, np.int64, np.float32)
        constants = tuple(np.zeros(0, kind) for kind in kinds)
        execute(none, 0, np.zeros(64, np.uint8), constants, TABLE, 0, 1, np.zeros(1, np.int64))
    finally:
        told.cancel()


def _tell() -> None:
    logging.getLogger(__name__).warning("compiling for this processor, which takes half a minute once; kept on disk")
