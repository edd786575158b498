"""The activation ranges of a float ONNX file, by the calibrator that keeps its outputs closest if none is named."""

from collections.abc import Callable
from functools import partial
from itertools import chain

import onnx

from micronet.core.progress import Progress
from micronet.errors import FailedError
from micronet.onnx import posttraining
from micronet.onnx.feeds import Feed
from micronet.onnx.insertion import ValueRange
from micronet.onnx.trt_cache import is_legacy_cache, read_legacy_cache
from micronet.quantization.config import Calibrator, RangeConfig
from micronet.quantization.histogram import Histogram
from micronet.stages.inputs import cached
from micronet.stages.onnx_files import closeness, compare_files

# The first is better for nine of the ten files of scripts/bench_onnx_files.py, by 2.5 to 10 dB; the second where few
# values count most, as in audio of very different loudness.
CALIBRATORS: tuple[Calibrator, ...] = ("mse", "minmax")
SAMPLED_RUNS, CHOICE_RUNS = 64, 16  # of the calibration inputs: for the agreement, and to choose a calibrator
LISTED = 8
Ranges = dict[str, ValueRange]


def has_legacy_cache(config: RangeConfig) -> bool:
    """Return True if the ranges come from a cache of TensorRT's, which needs no inputs."""
    return config.calib_cache is not None and is_legacy_cache(config.calib_cache)


def sampled(feeds: list[Feed], runs: int = SAMPLED_RUNS) -> list[Feed]:
    """Return some of many calibration inputs."""
    return feeds[:: max(1, len(feeds) // runs)]


def choose_ranges(
    folded: onnx.ModelProto,
    config: RangeConfig,
    progress: Progress,
    feeds: list[Feed],
    quantized: Callable[[Ranges], onnx.ModelProto],
    *,
    signed: bool,
) -> tuple[Ranges, str | None]:
    """Return the range of every activation, and the calibrator that found them; None: a cache of TensorRT's has them.

    Args:
        folded: A float model from ``prepare``.
        config: The settings. Without a calibrator, each of ``CALIBRATORS`` is tried on some of the calibration inputs.
        progress: Told what is chosen.
        feeds: The calibration inputs, by name; not needed with a cache of TensorRT's.
        quantized: Quantizes the model with ranges.
        signed: For TensorRT.
    """
    cache = config.calib_cache
    if cache is not None and has_legacy_cache(config):
        progress.line(f"read TensorRT's ranges from {cache}")
        known = read_legacy_cache(cache)
        if missing := [name for name in posttraining.activations(folded, signed=signed) if name not in known]:
            progress.line(
                f"{cache} has no ranges for these tensors, so the nodes that use them stay in float: "
                f"{', '.join(missing[:LISTED])}"
            )
        return known, None
    histograms = _histograms(folded, config, feeds, progress, signed=signed)
    names = CALIBRATORS if config.calibrator is None else (config.calibrator,)
    found = {each: posttraining.find_ranges(histograms, each, config.percentile, signed=signed) for each in names}
    if len(found) == 1:
        return found[names[0]], names[0]
    runs = sampled(feeds, CHOICE_RUNS)
    agreement = {each: _agreement(folded, quantized(ranges), runs) for each, ranges in found.items()}
    best = min(names, key=lambda each: agreement[each]["error"])
    if best != names[0]:
        progress.line(
            f"--calibrator {best}, which keeps the outputs closer to the float model's than {names[0]} "
            f"({closeness(agreement[best])} vs. {closeness(agreement[names[0]])} on calibration inputs)"
        )
    return found[best], best


def _agreement(floating: onnx.ModelProto, int8: onnx.ModelProto, feeds: list[Feed]) -> dict[str, float]:
    try:
        return compare_files(floating, int8, feeds)
    except FailedError:  # an output is infinite
        return {"sqnr_db": -float("inf"), "error": float("inf")}


def _histograms(
    folded: onnx.ModelProto, config: RangeConfig, feeds: list[Feed], progress: Progress, *, signed: bool
) -> dict[str, Histogram]:
    network = folded.SerializeToString(deterministic=True)
    depends_on = chain([network], (values.tobytes() for feed in feeds for values in feed.values()))
    collect = partial(posttraining.collect, folded, feeds, signed=signed)
    return cached(config.calib_cache, depends_on, collect, progress)
