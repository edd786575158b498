"""Running a packed network with numpy only: integers stay integers, and every sum of them is exact.

Feature maps are (N, H, W, C), so that a convolution is one matrix product per kernel position.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from micronet.errors import MicronetError
from micronet.packed.program import Operation, Program
from micronet.runtimes.packed.numpy_layers import LAYERS
from micronet.runtimes.packed.numpy_operators import ELEMENTWISE, MOVES, Value

MAX_BATCH = 8  # images per batch, so that feature maps stay in the processor's caches
OPERATORS = {**LAYERS, **MOVES, **ELEMENTWISE}
Scores = NDArray[np.float32] | list[NDArray[np.float32]]  # a list if the network has several outputs


def check_images(program: Program, images: NDArray[np.float32]) -> None:
    """Raise MicronetError if images are not floats (N, C, H, W) of the program's size."""
    if images.dtype.kind != "f":
        raise MicronetError(
            f"the packed network expects float images, normalized as in training, but got {images.dtype}"
        )
    if images.ndim != 4 or list(images.shape[1:]) != program.shape:
        raise MicronetError(
            f"the packed network expects images of shape (N, {', '.join(map(str, program.shape))}), but got "
            f"{images.shape}"
        )


def run(program: Program, images: NDArray[np.float32]) -> Scores:
    """Compute a network's outputs for images (N, C, H, W), such as scores (N, K); feature maps as (N, C, H, W).

    Raises MicronetError if the images have another size.
    """
    check_images(program, images)
    found = {0: images}
    with np.errstate(over="ignore", invalid="ignore"):  # the outputs are checked
        for number, (_, value) in enumerate(_walk(program, images), 1):
            if number in program.results:
                data = value.real()
                found[number] = np.ascontiguousarray(data.transpose(0, 3, 1, 2) if data.ndim == 4 else data, np.float32)
    outputs = [found[number] for number in program.results]
    return outputs[0] if len(outputs) == 1 else outputs


def score_in_batches(
    score: Callable[[NDArray[np.float32]], Scores], images: NDArray[np.float32], max_batch: int,
    threads: int, pool: ThreadPoolExecutor | None,
) -> Scores:  # fmt: skip
    """Compute the outputs for images (N, C, H, W) in batches of at most ``max_batch``, enough for every thread."""
    if not len(images):
        none = score(np.zeros((1, *images.shape[1:]), np.float32))
        return [each[:0] for each in none] if isinstance(none, list) else none[:0]
    size = min(max_batch, -(-len(images) // threads))
    batches = [images[start : start + size] for start in range(0, len(images), size)]
    found = list((pool.map if pool else map)(score, batches))
    if isinstance(found[0], list):
        return [np.concatenate(parts) for parts in zip(*found, strict=True)]
    return np.concatenate(found)


def count_macs(program: Program) -> int:
    """Return the multiply-accumulates per image, from each layer's output size."""
    image = np.zeros((1, *program.shape), np.float32)
    return sum(
        value.data.size * operation.weight[0].size
        for operation, value in _walk(program, image)
        if operation.weight is not None
    )


def _walk(program: Program, images: NDArray[np.float32]) -> Iterator[tuple[Operation, Value]]:
    """Yield each operation and its output for the images."""
    values: list[Value] = [Value(np.ascontiguousarray(images.transpose(0, 2, 3, 1)))]
    last_use = {source: index for index, op in enumerate(program.operations) for source in op.inputs}
    for index, operation in enumerate(program.operations):
        values.append(OPERATORS[operation.kind](operation, *[values[source] for source in operation.inputs]))
        yield operation, values[-1]
        for source in operation.inputs:
            if last_use[source] == index:
                values[source] = Value(np.zeros(0))  # free the memory
