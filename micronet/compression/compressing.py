"""The work of ``compress``: measure, search, confirm, choose."""

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from micronet.artifact.artifact import save, weights_hash
from micronet.compression.bits import FEW, SHARES, STORES_FEW, slow_times, try_bits, try_few_bits, try_learned_rounding
from micronet.compression.costs import CostTable, Deployment
from micronet.compression.groups import Groups
from micronet.compression.judge import DataJudge, quality
from micronet.compression.keys import open_notes
from micronet.compression.layers import Layer, find_layers
from micronet.compression.narrowing import POINTS, UNIFORM, Cuts, Narrowing, uniform_name
from micronet.compression.original import measure_original
from micronet.compression.outline import outline
from micronet.compression.plan import Basis, Plan
from micronet.compression.point import Point
from micronet.compression.prediction import Prediction
from micronet.compression.result import conclude
from micronet.compression.rounds import Rounds, epoch_seconds
from micronet.compression.sensitivities import bits_noise, noise_of, rounding_seconds
from micronet.compression.stage import Compress
from micronet.compression.words import describe_choice, describe_limit
from micronet.compression.workshop import Workshop
from micronet.core.config import flatten
from micronet.core.timing import NOISE
from micronet.data.dataset import Dataset, DataSpec
from micronet.data.memory import MemoryData
from micronet.errors import MicronetError
from micronet.evaluation.accuracy import predictor
from micronet.graph.ops import BATCH_NORMS
from micronet.graph.plain_weights import with_plain_weights
from micronet.models.device import Inputs, pick_device
from micronet.models.modes import copy_model, eval_mode
from micronet.quantization.config import INTEGER_BITS, CalibrationConfig
from micronet.quantization.fold import can_fold
from micronet.stages.inputs import calibration_batches, example_input, open_data, reference_of
from micronet.stages.stage import Context, Outcome

RECOVERED = 0.02  # of the drop, by training with quantizers
TIMING_SHARE = 0.15  # of the budget, for timing layers


class Compressing:
    """One search."""

    def __init__(self, settings: Compress, context: Context) -> None:
        self._in_memory = context.memory.source is not None
        if self._in_memory and settings.output is None:
            settings = replace(settings, output=context.output.parent / "small")  # temporary
        self.settings, self.progress, self.artifact = settings, context.progress, context.artifact
        self.goal, self.timed = settings.goal, not settings.timing.skip_timing
        if isinstance(settings.data.data, MemoryData):
            raise MicronetError("data in memory cannot be written into a recipe; pass the name of a data set")

    @cached_property
    def data(self) -> Dataset:
        """The data, with the original's outputs if the task needs them."""
        spec = DataSpec.from_json(self.artifact.data)
        if self.settings.data.data is None and spec.name is None:
            raise MicronetError("the artifact does not record a data set; specify one with --data")
        stages = [record.stage for record in self.artifact.history]
        for line in describe_limit(self.settings.data.limit, spec.limit, stages):
            self.progress.line(line)
        opened = open_data(self.settings.data, self.artifact, self.settings.seed)
        return opened.with_reference(reference_of(copy_model(self.model)))

    @property
    def model(self) -> nn.Module:
        """The original network."""
        return self.artifact.model

    @cached_property
    def plain(self) -> nn.Module:
        """The original network with its layers as ``prune`` and ``quantize`` see them: with their weights stored."""
        return with_plain_weights(self.model, self.example, "pruning")[0]

    @cached_property
    def example(self) -> Any:
        """An input for tracing."""
        return example_input(replace(self.artifact, data=self.data.spec.to_json()))

    @cached_property
    def batches(self) -> list[Any]:
        """Inputs to measure noise on."""
        return list(calibration_batches(self.data, CalibrationConfig(mode="ptq"), self.settings.seed))

    @cached_property
    def groups(self) -> Groups:
        """The groups of channels that may be cut; empty, with the reason, if none can be."""
        return Groups.find(self.plain, self.example)

    @cached_property
    def layers(self) -> dict[str, Layer]:
        """The network's layers."""
        return find_layers(self.plain, self.example, self.groups.channels)

    @cached_property
    def workshop(self) -> Workshop:
        """Where candidates are made."""
        settings = self.settings
        original, folder = settings.artifact, settings.folder
        if self._in_memory:
            original = folder / "original.safetensors"
            if not self.artifact.spec.name:
                raise MicronetError(
                    "this network cannot be rebuilt from a file; save it first with micronet.save and build"
                )
        deployment = Deployment(settings.runtime, settings.batch, settings.threads)
        weights = weights_hash(self.model) if self._in_memory else ""
        notes = open_notes(settings, deployment, self.artifact.data or {}, weights)
        if self._in_memory:
            folder.mkdir(parents=True, exist_ok=True)
            save(self.artifact, original)
        judge = DataJudge(self.data, settings.metric)
        return Workshop(
            self._basis(original), folder, notes, judge, deployment, self.progress, settings.budget_seconds, self.timed
        )

    def _basis(self, original: Path) -> Basis:
        """Return what all plans share."""
        given = {**flatten(self.settings.data), "seed": self.settings.seed, "device": self.settings.device}
        options = {name: value for name, value in given.items() if value is not None}
        code = self.settings.code
        trusted = code.trust_code or (self._in_memory and self.artifact.spec.runs_user_code)  # it runs here already
        first = {"model": code.model} if code.model else {}  # the recipe hands it on to later stages
        if trusted and not code.model:
            options["trust_code"] = True
        task = self.data.task
        return Basis(
            original, options, first, self.settings.runtime, self.groups.multiple,
            teaches=task.has_classes or task.needs_reference,
            has_norms=any(isinstance(module, BATCH_NORMS) for module in self.plain.modules()),
            folds_norms=can_fold(self.plain, self.example),
        )  # fmt: skip

    @cached_property
    def prediction(self) -> Prediction:
        """What plans cost."""
        table = None
        if self.goal.quantity == "latency":
            seconds = TIMING_SHARE * self.settings.budget_seconds
            table = CostTable.open(self.workshop.deployment, self.workshop.folder, seconds, self.workshop.progress)
        return Prediction(self.goal.quantity, self.layers, self.groups.widths, table)

    def run(self) -> Outcome:
        """Search within the budget; return the chosen network and what was found."""
        Deployment(self.settings.runtime).check(self.settings.artifact)
        if self.settings.dry_run:
            walk = f"{len(POINTS)} plans of a walk that cuts the channels that save most for what they lose"
            names = [walk, *map(uniform_name, UNIFORM)] if self.groups.widths else []
            return Outcome(None, {"plan": outline(self, names, len(POINTS) + len(UNIFORM) if names else 0)})
        workshop, judge = self.workshop, self.workshop.judge
        if isinstance(judge, DataJudge) and judge.metric is not None:
            with eval_mode(self.model):
                judge.check_metric(predictor(self.model))  # type: ignore[arg-type]  # it only runs
        whole = measure_original(workshop, self.settings)
        if self.goal.quantity == "macs" and whole.macs is None:
            raise MicronetError("the multiply-accumulates of this network cannot be counted; use --target-latency")
        if self.goal.is_met_by(1.0):
            self.progress.line("the original meets the target already")
        int8 = try_bits(workshop, self.prediction, self.goal.max_drop, self._alone)
        if SHARES and self.goal.quantity == "size" and self.settings.runtime in STORES_FEW:
            try_few_bits(workshop, self.prediction, lambda: self._alone(FEW))
        if not isinstance(self.batches[0], Inputs) or len(self.batches[0]) == 1:
            try_learned_rounding(workshop, self._base(int8), lambda: rounding_seconds(self.plain, self.batches))
        self._prune(self._rounds(), int8)
        return self._finish()

    def _rounds(self) -> Rounds:
        settings = self.settings
        epoch = 0.0
        if not settings.no_training:
            device = pick_device(settings.device)
            notes = self.workshop.notes
            epoch = notes.once("seconds of an epoch", lambda: epoch_seconds(self.model, self.data, device))
        return Rounds(self.workshop, epoch, self.goal, len(self.data.train))

    def _alone(self, bits: int = INTEGER_BITS) -> dict[str, dict[str, float]]:
        """Return what each layer costs if it alone has few bits."""

        def measure() -> dict[str, dict[str, float]]:
            return bits_noise(self.plain, self.batches, bits, self._quality, self.workshop.progress)

        found: dict[str, dict[str, float]] = self.workshop.notes.once(f"layers with {bits} bits", measure)
        return found

    def _quality(self, model: nn.Module) -> float:
        """Return a network's metric on the validation data."""
        judge = self.workshop.judge
        with eval_mode(model):
            whole, *_ = judge.measure(predictor(model), lambda *_: None)  # type: ignore[arg-type]  # it only runs
        return quality(judge, whole)

    def _base(self, int8: Point) -> Plan:
        """Return the cheapest plan so far that keeps the drop, or would after training: what is then narrowed.

        Of those that are as fast within the noise of timing, it is the first and simplest: conversions next to float
        layers do not vanish with the channels. Where ``int8`` has 7 bits, since 8 can saturate, no candidate is built
        on 8.
        """
        made = [point for point in self.workshop.points if not point.failed]
        if int8.plan.bits != INTEGER_BITS:
            made = [point for point in made if point.plan.bits != INTEGER_BITS]
        allowed = self.goal.max_drop + (0.0 if self.settings.no_training else RECOVERED)
        within = [point for point in made if point.keeps(allowed)]
        if self.goal.quantity == "macs":  # bits change none
            return within[-1].plan
        if self.goal.quantity == "latency":
            limit = NOISE * min(map(self.goal.value, within))
            return next(point.plan for point in within if self.goal.value(point) <= limit)
        return min(within, key=lambda point: (self.goal.value(point), point.drop)).plan

    def _prune(self, rounds: Rounds, int8: Point) -> None:
        """Make the candidates that are narrower; ``int8``: the one whose layers are all quantized."""
        if not self.groups.widths:
            self.progress.line(f"channels are not cut: {self.groups.why}")
        seconds = 60 * self.workshop.points[-1].minutes
        narrows = bool(self.groups.widths) and self.workshop.has_time("narrower candidates", seconds)
        narrowing = Narrowing(self.workshop, self.prediction, self.groups, self.goal)
        plans = narrowing.plans(self._base(int8), self._cuts()) if narrows else []
        if self.settings.no_training:
            made = [point.plan for point in self.workshop.points]  # rehearsed
            for name, plan in plans:
                if plan not in made:
                    self.workshop.attempt(name, plan)
            while (found := narrowing.between()) is not None and self.workshop.attempt(*found):
                pass
            return
        if not int8.failed and int8.drop > self.goal.max_drop / 2:
            plans = [(name, replace(plan, trained_bits=not plan.is_float)) for name, plan in plans]
            plans = [(f"{int8.name}, QAT", replace(int8.plan, trained_bits=True)), *plans]
        rounds.run(plans)
        rounds.refine(narrowing.between)

    def _cuts(self) -> Cuts:
        """Return the noise of cutting shares of each group alone."""
        noise = noise_of(self.plain, self.batches)
        found: Cuts = self.workshop.notes.once("groups cut", lambda: self.groups.noise(noise, self.workshop.progress))
        return found

    def _finish(self) -> Outcome:
        """Choose, test the chosen network, write everything and return the summary."""

        def describe(point: Point) -> list[str]:
            times = slow_times(self.workshop, self.prediction, point.plan)
            return describe_choice(point, self.groups.named(), self._known_alone(), times)

        summary = conclude(self.workshop, self.goal, describe)
        return Outcome(self._product(Path(summary["files"]["network"])), summary)

    def _product(self, path: Path) -> Any:
        from micronet.artifact.artifact import load

        return load(path, self.settings.code.model, trust_code=self.settings.code.trust_code or self._in_memory)

    def _known_alone(self) -> dict[int, dict[str, dict[str, float]]]:
        """Return what layers cost alone, by bits, as far as that was measured."""
        noted = self.workshop.notes.found
        return {bits: self._alone(bits) for bits in (INTEGER_BITS, FEW) if f"layers with {bits} bits" in noted}
