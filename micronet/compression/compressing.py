"""The work of ``compress``: measure, search, confirm, choose."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from micronet.artifact.artifact import save, weights_hash
from micronet.compression.bits import FEW, SHARES, STORES_FEW, try_bits, try_few_bits
from micronet.compression.costs import CostTable, Deployment
from micronet.compression.groups import Groups
from micronet.compression.judge import DataJudge
from micronet.compression.layers import Layer, find_layers
from micronet.compression.notes import Notes
from micronet.compression.outline import outline
from micronet.compression.plan import Basis, Plan
from micronet.compression.point import Point
from micronet.compression.prediction import Prediction
from micronet.compression.result import conclude
from micronet.compression.rounds import Rounds, epoch_seconds
from micronet.compression.search import Walk, narrower, spread
from micronet.compression.sensitivities import bits_noise, noise_of
from micronet.compression.stage import Compress
from micronet.compression.words import describe_choice
from micronet.compression.workshop import Workshop
from micronet.core.config import flatten
from micronet.core.machine import version
from micronet.data.dataset import Dataset, DataSpec
from micronet.data.memory import MemoryData
from micronet.errors import MicronetError, count
from micronet.graph.ops import BATCH_NORMS
from micronet.models.device import pick_device
from micronet.models.modes import copy_model
from micronet.quantization.config import INTEGER_BITS, CalibrationConfig
from micronet.recipe.run import stage_key
from micronet.stages.inputs import calibration_batches, example_input, open_data, reference_of, validation_accuracy
from micronet.stages.stage import Context, Outcome

UNIFORM = (0.25, 0.5)  # shares of all groups that are cut
POINTS = (0.8, 0.65, 0.5, 0.38, 0.28)  # of the base's cost: candidates of the walk
RECOVERED = 0.02  # of the drop, by training with quantizers
TIMING_SHARE = 0.15  # of the budget, for timing layers
NOT_KEYED = ("output", "force", "json", "quiet", "dry_run")
Named = tuple[str, Plan]


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
        opened = open_data(self.settings.data, self.artifact, self.settings.seed)
        return opened.with_reference(reference_of(copy_model(self.model)))

    @property
    def model(self) -> nn.Module:
        """The original network."""
        return self.artifact.model

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
        return Groups.find(self.model, self.example)

    @cached_property
    def layers(self) -> dict[str, Layer]:
        """The network's layers."""
        return find_layers(self.model, self.example, self.groups.channels)

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
        notes = open_notes(settings, weights_hash(self.model) if self._in_memory else "")
        if self._in_memory:
            folder.mkdir(parents=True, exist_ok=True)
            save(self.artifact, original)
        deployment = Deployment(settings.runtime, settings.batch, settings.threads)
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
            has_norms=any(isinstance(module, BATCH_NORMS) for module in self.model.modules()),
        )  # fmt: skip

    @cached_property
    def prediction(self) -> Prediction:
        """What plans cost."""
        table = None
        if self.goal.quantity == "latency":
            seconds = TIMING_SHARE * self.settings.budget_seconds
            table = CostTable.open(self.workshop.deployment, self.workshop.folder, seconds, self.progress)
        return Prediction(self.goal.quantity, self.layers, self.groups.widths, table)

    def run(self) -> Outcome:
        """Search within the budget; return the chosen network and what was found."""
        if self.settings.dry_run:
            walk = f"{len(POINTS)} plans of a walk that cuts the channels that save most for what they lose"
            names = [walk, *map(uniform_name, UNIFORM)] if self.groups.widths else []
            return Outcome(None, {"plan": outline(self, names, len(POINTS) + len(UNIFORM) if names else 0)})
        workshop = self.workshop
        whole = workshop.confirm("float", Plan())
        if workshop.notes.spent > self.settings.budget_seconds:
            seconds = f"{workshop.notes.spent:.0f} seconds"
            raise MicronetError(f"--budget {self.settings.budget} is too short: to measure the original took {seconds}")
        if self.goal.quantity == "macs" and whole.macs is None:
            raise MicronetError("the multiply-accumulates of this network cannot be counted; use --target-latency")
        if self.goal.is_met_by(1.0):
            self.progress.line("the original meets the target already")
        try_bits(workshop, self.prediction, self.goal.max_drop, self._alone)
        if SHARES and self.goal.quantity == "size" and self.settings.runtime in STORES_FEW:
            try_few_bits(workshop, self.prediction, lambda: self._alone(FEW))
        rounds = self._rounds()
        self._prune(rounds)
        return self._finish()

    def _rounds(self) -> Rounds:
        settings = self.settings
        epoch = 0.0
        if not settings.no_training:
            device = pick_device(settings.device)
            epoch = self.workshop.notes.once(
                "seconds of an epoch", lambda: epoch_seconds(self.model, self.data, device)
            )
        return Rounds(self.workshop, epoch, self.goal.max_drop)

    def _alone(self, bits: int = INTEGER_BITS) -> dict[str, dict[str, float]]:
        """Return what each layer costs if it alone has few bits."""

        def measure() -> dict[str, dict[str, float]]:
            quality = validation_accuracy(self.data, copy_model(self.model))
            return bits_noise(self.model, self.batches, bits, quality, self.progress)

        found: dict[str, dict[str, float]] = self.workshop.notes.once(f"layers with {bits} bits", measure)
        return found

    def _base(self) -> Plan:
        """Return the cheapest plan so far that keeps the drop, or would after training: what is then narrowed."""
        made = [point for point in self.workshop.points if not point.failed]
        allowed = self.goal.max_drop + (0.0 if self.settings.no_training else RECOVERED)
        within = [point for point in made if point.drop <= allowed]
        if self.goal.quantity == "macs":  # bits change none
            return within[-1].plan
        return min(within, key=lambda point: (self.goal.value(point), point.drop)).plan

    def _prune(self, rounds: Rounds) -> None:
        """Make the candidates that are narrower."""
        if not self.groups.widths:
            self.progress.line(f"channels are not cut: {self.groups.why}")
        seconds = 60 * self.workshop.points[-1].minutes
        narrows = bool(self.groups.widths) and self.workshop.has_time("narrower candidates", seconds)
        plans = self._narrower() if narrows else []
        if self.settings.no_training:
            for name, plan in plans:
                self.workshop.attempt(name, plan)
            return
        made = {point.name: point for point in self.workshop.points}
        if not made["int8"].failed and made["int8"].drop > self.goal.max_drop / 2:
            plans = [(name, replace(plan, trained_bits=not plan.is_float)) for name, plan in plans]
            plans = [("int8, QAT", Plan(bits=8, trained_bits=True)), *plans]
        rounds.run(plans)

    def _narrower(self) -> list[Named]:
        """Return plans with fewer channels: those of the walk that are closest to the goal first, then uniform ones."""
        base, groups = self._base(), self.groups
        noise = noise_of(self.model, self.batches)
        cuts = self.workshop.notes.once("groups cut", lambda: groups.noise(noise, self.progress))
        multiples = {group: groups.multiples[group] for group in groups.widths if str(group) in cuts}
        walk: Walk[Plan] = Walk(
            narrower(groups.widths, multiples), self.prediction, lambda plan: groups.plan_noise(plan, cuts),
            self.prediction.prepare, groups.allows, narrower(groups.widths, multiples, far=True),
        )  # fmt: skip
        found = self.workshop.notes.once("walk", lambda: [each.widths for each in self._points(walk, base)])
        plans = [replace(base, widths=tuple(widths)) for widths in found]
        named: list[Named] = []
        for plan in plans:
            name = f"{sum(plan.widths) / sum(groups.widths.values()):.1%} of channels"
            alike = sum(other.startswith(name) for other, _ in named)
            named.append((f"{name}, {alike + 1}" if alike else name, plan))
        uniform = [(uniform_name(share), replace(base, widths=groups.uniform(share))) for share in UNIFORM]
        return [*named, *(each for each in uniform if each[1].widths not in (p.widths for p in plans))]

    def _points(self, walk: Walk[Plan], base: Plan) -> Sequence[Plan]:
        """Walk, and return plans at several costs, the one at the target first."""
        path = walk.path(base)
        cost: Callable[[Plan], float] = self.prediction
        whole = self.goal.value(self.workshop.points[0])
        wanted = [share * cost(base) for share in POINTS]
        if self.goal.target is not None:
            wanted = [self.goal.target * whole * 0.97, *wanted]
        self.progress.line(
            f"walked {count(len(path) - 1, 'step')}, down to {cost(path[-1]) / whole:.2f} of the original"
        )
        return spread(path, cost, wanted)

    def _finish(self) -> Outcome:
        """Choose, test the chosen network, write everything and return the summary."""

        def describe(point: Point) -> list[str]:
            return describe_choice(point, self.groups.named(), self._known_alone(), self.prediction.times(point.plan))

        summary = conclude(self.workshop, self.goal, describe)
        return Outcome(self._product(Path(summary["files"]["network"])), summary)

    def _product(self, path: Path) -> Any:
        from micronet.artifact.artifact import load

        return load(path, self.settings.code.model, trust_code=self.settings.code.trust_code or self._in_memory)

    def _known_alone(self) -> dict[int, dict[str, dict[str, float]]]:
        """Return what layers cost alone, by bits, as far as that was measured."""
        noted = self.workshop.notes.found
        return {bits: self._alone(bits) for bits in (INTEGER_BITS, FEW) if f"layers with {bits} bits" in noted}


def open_notes(settings: Compress, weights: str = "") -> Notes:
    """Open the notes of a search with these settings; ``weights``: the hash of a network in memory."""
    values = {name: value for name, value in flatten(settings).items() if name not in NOT_KEYED}
    key = stage_key("compress", {**values, "weights": weights}, [settings.artifact], version())
    return Notes.open(settings.folder, key, force=settings.force)


def uniform_name(share: float) -> str:
    """Return the name of the candidate that cuts the same share of every group."""
    return f"{1 - share:.0%} of every layer"
