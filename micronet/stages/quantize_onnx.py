"""The work of ``quantize FILE.onnx --mode ptq``: a float ONNX file, whoever made it, calibrated and made int8."""

import copy
from collections.abc import Collection, Iterator
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch

from micronet.core.config import matching
from micronet.core.progress import Progress
from micronet.core.timing import is_slower
from micronet.data.dataset import CALIBRATION_SAMPLES
from micronet.data.image_files import list_images
from micronet.errors import MicronetError, count
from micronet.evaluation.latency import time_calls
from micronet.onnx import posttraining
from micronet.onnx.bias_correction import correct_biases, give_biases
from micronet.onnx.channel_padding import with_padded_channels
from micronet.onnx.config import InputConfig
from micronet.onnx.feeds import Feed, inputs_of
from micronet.onnx.graph_view import GraphView
from micronet.onnx.heads import find_destroyed, first_and_last
from micronet.onnx.insertion import ValueRange
from micronet.onnx.integers import count_integer_layers
from micronet.onnx.operator_count import count_integers
from micronet.onnx.reader import read_onnx
from micronet.onnx.sharing import share_weights
from micronet.onnx.trt_cache import is_legacy_cache, read_legacy_cache
from micronet.quantization.config import (
    CALIBRATION_BATCH,
    EXCLUDED,
    FIRST_OR_LAST,
    Calibrator,
    QuantConfig,
    RangeConfig,
)
from micronet.quantization.histogram import Histogram
from micronet.runtimes.config import RuntimeOptions
from micronet.runtimes.onnxruntime import note, open_session
from micronet.stages.float_model import FloatModel
from micronet.stages.inputs import cached, calibration_batches
from micronet.stages.onnx_files import compare_files, is_raw, open_files, raw_feeds
from micronet.stages.onnx_metrics import measure_by_task
from micronet.stages.quantize_warnings import POOR_DB
from micronet.stages.stage import Context, Outcome

SAMPLED_RUNS = 64  # of the calibration inputs, for the agreement and for bias correction
LISTED = 8
CALIBRATOR: Calibrator = "mse"  # +2.5 to +10 dB over the ten files of scripts/bench_onnx_files.py, but -3.5 for one


def quantize_file(stage: Any, context: Context) -> Outcome:
    """Quantize the ONNX file that a stage names, and report how close and how fast the result is."""
    model = FloatModel(read_onnx(stage.artifact), stage.artifact, stage.data, stage.execution.seed, stage.inputs)
    feeds = calibration_feeds(model, stage.calibration, context.progress)
    int8, floats = to_int8(
        model, stage.calibration, stage.quantization, context.progress, feeds, correct=stage.recovery.bias_correct
    )
    found = _count(model.proto, int8, context.progress)
    if stage.quantization.a_sign != "signed":  # those files are for TensorRT
        floats |= _refused(int8, floats)
    measured = _quality(model, int8, feeds, context.progress)
    if not stage.timing.skip_timing:
        measured |= _speed(model.proto, int8, feeds[0], context.progress)
    return Outcome(int8, {**measured, **found, "left_float": floats})


def _count(model: onnx.ModelProto, int8: onnx.ModelProto, progress: Progress) -> dict[str, int]:
    """Count the operators in integers; say how many they are and, if so, that the file has grown."""
    before, after = model.ByteSize(), int8.ByteSize()
    if after > before:
        progress.line(
            f"larger than the float file: {after:,} vs. {before:,} bytes; an int8 file also stores scales, a bias "
            "for each call of a layer, constants that the float file computes, and the float16 weights of layers that "
            "stay in float as float32"
        )
    found = count_integers(int8)
    progress.line(
        f"{found['integer_layers']} of {found['layers']} convolutions and matrix products, and "
        f"{found['integer_operators'] / max(1, found['operators']):.0%} of all operators, run in integer arithmetic"
    )
    return found


def _refused(int8: onnx.ModelProto, floats: Collection[str]) -> dict[str, str]:
    """Return the quantized layers that ONNX Runtime computes in float -> why; ``floats``: those not quantized."""
    counted = count_integer_layers(int8) or {"float": {}}
    known = {name for full in floats for name in (full, full.rpartition(".")[0])}
    return {name: why for name, why in counted["float"].items() if name not in known}


def to_int8(
    model: FloatModel,
    ranges: RangeConfig,
    config: QuantConfig,
    progress: Progress,
    feeds: list[Feed] | None = None,
    *,
    correct: bool = False,
) -> tuple[onnx.ModelProto, dict[str, str]]:
    """Return a float model as int8, and the layers left in float with the reasons.

    Of ``config``, the sign of the activations, the levels and bits of the weights, and --first-last apply. ``feeds``:
    the calibration inputs; None: those that the settings name. ``correct``: correct biases, which needs ``feeds``.
    """
    folded = posttraining.prepare(model.proto)
    if correct:
        give_biases(folded)
    signed = config.a_sign == "signed"
    if feeds is None and not _has_legacy_cache(ranges):
        feeds = calibration_feeds(model, ranges, progress)
    found = _ranges(folded, ranges, progress, feeds or [], signed=signed)
    excluded = _left_out(folded, found, feeds or [], config)
    bits = config.w_bits if isinstance(config.w_bits, int) else 0
    per_channel = config.q_level == "channel"
    int8 = posttraining.quantize_onnx(
        folded, found, signed=signed, per_channel=per_channel, bits=bits, excluded=excluded
    )
    if correct and feeds:
        int8 = _corrected(folded, int8, _sampled(feeds), progress)
    floats = posttraining.left_float(folded, signed=signed, allowed=found.keys(), excluded=excluded)
    if not signed:
        int8 = share_weights(with_padded_channels(int8))
    note(int8, left_float=floats)
    return int8, floats


def _left_out(
    folded: onnx.ModelProto, ranges: dict[str, ValueRange], feeds: list[Feed], config: QuantConfig
) -> dict[str, str]:
    """Return the layers to leave in float whatever their ranges: name -> reason."""
    names = [str(layer.node.name) for layer in GraphView(folded).layers]
    excluded = dict.fromkeys(matching(config, "exclude", names), EXCLUDED)
    if config.first_last == "float":
        return excluded | {str(node.name): FIRST_OR_LAST for node in first_and_last(ir.from_proto(folded).graph)}
    if config.first_last != "auto":
        return excluded
    return find_destroyed(folded, ranges, _sampled(feeds), signed=config.a_sign == "signed") | excluded


def _corrected(
    folded: onnx.ModelProto, int8: onnx.ModelProto, feeds: list[Feed], progress: Progress
) -> onnx.ModelProto:
    """Return a quantized model with corrected biases, or as it is if that moves its outputs away from the float ones.

    The mean of every layer is right after a correction, but not always the result: a network may lose its errors on
    the way, such as those of a class that was certain anyway.
    """
    corrected = copy.deepcopy(int8)
    layers = correct_biases(folded, corrected, feeds, progress)
    if not layers:
        raise MicronetError("--bias-correct found no integer convolution or Gemm; drop --bias-correct")
    before, after = (compare_files(folded, each, feeds)["sqnr_db"] for each in (int8, corrected))
    change = f"the SQNR of its outputs on the calibration inputs from {before:.1f} to {after:.1f} dB"
    if after < before:
        progress.line(f"--bias-correct changed nothing: correcting the biases would lower {change}")
        return int8
    progress.line(f"corrected the mean output of {count(layers, 'layer')}, which raised {change}")
    return corrected


def _sampled(feeds: list[Feed]) -> list[Feed]:
    return feeds[:: max(1, len(feeds) // SAMPLED_RUNS)]


def input_shape(proto: onnx.ModelProto) -> list[int | None]:
    """Return the sizes of a model's first input, None for those that are dynamic."""
    return list(inputs_of(proto)[0].shape)


def calibration_feeds(model: FloatModel, config: RangeConfig, progress: Progress) -> list[Feed]:
    """Return the inputs to calibrate on: arrays, images from a folder, or training images of the data set."""
    named = model.data_name if config.calib_data is None else str(config.calib_data)
    if named is not None and is_raw(named):
        if model.inputs != InputConfig():
            raise MicronetError(f"{named} holds raw inputs; drop --mean, --std, --input-shape and --layout")
        return raw_feeds(named, inputs_of(model.proto))
    found: list[Feed] = []
    total = config.batches * CALIBRATION_BATCH
    for feed in _image_feeds(model, config, total, progress):
        found.append(feed)
        progress.step("reading images", min(total, sum(len(next(iter(each.values()))) for each in found)), total)
    return found


def _image_feeds(model: FloatModel, config: RangeConfig, total: int, progress: Progress) -> Iterator[Feed]:
    if config.calib_data is None or model.has_data:
        dataset = model.open_data()
        image = model.image_input(dataset.spec)
        for batch in calibration_batches(dataset, config, model.seed):
            yield from image.feeds(batch.contiguous().numpy())
        return
    image = model.image_input()
    paths = list_images(config.calib_data) if config.calib_data.is_dir() else []
    if not paths:
        raise MicronetError(
            f"--calib-data {config.calib_data} is neither a folder of images nor an .npz file of inputs; check the path"
        )
    if image.mean is None and image.entry.dtype.kind == "f":
        progress.line("pixels are scaled to 0..1; if the model expects other inputs, pass --mean and --std")
    chosen = torch.randperm(len(paths), generator=torch.Generator().manual_seed(model.seed))[:total].sort().values
    yield from image.read([paths[index] for index in chosen.tolist()])


def _has_legacy_cache(config: RangeConfig) -> bool:
    """Return True if the ranges come from a cache of TensorRT's, which needs no inputs."""
    return config.calib_cache is not None and is_legacy_cache(config.calib_cache)


def _ranges(
    folded: onnx.ModelProto, config: RangeConfig, progress: Progress, feeds: list[Feed], *, signed: bool
) -> dict[str, ValueRange]:
    cache = config.calib_cache
    if cache is not None and _has_legacy_cache(config):
        progress.line(f"read TensorRT's ranges from {cache}")
        found = read_legacy_cache(cache)
        if missing := [name for name in posttraining.activations(folded, signed=signed) if name not in found]:
            progress.line(
                f"{cache} has no ranges for these tensors, so the nodes that use them stay in float: "
                f"{', '.join(missing[:LISTED])}"
            )
        return found
    histograms = _histograms(folded, config, feeds, progress, signed=signed)
    return posttraining.find_ranges(histograms, config.calibrator or CALIBRATOR, config.percentile, signed=signed)


def _histograms(
    folded: onnx.ModelProto, config: RangeConfig, feeds: list[Feed], progress: Progress, *, signed: bool
) -> dict[str, Histogram]:
    network = folded.SerializeToString(deterministic=True)
    depends_on = chain([network], (values.tobytes() for feed in feeds for values in feed.values()))
    collect = partial(posttraining.collect, folded, feeds, signed=signed)
    return cached(config.calib_cache, depends_on, collect, progress)


def _quality(model: FloatModel, int8: onnx.ModelProto, feeds: list[Feed], progress: Progress) -> dict[str, Any]:
    """Return the metrics on the test data if the model suits the task of a known data set, or else the agreement."""
    if model.has_data and not model.takes_arrays:
        dataset = model.open_data()
        sessions = open_files(model.proto, int8)
        if not dataset.task.needs_reference and (measured := measure_by_task(model, dataset, sessions)):
            return measured
    runs = _sampled(feeds)
    found = compare_files(model.proto, int8, runs)
    if found["sqnr_db"] < POOR_DB:
        progress.line(
            f"warning: the outputs are far from the float model's (SQNR {found['sqnr_db']:.1f} dB on the calibration "
            "inputs); calibrate on real inputs, try another --calibrator, or keep layers in float with --exclude"
        )
    measured = {f"test_{key}": value for key, value in found.items() if not key.startswith("error")}
    samples = sum(len(next(iter(feed.values()))) for feed in runs)
    return {**measured, "test_images": samples, "tested_on": CALIBRATION_SAMPLES}


def _speed(model: onnx.ModelProto, int8: onnx.ModelProto, feed: Feed, progress: Progress) -> dict[str, float]:
    """Return the milliseconds of a run of the float and the int8 model, one thread, in turns; say which is faster."""
    options = RuntimeOptions(threads=1)
    sessions = [open_session(proto.SerializeToString(), options, "the model") for proto in (model, int8)]
    runs: list[Any] = [partial(_run, session, feed) for session in sessions]
    given: list[Any] = [feed, feed]
    before, after = (1000 * float(np.median(each)) for each in time_calls(runs, given, one_thread=True))
    note, batch = "slower than float here: " if is_slower(after, before) else "", len(next(iter(feed.values())))
    progress.line(f"{note}{after:.2f} ms vs. {before:.2f} ms in float (ONNX Runtime, 1 thread, batch {batch})")
    return {"latency_ms": after, "float_latency_ms": before}


def _run(session: Any, feed: Feed, _: Any) -> Any:
    return session.run(None, feed)
