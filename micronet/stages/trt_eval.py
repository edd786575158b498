"""The ``trt-eval`` report: a TensorRT engine's accuracy, agreement with the ONNX file, latency and throughput."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from micronet.core.config import setting
from micronet.errors import MicronetError
from micronet.stages.config import MeasureSettings, input_file
from micronet.stages.stage import Context, Outcome, Stage

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from micronet.evaluation.network import Network
    from micronet.runtimes.tensorrt.engine import EnginePredictor


@dataclass(frozen=True, kw_only=True)
class TrtEval(MeasureSettings, Stage):
    """Evaluates an engine."""

    name = "trt-eval"
    details = (
        "Reports accuracy or mean IoU, and latency and throughput by batch size. Requires pycuda and the same "
        "version of the library that built the engine. Not yet tested on a GPU."
    )
    example = "micronet trt-eval int8.engine --onnx int8.onnx --batch-sizes 1,8,32"
    suffix = None
    product = "dict[str, object]"

    file: Path = input_file("An .engine file from trt-build.", kinds=(".engine",), metavar="ENGINE")
    onnx: Path | None = setting(None, "Reference model, run by ONNX Runtime on the CPU.", basic=True)
    batch_sizes: str = setting(
        "1,8,32", "Batch sizes to time; batches above the engine's maximum are split.", basic=True
    )
    segmentation: Path | None = setting(
        None,
        "For segmentation networks at several sizes: a folder with images/NAME.jpg and masks/NAME.png (or labels/).",
        metavar="FOLDER",
    )
    sizes: str | None = setting(
        None,
        "For segmentation networks: average the scores over these sizes, each given as a shorter side or as HxW; "
        "default: the engine's size.",
    )

    def check(self) -> None:
        """Refuse settings of the other task."""
        if self.segmentation is None and self.sizes is not None:
            raise MicronetError("--sizes only applies to --segmentation FOLDER; for classification, use --image-size")
        if self.segmentation is not None and (self.data.data is not None or self.data.image_size is not None):
            raise MicronetError(
                "--segmentation uses its own images and cannot be combined with --data or --image-size; drop them "
                "(to set sizes, use --sizes)"
            )

    def needs_data(self) -> bool:
        """Return True unless the images are for segmentation."""
        return self.segmentation is None

    def run(self, context: Context) -> Outcome:
        """Open the engine, and the reference if one is named, and measure both."""
        from micronet.core.machine import tune_allocator
        from micronet.models.device import describe_machine
        from micronet.runtimes.network import open_network
        from micronet.runtimes.tensorrt.engine import EnginePredictor
        from micronet.runtimes.tensorrt.latency import parse_batch_sizes, sweep

        self.runtime.check_files([self.onnx] if self.onnx else [])
        tune_allocator()
        batch_sizes = parse_batch_sizes(self.batch_sizes)
        engine = EnginePredictor(self.file, self.runtime)
        reference = None
        if self.onnx is not None:
            if self.onnx.suffix != ".onnx":
                raise MicronetError(f"--onnx is {self.onnx}; expected an .onnx file")
            reference = open_network(self.onnx, replace(self.runtime, device=None))  # --device is for the engine
        measure = _classify if self.segmentation is None else _segment
        figures, samples = measure(self, engine, reference, context)
        timings = [timing for sample in samples for timing in sweep(engine, sample, batch_sizes, context.progress)]
        summary = {
            "engine": str(self.file),
            "size_bytes": self.file.stat().st_size,
            **{key: engine.about.get(key) for key in ("backend", "version", "precision")},
            "machine": {**describe_machine(), "gpu": engine.gpu},
            **figures,
            "timings": [timing._asdict() for timing in timings],
        }
        return Outcome(summary, summary)


def _classify(
    config: TrtEval, engine: "EnginePredictor", reference: "Network | None", context: Context
) -> "tuple[dict[str, Any], list[NDArray[np.float32]]]":
    """Return accuracy, loss and agreement on the test images, and some of these to time."""
    from micronet.data.batches import eval_batches
    from micronet.data.dataset import DataSpec
    from micronet.evaluation.accuracy import agreement, check_scores
    from micronet.evaluation.report import measure_accuracy
    from micronet.runtimes.tensorrt.latency import parse_batch_sizes
    from micronet.stages.inputs import open_test_data
    from micronet.tasks.task import CLASSIFICATION

    dataset = open_test_data(config.data, engine.data or (reference and reference.data) or DataSpec())
    largest = max(parse_batch_sizes(config.batch_sizes))
    sample = next(eval_batches(dataset.test, dataset.spec, largest))[0]
    if isinstance(sample, tuple):
        raise MicronetError("trt-eval only supports networks with one input")
    sample = sample.contiguous()
    check_scores(engine, sample[:1], dataset.spec, str(config.file), dataset.task)
    if reference is not None:
        check_scores(reference, sample[:1], dataset.spec, str(config.onnx), dataset.task)
    if dataset.task.needs_reference and reference is None:
        raise MicronetError(f"--task {dataset.task.name} needs a network to compare with; add --onnx FILE")
    dataset = dataset.with_reference(reference) if reference is not None else dataset
    found = measure_accuracy(engine, dataset, f"evaluating {config.file.name}", context.progress)
    about = {"images": found.samples, "noun": dataset.test.noun}
    figures: dict[str, Any] = {**about, **found.metrics, "loss": found.loss, "agreement": None}
    if dataset.task.name != CLASSIFICATION:
        return {**figures, "metrics": found.metrics}, [sample.numpy()]
    if reference is not None:
        other = measure_accuracy(reference, dataset, f"evaluating {reference.runtime}", context.progress)
        figures |= {"agreement": agreement(other, found), "onnx_accuracy": other.accuracy}
    return figures, [sample.numpy()]


def _segment(
    config: TrtEval, engine: "EnginePredictor", reference: "Network | None", context: Context
) -> "tuple[dict[str, Any], list[NDArray[np.float32]]]":
    """Return the figures of segmentation, and one image at each size to time."""
    from micronet.data.dataset import DataSpec
    from micronet.data.masks import list_pairs
    from micronet.runtimes.tensorrt import segmentation

    sizes = segmentation.parse_sizes(config.sizes) if config.sizes else _only_size(engine, config.file)
    pairs = list_pairs(config.segmentation or Path())[: config.data.limit]
    spec = engine.data or (reference and reference.data) or DataSpec()
    found = segmentation.evaluate_segmentation(engine, pairs, sizes, spec, context.progress, reference)
    image = segmentation.read_image(pairs[0].image)
    return found._asdict(), [segmentation.prepare(image, size, spec) for size in sizes]


def _only_size(engine: "EnginePredictor", file: Path) -> "list[int | tuple[int, int]]":
    _, _, height, width = engine.ranges[0].high
    if len(engine.ranges) > 1 or engine.ranges[0].low[2:] != (height, width):
        raise MicronetError(f"{file} takes inputs of {' or '.join(map(str, engine.ranges))}; choose one with --sizes")
    return [(height, width)]
