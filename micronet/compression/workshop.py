"""Where candidates are made: a plan is run as a recipe, and its file is judged on validation data and timed."""

import json
import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from micronet.compression.costs import Deployment, fastest_ms
from micronet.compression.judge import Judge, error_of_drop, quality, quality_of_part, repeated
from micronet.compression.notes import CANDIDATES, Notes
from micronet.compression.plan import Basis, Plan, shared_names, to_toml
from micronet.compression.point import Point
from micronet.compression.prediction import Prediction
from micronet.compression.reports import Beating, Steps
from micronet.compression.words import resolution_of
from micronet.core.files import file_size, write_bytes
from micronet.core.progress import Progress
from micronet.errors import MicronetError, StoppedError, first_line, is_out_of_memory
from micronet.evaluation.network import Network
from micronet.quantization.config import INTEGER_BITS
from micronet.recipe.plan import plan as bind
from micronet.recipe.reader import read_recipe
from micronet.recipe.run import RunRecipe, run_recipe
from micronet.runtimes.network import open_network
from micronet.stages.execute import execute
from micronet.stages.stage import Outcome, Stage

SECONDS = 0.3  # that a whole network is timed at a moment
FEWEST_MOMENTS, MOST_MOMENTS = 2, 6
STEADY = 1.02  # what the two shortest times of moments differ by at most, unless other work disturbs


@dataclass
class Workshop:
    """Makes candidates in a folder and measures them.

    Attributes:
        basis: What all plans share.
        folder: The folder of the search.
        notes: What is known already.
        judge: What candidates are judged by.
        deployment: Where candidates run.
        budget: Seconds for the whole search.
        timed: Whether candidates are timed.
        prediction: Predicts what they cost, once it is fitted.
        points: What was made.
        left_out: What did not fit the budget, in words.
        original_parts: The original's metric on parts of the validation samples, None where the task has none.
    """

    basis: Basis
    folder: Path
    notes: Notes
    judge: Judge
    deployment: Deployment
    progress: Progress
    budget: float
    timed: bool = True
    prediction: Prediction | None = None
    points: list[Point] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    original_parts: list[float | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.progress = Beating(self.progress, self.notes)

    @property
    def remaining(self) -> float:
        """The seconds that are left of the budget."""
        return self.budget - self.notes.spent

    def check_budget(self, spelled: str) -> None:
        """Raise MicronetError if the original alone took longer than the budget, ``spelled`` by the user."""
        seconds = 60 * self.points[0].minutes
        if seconds > self.budget and not self.notes.settled:  # else an earlier search measured it
            raise MicronetError(f"--budget {spelled} is too short: to measure the original took {seconds:.0f} seconds")

    def attempt(self, name: str, plan: Plan) -> bool:
        """Make a candidate and return True if there is time for it, as for the one that took longest so far."""
        fits = self.has_time(name, 60 * max(point.minutes for point in self.points), plan)
        if fits:
            self.confirm(name, plan)
        return fits

    def is_made(self, plan: Plan) -> bool:
        """Return True if a candidate was made and measured before, perhaps by a search for another goal."""
        return _noted(plan) in self.notes.found

    def has_time(self, what: str, seconds: float, plan: Plan | None = None) -> bool:
        """Return True if something fits the budget, or is a plan that was made before; what does not is left out."""
        made = plan is not None and self.is_made(plan)
        fits: bool = self.notes.decide(f"time for {what}", lambda: made or seconds <= self.remaining)
        if not fits:
            self.left_out.append(f"no time for {what}; a larger --budget would give it")
            self.progress.line(self.left_out[-1])
        return fits

    def confirm(self, name: str, plan: Plan) -> Point:
        """Make a candidate and measure it, unless that is noted; the first one is the original.

        Raises MicronetError if the original cannot be made; of other candidates, the point says why they failed.
        """
        noted = _noted(plan)
        predicted = None
        if self.prediction is not None and self.prediction.quantity == "latency":
            prediction = self.prediction(plan)
            predicted = self.notes.decide(f"prediction of {noted}", lambda: round(prediction, 5))
        try:
            found = self.notes.once(noted, lambda: self._measured(name, plan))
        except Exception as error:  # not noted: the next run tries again
            if not self.points or not _is_the_plans(error):
                raise
            found = {"failed": _reason(error)}
        figures = {key: value for key, value in found.items() if key != "parts"}
        if "parts" in found and self.points:
            figures["drop_error"] = error_of_drop(self.original_parts, found["parts"])
        elif "parts" in found:
            self.original_parts = found["parts"]
        drop = self.points[0].quality - found["quality"] if self.points and "quality" in found else 0.0
        minutes = self.notes.seconds(noted) / 60
        resolution = resolution_of(self.judge.samples, self.judge.metric or self.judge.task.main)
        point = Point(name, plan, drop, resolution=resolution, predicted_ms=predicted, minutes=minutes, **figures)
        if predicted is not None and self.prediction is not None and point.latency_ms:
            self.prediction.compare(plan, point.latency_ms)
        self.points.append(point)
        self._tell(point)
        return self._with_8_bits(point) if point.failed and plan.has_few_bits else point

    def _with_8_bits(self, failed: Point) -> Point:
        """Return a candidate like one whose few bits failed, as where they are too few to be packed."""
        plan = replace(failed.plan, bits=INTEGER_BITS, wide=())
        made = next((point for point in self.points if point.plan == plan), None)
        if made is None and self.attempt(f"{failed.name}, 8 bits", plan):
            return self.points[-1]
        return made or failed

    def files(self, plan: Plan) -> tuple[Path, Path]:
        """Return the deployed file or folder of a candidate that was made, and its network."""
        recipe = self._recipe(plan)
        if recipe is None:
            return self.basis.original, self.basis.original
        planned = bind(read_recipe(recipe), compares=False)
        outputs = [self.folder / CANDIDATES / each.output.name for each in planned if each.output is not None]
        return outputs[-1], outputs[-2] if len(outputs) > 1 else self.basis.original

    def evaluate(self, network: Network, *, test: bool = False) -> list[dict[str, float]]:
        """Return the metrics of a network as ``Judge.measure`` does."""
        label = "testing" if test else "validating"
        return self.judge.measure(network, lambda done, total: self.progress.step(label, done, total), test=test)

    def open(self, plan: Plan) -> Network:
        """Open a candidate's deployed file."""
        return open_network(self.files(plan)[0], self.deployment.options)

    @cached_property
    def _original(self) -> Network:
        return self.open(self.points[0].plan)

    @cached_property
    def _sample(self) -> Any:
        """A batch of inputs as arrays, of the size that networks are timed with."""
        return repeated(self.judge.sample(), self.deployment.batch)

    def _measured(self, name: str, plan: Plan) -> dict[str, Any]:
        """Make a candidate; return its figures."""
        if self.points:
            self.progress.line(f"making {name}")
        try:
            self._make(plan)
        except MicronetError as error:
            error.args = (_reason(error),)
            raise
        network = self.open(plan)
        sample = self._sample if isinstance(self._sample, tuple) else (self._sample,)
        alike = [point.latency_ms for point in self.points if point.plan.form == plan.form and point.latency_ms]
        if self.timed and not alike:
            first = self._times(network)  # long before the others: other work may slow all calls of a moment
        whole, *parts = self.evaluate(network)
        found: dict[str, Any] = {
            "quality": quality(self.judge, whole),
            "parts": [quality_of_part(self.judge, each) for each in parts],
            "size_bytes": file_size(self.files(plan)[0]),
            "macs": network.macs(*(each.shape[1:] for each in sample)),
        }
        if self.timed:
            found["latency_ms"] = alike[0] if alike else self._latency(plan, [first])  # of weights, only values differ
        return found

    def _make(self, plan: Plan) -> None:
        """Run a candidate's recipe."""
        recipe, quiet = self._recipe(plan), Steps(self.progress)

        def perform(stage: Stage, show: bool, last: bool) -> Outcome:
            return execute(stage, quiet)

        if recipe is not None:
            run_recipe(RunRecipe(recipe, self.folder / CANDIDATES), perform, quiet, compares=False)

    def _times(self, network: Network) -> list[float]:
        """Return milliseconds for a batch of the original and of a network in turns; of the original itself, once."""
        several = [self._original, network] if self.points else [network]
        runs = [(each, self._sample) for each in several]
        return fastest_ms(runs, SECONDS, most=None, one_thread=self.deployment.computes_in_one_thread)

    def _latency(self, plan: Plan, times: list[list[float]]) -> float:
        """Return a network's milliseconds, relative to those that the original took first.

        ``times``: those of both at a first moment; others follow, with the network opened anew, whose memory may have
        been laid out badly.
        """
        while len(times) < FEWEST_MOMENTS or (len(times) < MOST_MOMENTS and self._is_disturbed(times)):
            times.append(self._times(self.open(plan)))
        least: list[float] = [min(each) for each in zip(*times, strict=True)]
        before = self.points[0].latency_ms if self.points else None
        return round(least[-1] * (before or least[0]) / least[0], 5)

    def _is_disturbed(self, times: list[list[float]]) -> bool:
        """Return True if other work may have slowed all calls of what was timed at some moments."""
        least, second = sorted(each[-1] for each in times)[:2]
        before = self.points[0].latency_ms if self.points else None
        return second > STEADY * least or min(times)[0] > STEADY * (before or math.inf)

    def _recipe(self, plan: Plan) -> Path | None:
        """Write a candidate's recipe; return its path, or None if the original is the candidate."""
        entries = shared_names(self.basis.entries(plan))
        if not entries:
            return None
        folder = self.folder / CANDIDATES
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{entries[-1]['name']}.toml"
        if not path.exists():
            write_bytes(path, to_toml(entries, folder, "A candidate of micronet compress.").encode())
        return path

    def _tell(self, point: Point) -> None:
        """Report a candidate in a line."""
        if point.failed:
            self.progress.line(f"{point.name}: cannot be made ({point.failed})")
            return
        first = self.points[0]
        said = [f"{point.name}: drop {100 * point.drop:.2f} points", f"{point.size_bytes:,} bytes"]
        if point.latency_ms is not None:
            said.append(f"{point.latency_ms:.3f} ms")
            if point is not first and first.latency_ms:
                said[-1] += f" ({point.latency_ms / first.latency_ms:.2f} of the original's"
                said[-1] += f", predicted {point.predicted_ms:.3f} ms)" if point.predicted_ms else ")"
        self.progress.line(", ".join(said))


def _noted(plan: Plan) -> str:
    """Return the name of a plan's measurements in the notes."""
    return f"candidate {json.dumps(plan.to_json(), sort_keys=True)}"


def _is_the_plans(error: Exception) -> bool:
    """Whether an error means that a plan cannot be made: no time limit and no full disk, which would end any other."""
    is_refused = isinstance(error, MicronetError) and not isinstance(error, StoppedError)
    return is_out_of_memory(error) or (is_refused and not isinstance(error.__cause__, OSError))


def _reason(error: Exception) -> str:
    """Return what a stage's error says in a line, without the place in the candidate's recipe."""
    text = " ".join(line.strip() for line in str(error).splitlines() if line.strip()) or first_line(error)
    return text.partition("): ")[2] if text.startswith("stage ") else text
