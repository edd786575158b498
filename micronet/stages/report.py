"""The ``report`` stage: the networks in a folder, compared on one HTML page."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from micronet import registry
from micronet.artifact.header import read_header
from micronet.core.config import group, setting
from micronet.core.files import NOTE
from micronet.core.parse import parse_json, read_text
from micronet.core.progress import Progress
from micronet.errors import FailedError, MicronetError, count
from micronet.runtimes.config import RuntimeOptions
from micronet.stages.config import MeasureSettings, TimingConfig, input_file
from micronet.stages.evaluate import Compare
from micronet.stages.gates import GateConfig
from micronet.stages.stage import Context, Outcome, Stage

NAME = "report.html"
CHECKPOINT = ".checkpoint.safetensors"


@dataclass(frozen=True, kw_only=True)
class Report(MeasureSettings, Stage):
    """Reports on a folder."""

    name = "report"
    details = (
        "Compares all networks in the folder as micronet compare does, and writes a page that says which one to ship. "
        "The reference is the first one that the recipe made or, of other files, the artifact with the shortest "
        "history. Networks that cannot be measured are named on the page, and make the command fail."
    )
    example = "micronet report runs/digits"
    suffix = None
    product = "list[Row]"
    takes_networks = False

    folder: Path = input_file("The folder of a recipe, or any folder of networks.", kinds=(), metavar="FOLDER")
    output: Path | None = setting(
        None, f"The page to write. Default: {NAME} in the folder.", "-o", basic=True, place="file"
    )
    max_drop: float | None = setting(
        None,
        "Loss of accuracy, in percentage points, up to which a network may be recommended. Default: 1.",
        basic=True,
    )
    timing: TimingConfig = group(TimingConfig)

    def run(self, context: Context) -> Outcome:
        """Compare the networks and write the page."""
        if not self.folder.is_dir():
            raise MicronetError(f"{self.folder} is not a folder; for files, run micronet compare FILE... --html FILE")
        files = networks_in(self.folder, self.runtime, context.progress)
        comparison = Compare(
            files=files,
            data=self.data,
            runtime=self.runtime,
            timing=self.timing,
            gates=GateConfig(max_drop=self.max_drop),
            html=self.output or self.folder / NAME,
        )
        left_out: dict[str, str] = {}
        outcome = comparison.compare(context, left_out)
        return Outcome(outcome.product, {**outcome.summary, "left_out": left_out})

    def judge(self, outcome: Outcome) -> None:
        """Raise FailedError that names the networks that are not on the page, after it was written."""
        require_all(outcome.summary["left_out"])


def require_all(left_out: Mapping[str, str]) -> None:
    """Raise FailedError that names the networks that could not be measured, name -> reason, if there are any."""
    if left_out:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise FailedError(f"left out {count(len(left_out), 'network')}: {reasons}")


def networks_in(place: Path, runtime: RuntimeOptions, progress: Progress) -> list[Path]:
    """Return the networks in a folder that this machine can run, or a file or a folder that is itself a network.

    Raises MicronetError if there are none.
    """
    if not place.is_dir() or (place / NOTE).is_file():
        return [place]
    found = [path for path in network_files(place) if _runs_here(path, runtime, progress)]
    if not found:
        raise MicronetError(
            f"{place} has no networks in it; expected files that end in {', '.join(registry.PREDICTORS)}"
        )
    return found


def _runs_here(path: Path, runtime: RuntimeOptions, progress: Progress) -> bool:
    """Return False, and say why, for an engine that this machine cannot run; other files fail as they are read."""
    if path.suffix != ".engine":
        return True
    from micronet.runtimes.network import open_network

    try:
        open_network(path, runtime)
    except MicronetError as error:
        progress.line(f"warning: left out {path.name}: {error}")
        return False
    return True


def network_files(folder: Path) -> list[Path]:
    """Return the networks in a folder: those that a recipe made in its order, then the others.

    Of these, artifacts with the shortest history come first, because the first network is the reference.
    """
    try:
        order = list(parse_json(read_text(folder / "recipe.json")))
    except (OSError, ValueError, TypeError):  # another file of that name
        order = []
    found = [
        path
        for path in folder.iterdir()
        if not path.name.endswith(CHECKPOINT)
        and ((path.suffix in registry.PREDICTORS and path.is_file()) or (path / NOTE).is_file())
    ]

    def rank(path: Path) -> tuple[int, float, float, str]:
        stages = [place for place, stage in enumerate(order) if stage in (path.stem, path.name)]
        return (min(stages, default=len(order)), _steps(path), path.stat().st_mtime, path.name)

    return sorted(found, key=rank)


def _steps(path: Path) -> float:
    """Return the number of stages that an artifact went through; infinity for other files, and for damaged ones."""
    try:
        return len(read_header(path)[0].history) if path.suffix == ".safetensors" else math.inf
    except MicronetError:
        return math.inf
