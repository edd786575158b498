"""The page of a comparison: what ``compare --html`` and ``report`` write."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from micronet import registry
from micronet.artifact.artifact import versions
from micronet.artifact.header import read_header
from micronet.core.config import options, spell
from micronet.core.folders import read_note
from micronet.core.progress import Progress
from micronet.data.batches import eval_batches
from micronet.errors import MicronetError, count
from micronet.models.device import describe_machine
from micronet.report.curves import training_charts
from micronet.report.layers import layers_of
from micronet.report.page import Page, Section, trade_offs, write_page
from micronet.report.pictures import disagreement
from micronet.report.verdict import ALLOWED_DROP, choose, sentence
from micronet.runtimes.onnxruntime import OnnxPredictor, metadata
from micronet.stages.compare_latency import describe_noise
from micronet.stages.stage import find

if TYPE_CHECKING:
    from micronet.evaluation.network import Network
    from micronet.stages.evaluate import Measured

SAMPLES = 8  # that the outputs of layers are compared on


def write_comparison(
    path: Path, files: Sequence[Path], measured: "Measured", words: list[str], allowed: float | None, progress: Progress
) -> None:
    """Write a comparison as an HTML page.

    Args:
        path: The page.
        files: The file of each network measured.
        measured: What was measured.
        words: Lines on the speed of the networks.
        allowed: The drop of the main metric in percentage points up to which a network may be shipped; None: 1 point.
        progress: Where to report progress.
    """
    rows, dataset = measured.rows, measured.dataset
    allowed = ALLOWED_DROP if allowed is None else allowed
    chosen = choose(rows, allowed)
    given = next(eval_batches(dataset.test, dataset.spec, batch_size=SAMPLES))[0]
    inputs: Any = tuple(x.numpy() for x in given) if isinstance(given, tuple) else given.numpy()
    sections = []
    for index, (file, row, network) in enumerate(zip(files, rows, measured.networks, strict=True)):
        progress.step("examining layers", index, len(files))
        layers = layers_of(file, network, measured.networks[0], files[0], inputs)
        sections.append(Section(row.name, commands(file, network), layers))
    names = [row.name for row in rows]
    page = Page(
        title=f"micronet: {', '.join(names)}",
        verdict=sentence(rows, allowed),
        warning="; ".join(noise := describe_noise(rows)),
        words=[line for line in words if line not in noise],
        rows=rows,
        chosen=chosen,
        tested_on=count(rows[0].images, f"test {dataset.test.noun}")
        + (f", {dataset.tested_on}" * bool(dataset.tested_on)),
        charts=[*trade_offs(rows, dataset.task), *training_charts(files)],
        sections=sections,
        disagreement=disagreement(names, measured.evaluations, dataset, chosen),
        about={
            **{name: str(value) for name, value in describe_machine().items()},
            "versions": ", ".join(f"{name} {value}" for name, value in versions().items()),
            "files": shlex.join(map(str, files)),
        },
    )
    write_page(path, page)


def commands(file: Path, network: "Network") -> list[str]:
    """Return the command lines, without files, that repeat how a network was made, as far as its file knows."""
    try:
        return [line for record in _history(file, network) if (line := _command(record))]
    except MicronetError:
        return list(network.stages)


def _history(file: Path, network: "Network") -> list[Any]:
    if file.is_dir():
        return list(read_note(file).get("history") or [])
    if isinstance(network, OnnxPredictor):
        return list(metadata(network.proto)["history"]) if metadata(network.proto) else []
    if file.suffix == ".safetensors" and file.is_file():
        return [record.to_json() for record in read_header(file)[0].history]
    return [{"stage": name} for name in network.stages]


def _command(record: dict[str, Any]) -> str:
    name, config = str(record.get("stage")), record.get("config") or {}
    if name not in registry.STAGES:
        return name
    known = {option.name: option.default for option in options(find(name))}
    given = {key: value for key, value in config.items() if key in known and value != known[key]}
    return shlex.join(["micronet", name, *spell(find(name), given)])
