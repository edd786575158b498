"""``micronet quantize``: quantizers into a network, with training (QAT), without (PTQ), or training on (QAFT)."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from micronet.cli import console
from micronet.cli.options import (
    DataOptions,
    ModelOptions,
    OutputOptions,
    SpreadConfig,
    default_name,
    of_kind,
    with_configs,
)
from micronet.errors import MicronetError
from micronet.quantization.calibration_config import CalibrationConfig
from micronet.quantization.config import Bits, QuantConfig
from micronet.quantization.recovery_config import RecoveryConfig
from micronet.runtimes.config import CodeOptions
from micronet.training.config import TrainConfig

EXAMPLE = "micronet quantize float.safetensors --w-bits 8 --a-bits 8 --q-type sym --epochs 1 -o int8.safetensors"

GENTLE = TrainConfig(epochs=2)  # the float network is trained already
QAFT_LR = 1e-5
# The fewest bits of weights and activations, and the learning rate that has served them best (see BENCHMARKS.md).
LEARNING_RATES = ((1, 0.02), (3, 0.005), (6, 0.002), (16, 0.001))


@with_configs
def run(
    artifact: Annotated[
        Path | None,
        typer.Argument(
            metavar="[ARTIFACT]",
            help="A float artifact, or with --mode ptq any float .onnx; without one a network is trained first.",
            callback=of_kind(".safetensors", ".onnx"),
        ),
    ] = None,
    trust_code: Annotated[bool, typer.Option("--trust-code", help="Run the code recorded in an artifact.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan, layer by layer, and write nothing.")
    ] = False,
    *,
    quantization: QuantConfig,
    calibration: CalibrationConfig,
    recovery: RecoveryConfig,
    training: TrainConfig = GENTLE,
    model: ModelOptions,
    data: DataOptions,
    running: SpreadConfig,
    output: OutputOptions,
) -> None:
    """Quantize a network and train it to live with that (QAT); --mode ptq trains nothing and takes seconds.

    Without an artifact the network of --model is trained on --data first, with the defaults of `micronet train`.
    Binary and ternary networks learn from the float artifact's scores too, unless --distill names another teacher.
    --mode qaft takes a quantized artifact and trains on with its ranges frozen, at a learning rate of 1e-5 unless
    another is given.
    """
    from micronet.cli import quantize_stage, stages
    from micronet.core.files import check_cache_path

    check_cache_path(calibration.calib_cache)
    if artifact is not None and artifact.suffix == ".onnx":
        model.check_unused()
        if model.model is not None or trust_code:
            raise MicronetError("an ONNX file needs no code; leave --model and --trust-code out")
        _check_file_options(dry_run, calibration, recovery, training)
        _quantize_file(artifact, quantization, calibration, data, running.seed, output)
        return
    code = CodeOptions(model.model, trust_code)
    if artifact is not None:
        model.check_unused()
    if dry_run:
        if recovery.target_drop is not None:
            raise MicronetError("--target-drop is found by measuring, which --dry-run does not; leave one of them out")
        _print_plan(_plan(artifact, code, quantization), output.json)
        return
    path = output.output or default_name(artifact or model.file, _ending(quantization, calibration))
    stages.check_output(path, output, running)
    with console.progress(output.quiet) as progress:
        job = stages.make_run(path, running, output, progress)
        if artifact is None:
            opened, artifact = quantize_stage.float_artifact(model, data, job)
        else:
            opened = stages.open_artifact(artifact, code)
        _check_mode(quantization, calibration, recovery, training)
        if training.lr is None:
            training = replace(training, lr=_learning_rate(quantization, calibration))
        if _has_levels(quantization) and calibration.mode == "qat" and training.distill is None:
            training = replace(training, distill=artifact)
            progress.line(f"learning from {artifact} too; --distill-weight 0 learns from the labels alone")
        wish = quantize_stage.Wish(quantization, calibration, recovery, training, data, artifact)
        work = quantize_stage.qaft if calibration.mode == "qaft" else quantize_stage.quantize
        done = work(opened, wish, job)
    stages.keep(done, path)
    stages.report(done, path, output)
    if not output.json and not output.quiet:
        for name, why in done.history[-1].result.get("left_float", {}).items():
            console.print_line(f"left float: {name} ({why})")


def _check_mode(
    quantization: QuantConfig, calibration: CalibrationConfig, recovery: RecoveryConfig, training: TrainConfig
) -> None:
    """Raise MicronetError for settings that the mode has no use for."""
    if calibration.mode == "ptq" and training != GENTLE:
        raise MicronetError("--mode ptq trains nothing; leave the training options out, or use --mode qat")
    without = replace(recovery, equalize=False, target_drop=None)
    if calibration.mode == "qat" and without != RecoveryConfig():
        raise MicronetError(
            "--adaround, --bias-correct and --bn-reestimate stand in for training; leave them out, or use --mode ptq"
        )
    if quantization.method == "dorefa" and quantization.a_bits != "binary" and calibration.calibrator != "minmax":
        raise MicronetError("--method dorefa has activations of a fixed range, 1 / --a-gain; leave --calibrator out")
    untouched = (quantization, replace(calibration, mode="qat"), recovery)
    if calibration.mode == "qaft" and untouched != (QuantConfig(), CalibrationConfig(), RecoveryConfig()):
        raise MicronetError("--mode qaft trains what is quantized already; leave the options of quantization out")


def _check_file_options(
    dry_run: bool, calibration: CalibrationConfig, recovery: RecoveryConfig, training: TrainConfig
) -> None:
    """Raise MicronetError for what cannot be done to an ONNX file."""
    if calibration.mode != "ptq":
        raise MicronetError("an ONNX file cannot be trained; add --mode ptq, or give the artifact it came from")
    if dry_run or recovery != RecoveryConfig() or training != GENTLE:
        raise MicronetError(
            "an ONNX file takes no --dry-run, no options of recovery and none of training; give the artifact"
        )


def _quantize_file(
    file: Path, quantization: QuantConfig, calibration: CalibrationConfig, data: DataOptions, seed: int,
    output: OutputOptions,
) -> None:  # fmt: skip
    from micronet.cli.onnx_stage import Source, accuracies, check_config, to_int8
    from micronet.core.files import check_output_path
    from micronet.onnx.export import write_onnx
    from micronet.runtimes.onnxruntime import read_onnx

    path = output.output or default_name(file, "-int8.onnx")
    check_output_path(path, output.force, ".onnx")
    check_config(quantization)
    with console.progress(output.quiet) as progress:
        source = Source(read_onnx(file), file, data, seed)
        small = to_int8(source, calibration, quantization, progress)
        was, now = accuracies(source, [source.proto, small])
    write_onnx(small, path)
    size = path.stat().st_size
    if output.json:
        console.print_json({"output": str(path), "size_bytes": size, "test_accuracy": now, "float_test_accuracy": was})
    elif not output.quiet:
        console.print_line(f"wrote {path}  {size:,} bytes  test accuracy {now:.2%}, of the float file {was:.2%}")


def _learning_rate(quantization: QuantConfig, calibration: CalibrationConfig) -> float:
    """Return the default learning rate: the fewer the bits, the farther the weights have to go."""
    if calibration.mode == "qaft":
        return QAFT_LR
    fewest = min(_count(quantization.w_bits), _count(quantization.a_bits))
    return next(rate for bits, rate in LEARNING_RATES if fewest <= bits)


def _has_levels(quantization: QuantConfig) -> bool:
    """Tell whether weights or activations are binary or ternary, where a teacher has paid."""
    return isinstance(quantization.w_bits, str) or isinstance(quantization.a_bits, str)


def _count(bits: Bits) -> int:
    return bits if isinstance(bits, int) else {"binary": 1, "ternary": 2}[bits]


def _ending(quantization: QuantConfig, calibration: CalibrationConfig) -> str:
    if calibration.mode == "qaft":
        return "-qaft.safetensors"
    return f"-w{quantization.w_bits}a{quantization.a_bits}.safetensors"


def _plan(artifact: Path | None, code: CodeOptions, quantization: QuantConfig) -> list[dict[str, Any]]:
    """Return, for each layer, its weight's and its input's quantizer, or why it stays float."""
    from micronet.artifact.layer_table import describe_slot
    from micronet.cli import stages
    from micronet.quantization.quantize import quantize_model

    if artifact is None:
        raise MicronetError(
            "--dry-run plans for an artifact; give one, for example micronet quantize float.safetensors"
        )
    opened = stages.open_artifact(artifact, code, "quantize")
    placed = quantize_model(opened.model, quantization)[1].result
    rows = []
    for name, source in placed["inputs"].items():
        weight = placed["quantizers"].get(name, {}).get("weight_quantizer")
        module, _, slot = (source or "").rpartition(".")
        read = placed["quantizers"].get(module, {}).get(slot)
        rows.append(
            {
                "layer": name,
                "weight": describe_slot(weight) if weight else "float",
                "input": f"{describe_slot(read)}, at {module}" if read else "float",
                "note": "",
            }
        )
    rows += [
        {"layer": name, "weight": "float", "input": "float", "note": why} for name, why in placed["left_float"].items()
    ]
    return rows


def _print_plan(rows: list[dict[str, Any]], json: bool) -> None:
    if json:
        console.print_json(rows)
    else:
        console.print_table(("layer", "weight", "input", "note"), [tuple(row.values()) for row in rows])
