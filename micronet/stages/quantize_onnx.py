"""The work of ``quantize FILE.onnx --mode ptq``: a float ONNX file, whoever made it, calibrated and made int8."""

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import onnx
import onnx_ir as ir
import torch

from micronet.core.config import matching
from micronet.core.metrics import EQUAL_DB
from micronet.core.progress import Progress
from micronet.data.dataset import CALIBRATION_SAMPLES
from micronet.data.image_files import list_images
from micronet.errors import FailedError, MicronetError, count
from micronet.onnx import posttraining
from micronet.onnx.bias_correction import correct_biases, give_biases
from micronet.onnx.channel_padding import with_padded_channels
from micronet.onnx.config import InputConfig
from micronet.onnx.feeds import Feed, inputs_of
from micronet.onnx.halves import store_halves, stores_halves
from micronet.onnx.heads import find_destroyed, first_and_last
from micronet.onnx.insertion import ValueRange
from micronet.onnx.integer_words import describe
from micronet.onnx.integers import count_computed
from micronet.onnx.reader import read_onnx
from micronet.onnx.sharing import share_weights
from micronet.onnx.speed import compare_sizes, measure_files
from micronet.quantization.config import (
    CALIBRATION_BATCH,
    EXCLUDED,
    FIRST_OR_LAST,
    QuantConfig,
    RangeConfig,
)
from micronet.runtimes.onnxruntime import note
from micronet.stages.float_model import FloatModel
from micronet.stages.inputs import calibration_batches
from micronet.stages.onnx_files import closeness, compare_files, count_rows, is_raw, open_files, raw_feeds
from micronet.stages.onnx_metrics import measure_by_task
from micronet.stages.onnx_ranges import Ranges, choose_ranges, has_legacy_cache, sampled
from micronet.stages.onnx_sensitivity import Requantize, describe_destroyers, layer_names
from micronet.stages.quantize_warnings import CONSTANT, POOR_DB, warn_constant
from micronet.stages.stage import Context, Outcome
from micronet.tasks.agreement import decibels


def quantize_file(stage: Any, context: Context) -> Outcome:
    """Quantize the ONNX file that a stage names, and report how close and how fast the result is."""
    model = FloatModel(read_onnx(stage.artifact), stage.artifact, stage.data, stage.execution.seed, stage.inputs)
    feeds = calibration_feeds(model, stage.calibration, context.progress)
    warn_constant((tuple(feed.values()) for feed in feeds), context.progress)
    made = _quantized(
        model, stage.calibration, stage.quantization, context.progress, feeds, correct=stage.recovery.bias_correct
    )
    int8, floats = made.int8, made.floats
    integers = count_computed(int8) | compare_sizes(model.proto, int8)
    if stage.quantization.a_sign == "signed":  # for TensorRT, which leaves other layers in float than ONNX Runtime
        integers |= {"float": floats, "dequantized": []}
    else:
        _check_integers(integers)
    measured, warnings = _quality(model, made, feeds, stage.calibration, context.progress)
    if not stage.timing.skip_timing:
        integers |= measure_files(model.proto, int8, feeds[0])
    about = {"calibrator": made.calibrator, "warnings": warnings, "integers": {**integers, "words": describe(integers)}}
    return Outcome(int8, {**measured, **about, "left_float": integers["float"]})


def _check_integers(found: dict[str, Any]) -> None:
    """Raise FailedError if ONNX Runtime computes no layer in integers; ``found``: what ``count_computed`` returns."""
    if not any(found[kind]["integer"] for kind in ("convolutions", "linear", "recurrent")):
        name, why = next(iter(found["float"].items()), ("the network", "it has no layers with stored weights"))
        raise FailedError(
            f"none of the layers would run in integer arithmetic; the first, {name}, stays in float: {why}; use the "
            "float file, or quantize for TensorRT with --a-sign signed"
        )


class _Made(NamedTuple):
    """A quantized model, its layers in float with the reasons, the float model, and how to quantize it with others.

    ``calibrator``: of its ranges; None: they were read.
    """

    int8: onnx.ModelProto
    floats: dict[str, str]
    calibrator: str | None
    folded: onnx.ModelProto
    requantize: Requantize


def to_int8(
    model: FloatModel, ranges: RangeConfig, config: QuantConfig, progress: Progress, feeds: list[Feed] | None = None
) -> tuple[onnx.ModelProto, dict[str, str]]:
    """Return a float model as int8, and the layers left in float with the reasons.

    Of ``config``, the sign of the activations, the levels and bits of the weights, and --first-last apply. ``feeds``:
    the calibration inputs; None: those that the settings name.
    """
    made = _quantized(model, ranges, config, progress, feeds)
    return made.int8, made.floats


def _quantized(
    model: FloatModel,
    ranges: RangeConfig,
    config: QuantConfig,
    progress: Progress,
    feeds: list[Feed] | None,
    *,
    correct: bool = False,
) -> _Made:
    """Quantize a model as ``to_int8`` does. ``correct``: correct biases, which needs ``feeds``."""
    folded = posttraining.prepare(model.proto)
    if correct:
        give_biases(folded)
    signed = config.a_sign == "signed"
    if feeds is None and not has_legacy_cache(ranges):
        feeds = calibration_feeds(model, ranges, progress)
    bits, left_out = config.w_bits if isinstance(config.w_bits, int) else 0, dict[int, dict[str, str]]()

    def quantized(ranges: Ranges, others: dict[str, str]) -> onnx.ModelProto:
        if id(ranges) not in left_out:
            left_out[id(ranges)] = _left_out(folded, ranges, feeds or [], config)
        return posttraining.quantize_onnx(
            folded, ranges, signed=signed, per_channel=config.q_level == "channel", bits=bits,
            excluded={**left_out[id(ranges)], **others},
        )  # fmt: skip

    found, calibrator = choose_ranges(
        folded, ranges, progress, feeds or [], lambda each: quantized(each, {}), signed=signed
    )
    requantize = partial(quantized, found)
    int8 = requantize({})
    if correct and feeds:
        int8 = _corrected(folded, int8, sampled(feeds), progress)
    floats = posttraining.left_float(folded, signed=signed, allowed=found.keys(), excluded=left_out[id(found)])
    if not signed:
        int8 = share_weights(with_padded_channels(int8))
    if stores_halves(model.proto):
        store_halves(int8)
    note(int8, left_float=floats)
    return _Made(int8, floats, calibrator, folded, requantize)


def _left_out(
    folded: onnx.ModelProto, ranges: dict[str, ValueRange], feeds: list[Feed], config: QuantConfig
) -> dict[str, str]:
    """Return the layers to leave in float whatever their ranges: name -> reason."""
    excluded = dict.fromkeys(matching(config, "exclude", layer_names(folded)), EXCLUDED)
    if config.first_last == "float":
        return excluded | {str(node.name): FIRST_OR_LAST for node in first_and_last(ir.from_proto(folded).graph)}
    if config.first_last != "auto":
        return excluded
    return find_destroyed(folded, ranges, sampled(feeds), signed=config.a_sign == "signed") | excluded


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
        progress.line("--bias-correct changed nothing: no convolution or Gemm is computed in integers")
        return int8
    before, after = (compare_files(folded, each, feeds) for each in (int8, corrected))
    change = f"on the calibration inputs, {closeness(after)} vs. {closeness(before)} before"
    if after["error"] > before["error"]:
        progress.line(f"--bias-correct changed nothing: the outputs would be less close to the float model's {change}")
        return int8
    progress.line(f"corrected the mean output of {count(layers, 'layer')}: {change}")
    return corrected


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


def _quality(
    model: FloatModel, made: _Made, feeds: list[Feed], config: RangeConfig, progress: Progress
) -> tuple[dict[str, Any], list[str]]:
    """Return the metrics on the test data if the model suits the task of a known data set, or else the agreement.

    The second value: warnings that follow from the agreement.
    """
    if model.has_data and not model.takes_arrays:
        dataset = model.open_data()
        sessions = open_files(model.proto, made.int8)
        if not dataset.task.needs_reference and (measured := measure_by_task(model, dataset, sessions)):
            return measured, []
    runs = sampled(feeds)
    found = compare_files(model.proto, made.int8, runs)
    warnings = []
    if decibels(found["error"]) < POOR_DB:
        which = describe_destroyers(made.folded, made.requantize, runs, progress)
        warnings.append(
            f"warning: the outputs are far from the float model's ({closeness(found)} on the calibration inputs); "
            f"{which or 'no few layers explain it'}; calibrate on real inputs, or try another --calibrator"
        )
    if found.get("sqnr_db", 0) >= EQUAL_DB:
        warnings.append(f"warning: the outputs equal the float model's exactly, {CONSTANT}; check the file's weights")
    measured = {f"test_{key}": value for key, value in found.items() if not key.startswith("error")}
    rows = sum(next((len(values) for values in feed.values() if values.ndim), 1) for feed in runs)
    samples = min(rows, count_rows(config.calib_data or model.data_name))
    return {**measured, "test_images": samples, "tested_on": CALIBRATION_SAMPLES}, warnings
