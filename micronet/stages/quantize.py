"""The ``quantize`` stage: quantizers into a network, with training (QAT), without it (PTQ), or trained on (QAFT)."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from micronet.core.config import changed, flag, group, setting
from micronet.core.files import write_bytes
from micronet.errors import MicronetError
from micronet.onnx.config import InputConfig
from micronet.quantization.config import FLOAT_BITS, CalibrationConfig, QuantConfig, RecoveryConfig
from micronet.stages.config import ModelConfig, TimingConfig, TrainingSettings, check_teacher, input_file
from micronet.stages.quantize_defaults import is_taught, with_defaults
from micronet.stages.stage import BEFORE_FUSING, Context, Outcome, Purpose, Stage
from micronet.stages.train import run_context
from micronet.stages.words import noun_of, stage_after_training
from micronet.training.config import TrainConfig

QAT = TrainConfig(epochs=2)  # short, since the float network is trained already


@dataclass(frozen=True)
class Quantize(TrainingSettings, Stage):
    """Quantizes a network."""

    name = "quantize"
    details = (
        "Without an artifact, the network given by --model is first trained on --data with the defaults of `micronet "
        "train`. Networks quantized to 4 bits or fewer are also distilled from the float artifact, unless --distill "
        "specifies another teacher. --mode qaft trains a quantized artifact with frozen ranges, by default at a "
        "learning rate of 1e-5."
    )
    example = "micronet quantize float.safetensors --w-bits 8 --a-bits 8 --q-type sym --epochs 1 -o int8.safetensors"
    restorer = "micronet.quantization.quantize:restore"
    advanced = ("preset", "lr", "batch_size", "model", "device")
    cannot_follow = {  # noqa: RUF012  # never changed
        "quantize": "it is already quantized; run finetune or --mode qaft on it, or quantize the float artifact again"
    }

    artifact: Path | None = input_file(
        "A float artifact or, with --mode ptq, any float .onnx file. Without one, a network is trained first.",
        None,
        kinds=(".safetensors", ".onnx"),
    )
    trust_code: bool = setting(False, "Allow code stored in the artifact to run.")
    dry_run: bool = setting(
        False, "Print the plan, layer by layer, without writing anything.", run_only=True, api=False, basic=True
    )
    calibration: CalibrationConfig = group(CalibrationConfig)
    quantization: QuantConfig = group(QuantConfig)
    recovery: RecoveryConfig = group(RecoveryConfig)
    inputs: InputConfig = group(InputConfig)
    timing: TimingConfig = group(TimingConfig)
    model: ModelConfig = group(ModelConfig)
    training: TrainConfig = group(QAT)

    @property
    def is_onnx(self) -> bool:
        """Whether the input is an ONNX file."""
        return self.artifact is not None and self.artifact.suffix == ".onnx"

    def plain_weights(self) -> Purpose:
        """Return what follows: a training changes them."""
        return "running" if self.calibration.mode == "ptq" else "training"

    def check(self) -> None:
        """Refuse settings that the mode or the input has no use for."""
        mode, recovery = self.calibration.mode, self.recovery
        if self.artifact is not None:
            self.model.check_unused()
        if not is_taught(self.calibration, self.quantization):
            check_teacher(self.training)
        if self.is_onnx:
            self._check_onnx()
        elif self.inputs != InputConfig():
            given = " and ".join(map(flag, changed(self.inputs)))
            raise MicronetError(f"only ONNX files support {given}; drop {given}")
        elif mode == "ptq" and self.training != QAT:
            raise MicronetError("--mode ptq does not train; drop the training options, or use --mode qat")
        if self.dry_run and recovery.target_drop is not None:
            raise MicronetError(
                "--target-drop requires measuring accuracy, which --dry-run does not do; drop one of them"
            )
        if self.dry_run and self.artifact is None:
            raise MicronetError(
                "--dry-run needs an artifact, for example micronet quantize float.safetensors --dry-run"
            )
        undone = replace(recovery, equalize=False, target_drop=None)
        if mode == "qat" and undone != RecoveryConfig():
            given = " and ".join(map(flag, changed(undone)))
            raise MicronetError(f"training would undo {given}; add --mode ptq, or drop {given}")
        if self.calibration.float_weights is not None:
            self._check_float_weights()
        if mode != "ptq" and self.calibration.makes_images:
            raise MicronetError(
                "--calib-data none only applies to --mode ptq, because training needs data; add --mode ptq"
            )
        self._check_scheme()
        if mode == "qaft" and self.artifact is None:
            raise MicronetError("--mode qaft needs a quantized artifact; specify one")
        unchanged = (self.quantization, replace(self.calibration, mode="qat"), recovery)
        if mode == "qaft" and unchanged != (QuantConfig(), CalibrationConfig(), RecoveryConfig()):
            raise MicronetError(
                "--mode qaft trains an artifact that is already quantized; drop the quantization options"
            )

    def _check_scheme(self) -> None:
        """Refuse settings that the quantization scheme has no use for."""
        quantization, recovery = self.quantization, self.recovery
        if quantization.a_sign == "signed" and quantization.q_type == "asym" and not self.is_onnx:
            raise MicronetError("--a-sign signed has no effect with --q-type asym; drop one of them")
        fixed = quantization.method == "dorefa" and quantization.a_bits != "binary"
        if fixed and self.calibration.calibrator not in (None, "minmax"):
            raise MicronetError("--method dorefa has a fixed activation range (1 / --a-gain); drop --calibrator")
        if quantization.bn_fuse and (recovery.equalize or recovery.bias_correct or recovery.bn_reestimate):
            raise MicronetError(
                "--bn-fuse folds batch norms during training; drop it, or drop --equalize, --bias-correct and "
                "--bn-reestimate"
            )

    def _check_float_weights(self) -> None:
        """Raise MicronetError if --float-weights cannot take effect."""
        bits = self.quantization
        if self.calibration.mode != "qat":
            raise MicronetError("--float-weights only applies to --mode qat; drop it, or drop --mode")
        if self.training.patience is not None and self.calibration.float_weights:
            raise MicronetError("--patience would stop the training before weights are quantized; drop --float-weights")
        if FLOAT_BITS in (bits.w_bits, bits.a_bits):
            raise MicronetError(
                "--float-weights requires quantized weights and activations; lower --w-bits and --a-bits, or drop "
                "--float-weights"
            )

    def _check_onnx(self) -> None:
        """Refuse what cannot be done to an ONNX file."""
        if self.model.model is not None or self.trust_code:
            raise MicronetError("--model and --trust-code have no effect on ONNX files; drop them")
        if self.calibration.mode != "ptq":
            raise MicronetError(
                "ONNX files cannot be trained; add --mode ptq, or pass the artifact that the file was exported from"
            )
        if self.dry_run or replace(self.recovery, bias_correct=False) != RecoveryConfig() or self.training != QAT:
            raise MicronetError(
                "ONNX files do not support --dry-run, training, or any recovery option except --bias-correct; drop them"
            )
        if self.calibration.makes_images:
            raise MicronetError(
                "--calib-data none needs the batch norms of an artifact, but this is an ONNX file; pass a folder of "
                "images, or the artifact that the file was exported from"
            )
        from micronet.onnx.config import check_quantization

        check_quantization(self.quantization)

    def check_order(self, history: list[str]) -> None:
        """Refuse an artifact that is quantized already, or for QAFT one that is not."""
        if self.calibration.mode != "qaft":
            super().check_order(history)
        elif "quantize" not in history:
            raise MicronetError(
                "--mode qaft trains a quantized artifact; quantize it first: micronet quantize ARTIFACT --mode ptq"
            )
        elif "bn-fuse" in history:
            raise MicronetError(f"--mode qaft cannot follow bn-fuse: {BEFORE_FUSING}")

    def trains(self) -> bool:
        """Return True unless only calibration runs on an artifact."""
        return self.calibration.mode != "ptq" or self.artifact is None

    def needs_data(self) -> bool:
        """Return True unless only generated images are needed."""
        return not self.calibration.makes_images

    def records(self) -> list[str]:
        """Return the stages added: after a training if there is no artifact."""
        if self.is_onnx:
            return []
        if self.calibration.mode == "qaft":
            return ["finetune"]
        added = ["bn-fuse", "quantize"] if self.recovery.equalize else ["quantize"]  # equalizing folds batch norms
        return added if self.artifact is not None else ["train", *added]

    def writes(self) -> str | None:
        """Return the suffix of the result: that of the input, or none of a plan."""
        if self.dry_run:
            return None
        return ".onnx" if self.is_onnx else ".safetensors"

    def default_output(self) -> Path:
        """Return a name that holds the bits."""
        if self.is_onnx:
            ending = "int8.onnx"
        elif self.calibration.mode == "qaft":
            ending = "qaft.safetensors"
        else:
            ending = f"w{self.quantization.w_bits}a{self.quantization.a_bits}.safetensors"
        path = self.artifact or self.model.file
        return path.with_name(f"{path.stem}-{ending}")

    def next_stage(self, product: Any) -> str | None:
        """Return what an artifact's batch norms need; nothing follows an ONNX file."""
        return None if self.is_onnx else stage_after_training(product)

    def run(self, context: Context) -> Outcome:
        """Quantize an artifact or an ONNX file, or plan it."""
        if self.is_onnx:
            from micronet.stages.quantize_onnx import quantize_file

            return quantize_file(self, context)
        from micronet.stages.float_network import float_artifact
        from micronet.stages.quantize_network import Quantizing
        from micronet.stages.quantize_plan import plan
        from micronet.stages.quantize_warnings import warn_constant, warn_fixed_sizes, warn_poor, warn_untraced

        if self.dry_run:
            return Outcome(None, plan(context.artifact, self.quantization))
        run, artifact = run_context(self, context), context.source
        path = None if self.artifact in context.memory.artifacts else self.artifact
        if artifact is None:
            artifact, path = float_artifact(self, run)
            path = None if context.temporary else path
        task = self.data.task or (artifact.data or {}).get("task")
        settled = with_defaults(self, path, task)
        if settled.training.distill != self.training.distill:
            context.progress.line(f"also distilling from {path}; to turn this off, pass --distill-weight 0")
        if share := settled.calibration.float_weights:
            context.progress.line(f"weights stay in float for the first {share:.0%} of the steps, except in validation")
        work = Quantizing(artifact, settled, run)
        if self.calibration.mode == "qat" and work.dataset is None:
            self._check_untrained(context)
        qaft = self.calibration.mode == "qaft"
        if not qaft:
            warn_constant(work.calibration_inputs, context.progress)
        untraced = not qaft and warn_untraced(artifact.model.to(run.device), work.example, context.progress)
        done = work.qaft() if qaft else work.run_quantization()
        if not untraced:
            warn_fixed_sizes(artifact.model, done.history[-1], work.example, context.progress)
        warn_poor(done.metrics, self.calibration.mode, context.progress)
        about = {"noun": noun_of(done), "tested_on": getattr(work.dataset, "tested_on", ""), "untraced": untraced}
        return Outcome(done, {**done.metrics, **about, "left_float": done.history[-1].result.get("left_float", {})})

    def _check_untrained(self, context: Context) -> None:
        """Say that nothing is trained, because there are no labels; raise MicronetError if settings ask for that."""
        if self.training != QAT and self.training.epochs:
            raise MicronetError(
                "there are no labels to train on; pass batches of (inputs, labels) or a data set with --data or, "
                "without labels, add --task agreement"
            )
        if self.data.data is not None:
            context.progress.line("the data have no labels, so ranges are set, but nothing is trained")

    def write(self, product: Any, path: Path) -> None:
        """Write an artifact or an ONNX file."""
        if self.is_onnx:
            write_bytes(path, product.SerializeToString())
        else:
            super().write(product, path)
