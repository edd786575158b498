"""The trt-eval command's work: an engine's figures on classes or on label maps, and its speed. Imports torch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from micronet.cli.options import DataOptions
from micronet.cli.stages import open_to_test
from micronet.core.machine import describe_machine, tune_allocator
from micronet.core.progress import Progress
from micronet.data.batches import eval_batches
from micronet.data.dataset import DataSpec
from micronet.errors import MicronetError
from micronet.evaluation.accuracy import agreement, check_scores
from micronet.evaluation.network import Network
from micronet.evaluation.report import measure_accuracy
from micronet.runtimes.config import RuntimeOptions
from micronet.runtimes.network import open_network
from micronet.runtimes.tensorrt import segmentation
from micronet.runtimes.tensorrt.engine import EnginePredictor
from micronet.runtimes.tensorrt.timing import Timing, sweep


@dataclass(frozen=True)
class Wish:
    """What is asked of the command. ``sizes``: of segmentation, none for the one that the engine is built for."""

    file: Path
    onnx: Path | None
    batch_sizes: Sequence[int]
    folder: Path | None
    sizes: Sequence[segmentation.Size]
    data: DataOptions
    runtime: RuntimeOptions


def measure(wish: Wish, progress: Progress) -> dict[str, Any]:
    """Open the engine, and the ONNX file where one is named, and return all figures as a JSON object."""
    tune_allocator()
    if wish.file.suffix != ".engine":
        raise MicronetError(f"{wish.file} is no .engine; micronet evaluate measures other networks")
    engine = EnginePredictor(wish.file, wish.runtime)
    reference = _open_reference(wish.onnx, wish.runtime) if wish.onnx else None
    by_task = _classify if wish.folder is None else _segment
    figures, samples = by_task(wish, engine, reference, progress)
    timings: list[Timing] = []
    for sample in samples:
        timings += sweep(engine, sample, wish.batch_sizes, progress)
    return {
        "engine": str(wish.file),
        "size_bytes": wish.file.stat().st_size,
        **{key: engine.about.get(key) for key in ("backend", "version", "precision")},
        "machine": {**describe_machine(), "gpu": engine.gpu},
        **figures,
        "timings": [timing._asdict() for timing in timings],
    }


def _open_reference(onnx: Path, runtime: RuntimeOptions) -> Network:
    if onnx.suffix != ".onnx":
        raise MicronetError(f"--onnx is {onnx}; expected an .onnx file")
    return open_network(onnx, replace(runtime, device=None))  # --device is the engine's; this runs on the CPU


def _classify(
    wish: Wish, engine: EnginePredictor, reference: Network | None, progress: Progress
) -> tuple[dict[str, Any], list[NDArray[np.float32]]]:
    """Return accuracy, loss and agreement on the test images, and some of these to time."""
    dataset = open_to_test(wish.data, engine.data or (reference and reference.data) or DataSpec())
    sample = next(eval_batches(dataset.test, dataset.spec, max(wish.batch_sizes)))[0].contiguous()
    classes = len(dataset.spec.classes or [])
    check_scores(engine, sample[:1], classes, str(wish.file))
    if reference is not None:
        check_scores(reference, sample[:1], classes, str(wish.onnx))
    found = measure_accuracy(engine, dataset, f"evaluating {wish.file.name}", progress)
    figures = {"images": found.images, "accuracy": found.accuracy, "loss": found.loss, "agreement": None}
    if reference is not None:
        other = measure_accuracy(reference, dataset, f"evaluating {reference.runtime}", progress)
        figures |= {"agreement": agreement(other, found), "onnx_accuracy": other.accuracy}
    return figures, [sample.numpy()]


def _segment(
    wish: Wish, engine: EnginePredictor, reference: Network | None, progress: Progress
) -> tuple[dict[str, Any], list[NDArray[np.float32]]]:
    """Return the figures of segmentation, and one image at each size to time."""
    pairs = segmentation.list_pairs(wish.folder or Path())[: wish.data.limit]
    spec = engine.data or (reference and reference.data) or DataSpec()
    sizes = wish.sizes or _only_size(engine, wish.file)
    found = segmentation.evaluate_segmentation(engine, pairs, sizes, spec, progress, reference)
    image = segmentation.read_image(pairs[0].image)
    return found._asdict(), [segmentation.prepare(image, size, spec) for size in sizes]


def _only_size(engine: EnginePredictor, file: Path) -> list[segmentation.Size]:
    _, _, height, width = engine.ranges[0].high
    if len(engine.ranges) > 1 or engine.ranges[0].low[2:] != (height, width):
        raise MicronetError(f"{file} takes inputs of {' or '.join(map(str, engine.ranges))}; choose some with --sizes")
    return [(height, width)]
