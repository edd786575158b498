"""The page of a comparison: what ``compare --html`` and ``report`` write."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from micronet.artifact.artifact import versions
from micronet.core.progress import Progress
from micronet.data.batches import eval_batches
from micronet.errors import MicronetError, count
from micronet.models.device import describe_machine
from micronet.reporting.curves import training_charts
from micronet.reporting.layers import layers_of
from micronet.reporting.page import Page, Section, write_page
from micronet.reporting.pareto import trade_offs
from micronet.reporting.pictures import disagreement
from micronet.reporting.verdict import ALLOWED_DROP, choose, sentence
from micronet.stages import card_text
from micronet.stages.inspect_artifact import inspect_file
from micronet.stages.origin import origin_of
from micronet.stages.words import row_labels, without_folder

if TYPE_CHECKING:
    from micronet.evaluation.network import Network
    from micronet.stages.measure import Measured

NAMED = 3  # networks in a title
SAMPLES = 8  # that the outputs of layers are compared on


class Words(NamedTuple):
    """What a page says of its measurements: lines on speed and on noise, and why networks are left out, by name."""

    speed: list[str]
    noise: list[str]
    left_out: dict[str, str]


def write_comparison(path: Path, measured: "Measured", words: Words, allowed: float | None, progress: Progress) -> None:
    """Write a comparison as an HTML page.

    Args:
        path: The page.
        measured: What was measured.
        words: What to say of it.
        allowed: The drop of the main metric in percentage points up to which a network may be shipped; None: 1 point.
        progress: Where to report progress.
    """
    rows, dataset, files = measured.rows, measured.dataset, measured.files
    allowed = ALLOWED_DROP if allowed is None else allowed
    chosen = choose(rows, allowed)
    given = next(eval_batches(dataset.test, dataset.spec, batch_size=SAMPLES))[0]
    inputs: Any = tuple(x.numpy() for x in given) if isinstance(given, tuple) else given.numpy()
    names, machine, sections = row_labels(rows), describe_machine().items(), []
    for index, (file, name, network) in enumerate(zip(files, names, measured.networks, strict=True)):
        progress.step("examining layers", index, len(files))
        layers = layers_of(file, network, measured.networks[0], files[0], inputs)
        sections.append(Section(name, commands(file, network), layers))
    page = Page(
        title=f"micronet: {', '.join(names) if len(names) <= NAMED else count(len(names), 'network')}",
        verdict=sentence(rows, allowed, dataset.task.main),
        warnings=[*words.noise, *(f"Left out: {name}: {reason}" for name, reason in words.left_out.items())],
        words=words.speed,
        rows=rows,
        chosen=chosen,
        tested_on=count(rows[0].images, f"test {dataset.test.noun}")
        + (f", {dataset.tested_on}" * bool(dataset.tested_on)),
        charts=[*(each.chart() for each in trade_offs(rows, dataset.task)), *training_charts(files)],
        sections=sections,
        disagreement=disagreement(names, measured.evaluations, dataset, chosen),
        about={
            **{name: ("no", "yes")[value] if isinstance(value, bool) else str(value) for name, value in machine},
            "versions": ", ".join(f"{name} {value}" for name, value in versions().items()),
            "files": ", ".join(without_folder(str(file)) for file in files),
        },
    )
    write_page(path, page)


def commands(file: Path, network: "Network") -> list[str]:
    """Return the command lines that repeat how a network was made, or its stages if its file knows no settings."""
    try:
        about = inspect_file(file)
        made = origin_of(about)
    except MicronetError:  # a network in memory, or an engine
        return list(network.stages)
    if any(record["config"] for record in made["history"]):
        return card_text.commands(about, made)
    return [record["stage"] for record in made["history"]]
