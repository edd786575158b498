"""Running a packed network by compiled steps, on threads over images, or over the rows of one image."""

import logging
import os
import threading
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from micronet.packed.program import Program
from micronet.runtimes.packed.batches import BATCH, in_batches, start_pool
from micronet.runtimes.packed.execution_plan import Plan
from micronet.runtimes.packed.feature_maps import Room
from micronet.runtimes.packed.kernels.cpu import ITEM, TABLE
from micronet.runtimes.packed.kernels.instructions import STEP
from micronet.runtimes.packed.kernels.interpreter import execute

CACHE = 1 << 19  # bytes; what lies between two steps should stay in the processor's own cache
WORTH = 5_000_000  # vectors of products an image, from which on (milliseconds) threads share its rows
PATIENCE = 1.5  # seconds a start may take before it is said why


class CompiledNetwork:
    """A program ready to run on threads. Raises plan.Unfit where the compiled steps do not have something."""

    def __init__(self, program: Program, threads: int) -> None:
        self._plan = Plan(program)
        self._threads = threads
        steps = self._plan.steps
        products = steps["rows"] * steps["columns"] * steps["vectors"] * steps["run_count"] * steps["length"] // ITEM
        self._work = int(products.sum())
        self._start()
        self._spare: dict[int, list[Room]] = {}
        self._size = max(1, min(BATCH, CACHE // (2 * self._plan.largest)))

    def _start(self) -> None:
        self._process = os.getpid()
        self._pool = start_pool(self._threads)
        self._together = threading.Lock()  # threads that wait for one another must all be running

    def __call__(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Score images (N, C, H, W), float32."""
        if self._process != os.getpid():  # a fork has none of the threads
            self._start()
        if self._pool is not None and 0 < len(images) < self._threads and self._work >= WORTH:
            return self._score(images, rows=True)
        return in_batches(self._score, images, self._size, self._threads, self._pool)

    def _score(self, images: NDArray[np.float32], *, rows: bool = False) -> NDArray[np.float32]:
        """Score images at once, with ``rows`` by all threads, each its share of every step's rows."""
        plan, count = self._plan, len(images)
        spare = self._spare.setdefault(count, [])
        try:
            room = spare.pop()
        except IndexError:
            room = plan.room(count)
        room.images[...] = images
        given = plan.steps, count, room.memory, plan.constants, TABLE
        counter = np.zeros(1, np.int64)
        if rows and self._pool is not None:
            with self._together:
                try:
                    work = [
                        self._pool.submit(execute, *given, thread, self._threads, counter)
                        for thread in range(self._threads)
                    ]
                    for each in work:
                        each.result()
                except BaseException:
                    counter[0] = 1 << 62  # let those that wait for the others go
                    raise
        else:
            execute(*given, 0, 1, counter)
        found = room.scores.transpose(0, 3, 1, 2).reshape(count, -1) if plan.flat else room.scores
        scores: NDArray[np.float32] = np.array(found, order="C")
        spare.append(room)
        return scores


@cache  # once a process
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
    logging.getLogger(__name__).warning("preparing the steps for this processor; the first time takes half a minute")
