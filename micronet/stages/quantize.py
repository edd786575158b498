"""The ``quantize`` stage: quantizers into a network, with training (QAT), without it (PTQ), or trained on (QAFT)."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from micronet.core.config import group, setting
from micronet.errors import MicronetError
from micronet.quantization.config import Bits, CalibrationConfig, QuantConfig, RecoveryConfig
from micronet.stages.config import NewNetworkSettings, input_file
from micronet.stages.stage import Context, Outcome, Stage
from micronet.stages.train import FINETUNE, run_context
from micronet.training.config import TrainConfig

if TYPE_CHECKING:
    from torch import nn

    from micronet.artifact.history import StageRecord

QAT = TrainConfig(epochs=2)  # short, since the float network is trained already
QAFT_LR = 1e-5
# The smaller of the weights' and the activations' bits -> the learning rate that worked best (see BENCHMARKS.md).
LEARNING_RATES = ((1, 0.02), (3, 0.005), (6, 0.002), (16, 0.001))


@dataclass(frozen=True)
class QuantizeSettings(NewNetworkSettings):
    """The settings of ``quantize``."""

    artifact: Path | None = input_file(
        "A float artifact, or with --mode ptq any float .onnx file. Without one, a network is trained first.",
        None,
        kinds=(".safetensors", ".onnx"),
    )
    trust_code: bool = setting(False, "Run the code recorded in the artifact.")
    dry_run: bool = setting(
        False, "Print the plan, layer by layer, without writing anything.", run_only=True, api=False, basic=True
    )
    calibration: CalibrationConfig = group(CalibrationConfig)
    quantization: QuantConfig = group(QuantConfig)
    recovery: RecoveryConfig = group(RecoveryConfig)
    training: TrainConfig = group(QAT)

    @property
    def is_onnx(self) -> bool:
        """Whether the input is an ONNX file."""
        return self.artifact is not None and self.artifact.suffix == ".onnx"


class Quantize(Stage):
    """Quantizes a network."""

    name = "quantize"
    details = (
        "Without an artifact, the network of --model is first trained on --data with the defaults of `micronet train`. "
        "Binary and ternary networks also learn from the float artifact's scores, unless --distill names another "
        "teacher. --mode qaft takes a quantized artifact and trains it with frozen ranges, at a learning rate of 1e-5 "
        "by default."
    )
    example = "micronet quantize float.safetensors --w-bits 8 --a-bits 8 --q-type sym --epochs 1 -o int8.safetensors"
    Config = QuantizeSettings
    takes_batches = True
    advanced = ("lr", "batch_size", "model", "device")
    cannot_follow = {  # noqa: RUF012  # never changed
        "quantize": "it is quantized already; run finetune or --mode qaft on it, or quantize the float artifact again"
    }

    def check(self, config: QuantizeSettings) -> None:
        """Refuse settings that the mode or the input has no use for."""
        if config.artifact is not None:
            config.model.check_unused()
        if config.is_onnx:
            _check_onnx(config)
        elif config.calibration.mode == "ptq" and config.training != QAT:
            raise MicronetError("--mode ptq does not train; leave the training options out, or use --mode qat")
        if config.dry_run and config.recovery.target_drop is not None:
            raise MicronetError("--target-drop needs measurements, which --dry-run skips; leave one of them out")
        if config.dry_run and config.artifact is None:
            raise MicronetError("--dry-run needs an artifact, as in micronet quantize float.safetensors --dry-run")
        if config.calibration.mode == "qaft" and config.artifact is None:
            raise MicronetError("--mode qaft trains a quantized artifact; name it")
        _check_mode(config)

    def check_order(self, history: Iterable[str], config: Any) -> None:
        """Refuse an artifact that is quantized already, or for QAFT one that is not."""
        history = list(history)
        if config.calibration.mode != "qaft":
            super().check_order(history, config)
            return
        if "quantize" not in history:
            raise MicronetError(
                "--mode qaft trains a quantized artifact; quantize it first: micronet quantize ARTIFACT --mode ptq"
            )
        FINETUNE.check_order(history, config)

    def trains(self, config: QuantizeSettings) -> bool:
        """Return True unless only calibration runs on an artifact."""
        return config.calibration.mode != "ptq" or config.artifact is None

    def records(self, config: Any) -> list[str]:
        """Return the stages added: after a training if there is no artifact."""
        if config.is_onnx:
            return []
        if config.calibration.mode == "qaft":
            return ["finetune"]
        added = ["bn-fuse", "quantize"] if config.recovery.equalize else ["quantize"]  # equalizing folds batch norms
        return added if config.artifact is not None else ["train", *added]

    def writes(self, config: QuantizeSettings) -> str | None:
        """Return the suffix of the result: that of the input, or none of a plan."""
        if config.dry_run:
            return None
        return ".onnx" if config.is_onnx else ".safetensors"

    def default_output(self, config: QuantizeSettings) -> Path:
        """Return a name that holds the bits."""
        if config.is_onnx:
            ending = "int8.onnx"
        elif config.calibration.mode == "qaft":
            ending = "qaft.safetensors"
        else:
            ending = f"w{config.quantization.w_bits}a{config.quantization.a_bits}.safetensors"
        path = config.artifact or config.model.file
        return path.with_name(f"{path.stem}-{ending}")

    def run(self, config: QuantizeSettings, context: Context) -> Outcome:
        """Quantize an artifact or an ONNX file, or plan it."""
        if config.is_onnx:
            from micronet.stages.quantize_onnx import quantize_file

            return quantize_file(config, context)
        from micronet.stages.quantize_network import Quantizing, float_artifact, plan

        if config.dry_run:
            return Outcome(None, plan(context.artifact, config.quantization))
        run, artifact = run_context(config, context), context.source
        path = None if config.artifact in context.memory.artifacts else config.artifact
        if artifact is None:
            artifact, path = float_artifact(config, run)
            path = None if context.temporary else path
        training = (
            replace(config.training, lr=_learning_rate(config)) if config.training.lr is None else config.training
        )
        if _has_levels(config.quantization) and config.calibration.mode == "qat" and training.distill is None and path:
            training = replace(training, distill=path)
            context.progress.line(f"also learning from {path}; --distill-weight 0 uses the labels alone")
        if context.memory.batches is not None and config.data.data is None and config.training != QAT:
            raise MicronetError("input batches have no labels to train on; name a data set with --data")
        work = Quantizing(artifact, replace(config, training=training), run, context.memory.batches)
        done = work.qaft() if config.calibration.mode == "qaft" else work.run_quantization()
        return Outcome(done, {**done.metrics, "left_float": done.history[-1].result.get("left_float", {})})

    def write(self, product: Any, path: Path) -> None:
        """Write an artifact or an ONNX file."""
        if path.suffix != ".onnx":
            super().write(product, path)
            return
        from micronet.onnx.export import write_onnx

        write_onnx(product, path)

    def restore(self, model: "nn.Module", record: "StageRecord") -> "nn.Module":
        """Place the recorded quantizers."""
        from micronet.quantization.quantize import restore

        return restore(model, record)


def _check_mode(config: QuantizeSettings) -> None:
    quantization, calibration = config.quantization, config.calibration
    without = replace(config.recovery, equalize=False, target_drop=None)
    if calibration.mode == "qat" and without != RecoveryConfig():
        raise MicronetError(
            "--adaround, --bias-correct and --bn-reestimate replace training; use --mode ptq, or leave them out"
        )
    if quantization.method == "dorefa" and quantization.a_bits != "binary" and calibration.calibrator != "minmax":
        raise MicronetError("--method dorefa has a fixed activation range (1 / --a-gain); leave --calibrator out")
    if quantization.bn_fuse and (config.recovery.equalize or without.bias_correct or without.bn_reestimate):
        raise MicronetError(
            "--bn-fuse folds batch norms during training; leave it out with --equalize, --bias-correct, --bn-reestimate"
        )
    unchanged = (quantization, replace(calibration, mode="qat"), config.recovery)
    if calibration.mode == "qaft" and unchanged != (QuantConfig(), CalibrationConfig(), RecoveryConfig()):
        raise MicronetError("--mode qaft trains what is quantized already; leave the quantization options out")


def _check_onnx(config: QuantizeSettings) -> None:
    """Refuse what cannot be done to an ONNX file."""
    if config.model.model is not None or config.trust_code:
        raise MicronetError("an ONNX file needs no code; leave --model and --trust-code out")
    if config.calibration.mode != "ptq":
        raise MicronetError("an ONNX file cannot be trained; add --mode ptq, or give the artifact it came from")
    if config.dry_run or config.recovery != RecoveryConfig() or config.training != QAT:
        raise MicronetError("for an ONNX file, leave out --dry-run and the recovery and training options")
    from micronet.onnx.config import check_quantization

    check_quantization(config.quantization)


def _learning_rate(config: QuantizeSettings) -> float:
    """Return the default learning rate: the fewer the bits, the farther the weights have to move."""
    if config.calibration.mode == "qaft":
        return QAFT_LR
    fewest = min(_count(config.quantization.w_bits), _count(config.quantization.a_bits))
    return next(rate for bits, rate in LEARNING_RATES if fewest <= bits)


def _has_levels(quantization: QuantConfig) -> bool:
    """Return True if weights or activations are binary or ternary; these gain from a teacher."""
    return isinstance(quantization.w_bits, str) or isinstance(quantization.a_bits, str)


def _count(bits: Bits) -> int:
    return bits if isinstance(bits, int) else {"binary": 1, "ternary": 2}[bits]


QUANTIZE = Quantize()
