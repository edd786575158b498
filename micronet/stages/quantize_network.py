"""The work of ``quantize``: placing, calibrating, recovering accuracy, training."""

from dataclasses import dataclass, replace
from functools import cached_property, partial

from torch import Tensor, nn

from micronet.artifact.artifact import Artifact, tensor_bytes
from micronet.artifact.header import StageRecord
from micronet.core.progress import reported
from micronet.data.dataset import Dataset
from micronet.data.memory import NAME as MEMORY
from micronet.data.memory import MemoryData
from micronet.errors import FailedError, MicronetError, count
from micronet.graph.trace import trace
from micronet.models.device import as_inputs, head, to_device
from micronet.models.modes import copy_model
from micronet.models.precision import check_precision
from micronet.quantization.calibrate import (
    calibrate,
    collect,
    freeze,
    freeze_activations,
    frozen,
    observing,
    record_activations,
    recorded_places,
    set_ranges,
)
from micronet.quantization.config import CALIBRATOR, CalibrationConfig, QuantConfig
from micronet.quantization.dry_run import find_infinite
from micronet.quantization.equalize import equalize
from micronet.quantization.fold import fold_model
from micronet.quantization.heads import Head, excluding, find_destroyed, find_heads
from micronet.quantization.histogram import Statistics
from micronet.quantization.placement import Placement
from micronet.quantization.quantize import quantize_model
from micronet.quantization.reconstruct import reconstruct
from micronet.quantization.recovery import correct_biases, give_biases, reestimate_norms
from micronet.quantization.sensitivity import Probe, keep_sensitive, measure_sensitivity
from micronet.quantization.staged import StagedWeights
from micronet.quantization.weight_scales import search_weight_scales
from micronet.stages.inputs import (
    cached,
    calibration_batches,
    check_accepts,
    generated_batches,
    open_data,
    reference_of,
    validation_accuracy,
)
from micronet.stages.quantize import Quantize
from micronet.stages.quantize_defaults import stays_close
from micronet.stages.train import fit_stage, say_start
from micronet.tasks.task import describe
from micronet.training import distributed
from micronet.training.checkpoint import Checkpoint
from micronet.training.config import RunContext, TrainHooks
from micronet.training.fits import check_model_fits
from micronet.training.loop import fit_artifact
from micronet.training.preset import settle


@dataclass(frozen=True)
class Quantizing:
    """A float network to quantize, or a quantized one to train on.

    Attributes:
        artifact: The network.
        settings: The stage.
        run: Where and how a training runs.
    """

    artifact: Artifact
    settings: Quantize
    run: RunContext

    @cached_property
    def dataset(self) -> Dataset | None:
        """The data set to train or measure on, which the network takes; None if only inputs are given, or nothing."""
        data, remembered = self.settings.data, (self.artifact.data or {}).get("name")
        if self._inputs_alone is not None:
            data = replace(data, data=None)
            remembered = None if remembered == MEMORY else remembered
        if data.data is None and remembered is None and (self._inputs_alone is not None or self.artifact.data is None):
            return None
        if data.data is None and self.settings.calibration.makes_images:
            return None
        opened = open_data(data, self.artifact, self.run.seed)
        check_precision(self.artifact.model, "quantizing")
        check_model_fits(self.artifact.model, opened)
        return opened.with_reference(reference_of(copy_model(self.artifact.model).to(self.run.device)))

    @cached_property
    def _inputs_alone(self) -> MemoryData | None:
        """The data in memory if only their inputs are of use: there are no labels, or PTQ has no task to measure."""
        settings, data = self.settings, self.settings.data.data
        if not isinstance(data, MemoryData):
            return None
        is_measured = settings.data.task is not None or settings.recovery.target_drop is not None
        if settings.calibration.mode == "ptq" and not is_measured:
            return data
        return None if open_data(settings.data, self.artifact, self.run.seed).is_labelled else data

    @cached_property
    def calibration_inputs(self) -> list[Tensor]:
        """The inputs to calibrate on; empty if there are none."""
        if self._inputs_alone is not None:
            requested = self.settings.calibration.calib_batches  # None: all that are given
            batches = self._checked(self._inputs_alone.inputs(self.artifact.model, requested))
            return [to_device(batch, self.run.device) for batch in batches]
        if self.settings.calibration.makes_images:
            return generated_batches(self.artifact, self.settings.data, self.settings.calibration, self.run)
        if self.dataset is None:
            return []
        config = self.settings.calibration
        found = list(calibration_batches(self.dataset, config, self.run.seed, self.run.device))
        return found if config.calib_data is None else self._checked(found)

    @property
    def example(self) -> Tensor | None:
        """Two of the calibration inputs; None if there are none."""
        return head(self.calibration_inputs[0], 2) if self.calibration_inputs else None

    def _checked(self, batches: list[Tensor]) -> list[Tensor]:
        """Return input batches; raise MicronetError if the network does not take the first of any shape and type."""
        check_precision(self.artifact.model, "quantizing")
        for batch in {describe(batch): batch for batch in reversed(batches)}.values():
            check_accepts(self.artifact.model.to(self.run.device), to_device(batch, self.run.device))
        return batches

    def run_quantization(self) -> Artifact:
        """Place quantizers, set their ranges and, for QAT, train with them."""
        check_precision(self.artifact.model, "quantizing")
        dataset, recovery = self.dataset, self.settings.recovery
        if dataset is not None:
            say_start(dataset, self.artifact, self.settings.training, self.run)
        elif self.settings.calibration.mode == "ptq" and not self.calibration_inputs:
            raise MicronetError("--mode ptq needs calibration data; pass it with --data")
        original = self.artifact.model.to(self.run.device)
        artifact = self._equalized() if recovery.equalize else self.artifact
        config = _as_begun(self.settings.quantization, self.run)
        if recovery.target_drop is not None:
            config = self._config_within_target(artifact.model, config)
        model, record = self._placed(artifact.model, config)
        if self.calibration_inputs:
            placement = Placement.from_json(record.result)
            record.result["biases"] = give_biases(model, self.example) if recovery.bias_correct else []
            self._recover(placement.with_plain_layers(copy_model(artifact.model)), model)
        settings = {
            **_recorded(self.settings.calibration, takes_all=self._inputs_alone is not None),
            **{name: value for name, value in recovery.to_json().items() if value not in (None, False, "minmax")},
        }
        training = self.settings.training
        if dataset is None:
            recorded = {**record.config, **(settings if self.calibration_inputs else {})}
            return replace(artifact.after(replace(record, config=recorded), model=model), metrics={})
        if self.settings.calibration.mode != "qat":
            training = replace(training, epochs=0)
        began = replace(artifact, model=model, history=[*artifact.history, record])
        training = settle(training, began, dataset, self.run)
        close = stays_close([record])
        hooks = TrainHooks(observing, as_evaluated=close, config=settings, way_out="--mode ptq, which does not train,")
        if share := self.settings.calibration.float_weights:
            staged = StagedWeights(model, share)
            hooks = replace(hooks, observe=staged.observing, before_step=staged.before_step)
        fitted = fit_artifact(began, dataset, training, self.run, hooks)
        recorded = {**record.config, **settings, **(training.to_json() if training.epochs else {})}
        if recovery.target_drop is not None:
            accuracy = validation_accuracy(dataset)
            self._check_target(drop=accuracy(original) - accuracy(fitted.model))
        return replace(fitted, history=[*artifact.history, StageRecord(record.stage, recorded, record.result)])

    def qaft(self) -> Artifact:
        """Train a quantized artifact with frozen ranges and batch norms."""
        dataset = open_data(self.settings.data, self.artifact, self.run.seed)
        freeze(self.artifact.model)
        hooks = TrainHooks(frozen, as_evaluated=stays_close(self.artifact.history), config={"mode": "qaft"})
        return fit_stage("finetune", self.artifact, dataset, self.settings.training, self.run, hooks)

    def _equalized(self) -> Artifact:
        """Fold batch norms if there are any, then balance the layers."""
        artifact = self.artifact
        graph = trace(artifact.model, self.example)
        if graph is not None and graph.conv_bn_pairs():
            folded, record = fold_model(artifact.model, example=self.example)
            artifact = artifact.after(record, model=folded)
        self.run.progress.line(f"equalized {count(equalize(artifact.model, self.example), 'pair')} of layers")
        return artifact

    def _config_within_target(self, model: nn.Module, config: QuantConfig) -> QuantConfig:
        if self.dataset is None:
            raise MicronetError("--target-drop measures accuracy and needs a data set; specify it with --data")
        probe = Probe(self.calibration_inputs, self.settings.calibration, validation_accuracy(self.dataset))
        ranked = measure_sensitivity(model, config, probe, self.run.progress)
        config = keep_sensitive(model, config, ranked, probe, (self.settings.recovery.target_drop or 0) / 100)
        self.run.progress.line(f"layers kept at 8 bits: {config.keep_8bit or 'none'}")
        return config

    def _placed(self, floating: nn.Module, config: QuantConfig) -> tuple[nn.Module, StageRecord]:
        """Return a network with quantizers, calibrated if there are inputs, without heads that 8 bits would destroy."""
        progress, infinite, batches = self.run.progress, set[str](), self.calibration_inputs
        model, record = quantize_model(floating, config, self.example, infinite, progress, batches)
        if not batches:
            return model, record
        try:
            statistics, heads = self._set_ranges(model, floating, {})
        except MicronetError:
            infinite = find_infinite(model, self.calibration_inputs)
            if not infinite:
                raise
            model, record = quantize_model(floating, config, self.example, infinite, progress, batches)
            statistics, heads = self._set_ranges(model, floating, {})
        if destroyed := find_destroyed(model, heads):
            config = excluding(config, destroyed)
            model, record = quantize_model(floating, config, self.example, infinite, progress, batches)
            record.result["left_float"] |= {each.layer: str(each) for each in destroyed}
            self._set_ranges(model, floating, statistics)  # those of the other layers' inputs are the same
        return model, record

    def _check_target(self, *, drop: float) -> None:
        """Raise FailedError if the final drop exceeds the target; training and recovery follow the choice of bits."""
        target, mode = self.settings.recovery.target_drop or 0, self.settings.calibration.mode
        if 100 * drop > target:
            raise FailedError(
                f"accuracy fell by {100 * drop:.2f} points after {mode}, but --target-drop allows only {target:g}; "
                "train longer, or remove the recovery options"
            )

    def _recover(self, floating: nn.Module, model: nn.Module) -> None:
        recovery, progress, batches = self.settings.recovery, self.run.progress, self.calibration_inputs
        if recovery.weight_calibrator == "seq-mse":
            progress.line(
                f"selected weight scales for {count(search_weight_scales(floating, model, batches, progress), 'layer')}"
            )
        if recovery.form is not None:
            progress.line(str(reconstruct(floating, model, batches, recovery.form, progress, self.run.seed)))
        if recovery.bn_reestimate:
            progress.line(f"re-estimated {count(reestimate_norms(model, batches), 'batch norm')}")
        if recovery.bias_correct:
            corrected = correct_biases(floating, model, batches, norms_estimated=recovery.bn_reestimate)
            progress.line(f"corrected the mean output of {count(corrected, 'layer')}")

    def _set_ranges(
        self, model: nn.Module, floating: nn.Module, known: Statistics
    ) -> tuple[Statistics, dict[str, Head]]:
        """Set the ranges of a network's quantizers; return the statistics that they are chosen from, and PTQ's heads.

        ``known``: statistics of the float activations; more are collected if these do not hold all that is needed.
        """
        config, inputs = self.settings.calibration, self.calibration_inputs
        calibrator = config.calibrator or CALIBRATOR
        batches = partial(reported, inputs, "calibrating", self.run.progress)
        if config.mode == "qat" and calibrator == CALIBRATOR and config.calib_cache is None:
            calibrate(model, batches())  # moving averages, which training continues
            return {}, {}
        statistics, heads = known, {}
        if not known.keys() >= set(recorded_places(model)):
            arrays = [("images", x) for batch in inputs for x in as_inputs(floating, batch)]
            depends_on = tensor_bytes([*sorted(floating.state_dict().items()), *arrays])
            heads = find_heads(model, self.settings.quantization) if config.mode == "ptq" else {}
            also = {place: each.seen.add for place, each in heads.items()}
            collected = partial(collect, model, batches(), also)
            statistics = cached(config.calib_cache, depends_on, collected, self.run.progress)
            if not all(len(each.seen.low) for each in heads.values()):  # the statistics are those of an earlier run
                record_activations(model, batches(), also)
        set_ranges(model, statistics, calibrator, config.percentile)
        if config.mode == "qat" and calibrator != CALIBRATOR:  # training would move them to the batches' extremes
            freeze_activations(model)
        return statistics, heads


def _recorded(config: CalibrationConfig, *, takes_all: bool) -> dict[str, object]:
    """Return the calibration settings that took part, for the record; ``takes_all``: without a number of batches."""
    recorded: dict[str, object] = {
        "mode": config.mode, "calibrator": config.calibrator or CALIBRATOR,
        "calib_batches": config.calib_batches if takes_all else config.batches,
    }  # fmt: skip
    if config.calibrator == "percentile":
        recorded["percentile"] = config.percentile
    if config.float_weights:
        recorded["float_weights"] = config.float_weights
    if config.calib_data is not None:
        recorded["calib_data"] = str(config.calib_data)
    return recorded


def _as_begun(config: QuantConfig, run: RunContext) -> QuantConfig:
    """Return the settings that a run to resume began with if an earlier version did, whose --q-type was sym."""
    if config.q_type != "auto" or not run.resume:
        return config
    history = distributed.from_rank_zero(Checkpoint.beside(run.output, {}).recorded).get("history") or [{}]
    return replace(config, q_type="sym") if history[-1].get("config", {}).get("q_type") == "sym" else config
