"""What a search leaves in its folder: the network, its deployed file, its recipe, and the front."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from micronet.compression.goal import Goal
from micronet.compression.judge import DataJudge, Judge, quality
from micronet.compression.plan import Entry, final_names, to_toml
from micronet.compression.point import Point, Quantity, front, spell_drop
from micronet.compression.stage import STEM
from micronet.compression.words import (
    as_markdown,
    describe_chance,
    describe_errors,
    describe_floats,
    describe_int8,
    describe_losses,
    describe_resolution,
    describe_test,
    describe_unsure,
    table,
)
from micronet.compression.workshop import Workshop
from micronet.core.files import NOTE, files_in, write_bytes
from micronet.core.folders import Folder, read_note, write_folder
from micronet.errors import MicronetError, count
from micronet.evaluation import plot
from micronet.evaluation.network import integer_layers

REPRODUCED = "reproduced"  # the folder in which the recipe makes the network again
LABELS = {"latency": "latency, ms", "size": "size, bytes", "macs": "multiply-accumulates"}


def conclude(workshop: Workshop, goal: Goal, describe: Callable[[Point], list[str]]) -> dict[str, Any]:
    """Choose a candidate, test it, write everything and return the summary.

    Args:
        workshop: Where the candidates were made.
        goal: What is asked for.
        describe: Says what the chosen candidate gave up.
    """
    choice, judge = goal.choose(workshop.points), workshop.judge
    point = choice.point
    tested, before = (_test(workshop, each) for each in (point, workshop.points[0]))
    lost = quality(judge, before) - quality(judge, tested)
    errors = describe_errors(workshop.points)
    words = [
        *_describe_chance(judge, before),
        *describe_resolution(goal.max_drop, judge.noun, judge.samples, judge.metric or judge.task.main),
        f"chosen: {point.name}, a drop of {spell_drop(point)} on {count(judge.samples, f'validation {judge.noun}')}",
        *describe_unsure(workshop.points, goal),
        *describe(point),
        *_describe_bits(workshop, point),
        *describe_losses(point, workshop.points[0]),
        *describe_test(lost, goal.max_drop, judge.noun, judge.tested_on),
        *([errors] if errors else []),
        *workshop.left_out,
    ]
    workshop.notes.settle()
    if goal.is_met_by(1.0):
        words.insert(0, "the original meets the target already")
    about = {"quantity": goal.quantity, "words": words, "miss": choice.miss, "test": tested, "test_of_original": before}
    places = write_result(workshop, point, goal.quantity, about)
    return {
        "chosen": point.to_json(), **about, "files": places, "names": [Path(each).name for each in places.values()],
        "candidates": candidates(workshop, goal.quantity), "output": str(workshop.folder), "noun": judge.noun,
        "tested_on": judge.tested_on, "left_out": workshop.left_out,
    }  # fmt: skip


def _describe_chance(judge: Judge, metrics: dict[str, float]) -> list[str]:
    """Return a warning if the original's metrics on the test data are those of chance."""
    if not isinstance(judge, DataJudge):
        return []
    data = judge.data
    return describe_chance(metrics.get("accuracy"), len(data.classes or []), len(data.test), "test")


def _describe_bits(workshop: Workshop, chosen: Point) -> list[str]:
    """Return lines on the layers that the deployed file runs in float unasked, or on why the whole network is float."""
    if chosen.plan.is_float:
        int8 = next((each for each in workshop.points if each.name == "int8"), None)
        return [] if int8 is None else [describe_int8(int8, workshop.points[0])]
    counted = integer_layers(workshop.open(chosen.plan))
    return describe_floats(counted["float"] if counted else {}, chosen.plan.floats)


def _test(workshop: Workshop, point: Point) -> dict[str, float]:
    """Return a candidate's metrics on the test data."""
    name = f"test of {json.dumps(point.plan.to_json(), sort_keys=True)}"

    def measure() -> dict[str, float]:
        return workshop.evaluate(workshop.open(point.plan), test=True)[0]

    found: dict[str, float] = workshop.notes.once(name, measure)
    return found


def write_result(workshop: Workshop, chosen: Point, quantity: Quantity, about: dict[str, Any]) -> dict[str, str]:
    """Write the chosen candidate's files, its recipe and the front; return the paths by what they hold."""
    folder = workshop.folder
    deployed, network = workshop.files(chosen.plan)
    folder.mkdir(parents=True, exist_ok=True)
    places: dict[str, Path] = {}
    if network.suffix == ".safetensors":
        places["network"] = folder / f"{STEM}.safetensors"
        write_bytes(places["network"], network.read_bytes())
    places["deployed"] = folder / f"{STEM}{deployed.suffix}"
    if entries := final_names(workshop.basis.entries(chosen.plan), STEM):
        recipe, output = folder / "recipe.toml", entries[-1]["output"]
        if workshop.basis.original.suffix == ".onnx":
            entries.append(_comparison(workshop, entries[-1]))
        title = f"Made by micronet compress: {chosen.name}. Run it with: micronet run {recipe}"
        write_bytes(recipe, to_toml(entries, folder / REPRODUCED, title).encode())
        places |= {"deployed": folder / output, "recipe": recipe}
    _copy(deployed, places["deployed"])
    content = {"chosen": chosen.name, **about, "candidates": candidates(workshop, quantity)}
    write_bytes(folder / "front.json", f"{json.dumps(content, indent=1)}\n".encode())
    write_bytes(folder / "front.md", as_markdown(table(content["candidates"], chosen.name)).encode())
    places |= {"front": folder / "front.json", "table": folder / "front.md"}
    try:
        draw(workshop.points, chosen, quantity, folder / "front.svg")
        places["picture"] = folder / "front.svg"
    except MicronetError:  # matplotlib is optional
        pass
    return {name: str(path) for name, path in places.items()}


def candidates(workshop: Workshop, quantity: Quantity) -> list[dict[str, Any]]:
    """Return the figures of candidates as JSON objects, with their files and whether they are on the front."""
    best = front(workshop.points, quantity)
    return [
        {
            **point.to_json(),
            "front": point in best,
            "file": None if point.failed else workshop.files(point.plan)[0].name,
        }
        for point in workshop.points
    ]


def draw(points: Sequence[Point], chosen: Point, quantity: Quantity, path: Path) -> None:
    """Draw the drop of every candidate over its cost, and the front as a line."""

    def place(point: Point) -> tuple[float, float]:
        return point.value(quantity), 100 * point.drop

    def fill(axes: Any) -> None:
        made = [point for point in points if not point.failed and math.isfinite(point.value(quantity))]
        axes.scatter(*zip(*map(place, made), strict=True), s=18)
        axes.step(*zip(*map(place, front(made, quantity)), strict=True), where="pre", linewidth=1)
        axes.scatter(*([value] for value in place(chosen)), s=70, facecolors="none", edgecolors="black")
        for point in made:
            axes.annotate(point.name, place(point), fontsize=6, xytext=(3, 3), textcoords="offset points")
        axes.set_xlabel(LABELS[quantity])
        axes.set_ylabel("drop, points")

    plot.draw(path, (8, 5), fill)


def _comparison(workshop: Workshop, made: Entry) -> Entry:
    """Return the stage that compares an ONNX file with what was made of it; the file may not record its data."""
    options, judge = workshop.basis.options, workshop.judge
    named = {name: value for name, value in options.items() if name in ("data", "task", "image_size", "limit")}
    task = {"task": judge.task.name} if judge.task.needs_reference else {}
    files = [str(workshop.basis.original), made["name"]]
    return {"command": "compare", "files": files, "skip_timing": True, **named, **task}


def _copy(source: Path, target: Path) -> None:
    """Copy a deployed file, or a folder from ``export``, whole or not at all."""
    if source.is_dir():
        files = {str(each.relative_to(source)): each.read_bytes() for each in files_in(source) if each.name != NOTE}
        write_folder(target, Folder(files, read_note(source)))
    else:
        write_bytes(target, source.read_bytes())
