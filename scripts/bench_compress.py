#!/usr/bin/env python
"""The front of micronet compress against the best single stage, and against NNCF's accuracy-aware quantization.

    OMP_NUM_THREADS=1 python scripts/bench_compress.py --data path/to/cifar10 --work runs/compress --budget 60m
    OMP_NUM_THREADS=1 python scripts/bench_compress.py --data path/to/cifar10 --work runs/c --only nin --nncf

Trains each subject (unless its file is in the folder), compresses it (unless its front is), and prints a row for each
drop of 0.5, 1 and 2 points: the latency of the fastest candidate within the drop, of the fastest with bits alone, and
of the fastest that only cuts every layer alike, all as fractions of the float network's. The networks that are only
cut are those of the search, trained as long, in float; "not reached" if the budget let none be trained. "test drop":
that of the chosen candidate, within 2 points on validation images. Exits with 1 if a front is slower than a single
stage, or a predicted latency is off by more than a tenth.

With ``--nncf``: NNCF's quantize_with_accuracy_control within a point, beside ``compress --runtime openvino
--no-training``: of its candidates that are no slower within the noise of timing (5 %), the one with the least drop. All
run in turns in one process.
"""

import argparse
import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from micronet.compression.compressing import Compressing
from micronet.compression.costs import fastest_ms
from micronet.compression.judge import error_of_drop, quality_of_part
from micronet.compression.plan import Plan
from micronet.compression.point import TOLERANCE
from micronet.compression.workshop import Workshop
from micronet.core.progress import Silent
from micronet.core.timing import NOISE
from micronet.data.batches import eval_batches
from micronet.evaluation.accuracy import evaluate
from micronet.evaluation.network import Network
from micronet.runtimes.config import RuntimeOptions
from micronet.runtimes.onnxruntime import run, unwrapped
from micronet.runtimes.openvino import OpenVinoSession
from micronet.stages.execute import execute
from micronet.stages.stage import Context, Memory, find

CLASSES = 10
TIMM = f'{{"model_name": "lcnet_050", "num_classes": {CLASSES}}}'
# A subject -> what trains it; CIFAR is the folder named by --data, SHAPES the folder of images and masks drawn here.
SUBJECTS: dict[str, dict[str, Any]] = {
    "nin": {"model": "nin", "width": 0.5, "data": "CIFAR", "limit": 5000, "epochs": 8},
    "resnet18": {"model": "resnet18", "width": 0.25, "data": "CIFAR", "limit": 3000, "epochs": 6},
    "unet": {
        "model": "scripts/bench_runtimes.py:UNet", "task": "segmentation", "data": "SHAPES", "limit": 600, "epochs": 6,
    },
    "mobilenet_v2": {
        "model": "torchvision:mobilenet_v2", "model_args": f'{{"num_classes": {CLASSES}}}', "data": "digits",
        "image_size": 64, "epochs": 8,
    },
    "lcnet_050": {
        "model": "timm:create_model", "model_args": TIMM, "data": "digits", "image_size": 64, "epochs": 8,
    },
}  # fmt: skip
DROPS = (0.005, 0.01, 0.02)
LARGEST_ERROR, FASTER = 0.1, 0.2  # bars: of a predicted latency; than the better single stage
NNCF_DROP, NNCF_IMAGES = 0.01, 300
SECONDS, MOMENTS = 0.3, 6
NOTHING = float("inf")
Row = dict[str, Any]


class Lines(Silent):
    """Prints the lines of a search."""

    def line(self, text: str) -> None:
        """Print a line."""
        print(f"  {text}", file=sys.stderr, flush=True)


def draw_shapes(folder: Path, images: tuple[int, int] = (1600, 200), size: int = 64) -> None:
    """Draw discs, squares and diamonds on noise, and their masks, as a folder for segmentation."""
    random = np.random.default_rng(0)
    rows, columns = np.mgrid[:size, :size]
    for part, number in zip(("train", "test"), images, strict=True):
        for kind in ("images", "masks"):
            (folder / part / kind).mkdir(parents=True, exist_ok=True)
        for index in range(number):
            mask = np.zeros((size, size), np.uint8)
            image = np.full((size, size, 3), random.integers(40, 216, 3), float)
            for _ in range(3):
                label, (y, x, _) = random.integers(1, 4), random.integers(8, size - 8, 3)
                radius, dy, dx = random.integers(5, 15), abs(rows - y), abs(columns - x)
                inside = (dy**2 + dx**2 < radius**2, np.maximum(dy, dx) < 0.85 * radius, dy + dx < 1.2 * radius)
                mask[inside[label - 1]] = label
                image[inside[label - 1]] = random.integers(0, 256, 3)
            image += random.normal(0, 24, image.shape)
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / part / "images" / f"{index:04}.png")
            Image.fromarray(mask).save(folder / part / "masks" / f"{index:04}.png")


def search_of(name: str, args: argparse.Namespace, runtime: str, **settings: Any) -> Compressing:
    """Train and compress a subject, as far as that is not done; return the search."""
    file, training = args.work / f"{name}.safetensors", dict(SUBJECTS[name])
    shapes = args.work / "shapes"
    if training["data"] == "SHAPES" and not shapes.exists():
        draw_shapes(shapes)
    training["data"] = {"CIFAR": args.data, "SHAPES": str(shapes)}.get(training["data"], training["data"])
    if not file.exists():
        execute(find("train").configure({**training, "output": file}), Lines())
    data = {key: training[key] for key in ("data", "limit") if key in training}
    folder = args.work / f"{name}-{runtime}"
    values = {"artifact": file, "max_drop": 2.0, "runtime": runtime, "budget": args.budget, **data, **settings}
    stage = find("compress").configure({**values, "trust_code": ":" in SUBJECTS[name]["model"], "output": folder})
    if not (folder / "front.json").exists():
        print(name, runtime, file=sys.stderr, flush=True)
        execute(stage, Lines())
    return Compressing(stage, Context(stage.open(None), folder, Silent(), Memory(), temporary=False))  # type: ignore[arg-type]


def candidates_of(search: Compressing) -> list[Row]:
    """Return the candidates of a search that were made."""
    found = json.loads((search.settings.folder / "front.json").read_text())["candidates"]
    return [each for each in found if not each["failed"]]


def plan_of(candidate: Row) -> Plan:
    """Return a candidate's plan."""
    values: Row = {key: tuple(each) if isinstance(each, list) else each for key, each in candidate["plan"].items()}
    return Plan(**values)


def tested_drop(search: Compressing) -> float:
    """Return the drop of the chosen candidate on the test data."""
    found = json.loads((search.settings.folder / "front.json").read_text())
    before, after = (search.data.task.quality(found[name]) for name in ("test_of_original", "test"))
    return before - after


def fastest(candidates: list[Row], drop: float) -> float:
    """Return the least latency of candidates within a drop."""
    return min((each["latency_ms"] for each in candidates if each["drop"] <= drop + TOLERANCE), default=NOTHING)


def compare_stages(name: str, args: argparse.Namespace) -> list[Row]:
    """Return a row for each drop."""
    search = search_of(name, args, args.runtime)
    made = candidates_of(search)
    bits = [each for each in made if not each["plan"].get("widths")]
    workshop = search.workshop
    uniform = [workshop.confirm("float", Plan())]
    for each in made:
        if "every layer" in each["name"] and each["plan"].get("epochs"):
            plan = replace(plan_of(each), bits=32, floats=(), trained_bits=False)
            uniform.append(workshop.confirm(f"{each['name']}, in float", plan))
    cut = [point.to_json() for point in uniform if not point.failed]
    first = {plan_of(each).form: each for each in reversed(made)}.values()  # others are only trained longer
    errors = [abs(each["predicted_ms"] / each["latency_ms"] - 1) for each in first if each["predicted_ms"]]
    whole = made[0]["latency_ms"]
    return [
        {
            "name": name, "quality": made[0]["quality"], "ms": whole, "drop": drop,
            **{key: fastest(some, drop) / whole for key, some in (("front", made), ("bits", bits), ("cut", cut))},
            "error": statistics.median(errors), "worst": max(errors), "tested": tested_drop(search),
            "cuts": len(cut) - 1,
        }
        for drop in DROPS
    ]  # fmt: skip


def print_stages(rows: list[Row]) -> bool:
    """Print the table; return whether the bars for each row are met."""
    heads = "network|float|drop|front|bits alone|uniform cut alone|faster than the better|error: median|worst|test drop"
    print(f"| {heads.replace('|', ' | ')} |\n| --- |{' ---: |' * heads.count('|')}")
    for row in rows:
        saved = 1 - row["front"] / min(row["bits"], row["cut"])
        figures = [f"{row['front']:.2f}", f"{row['bits']:.2f}", f"{row['cut']:.2f}" if row["cuts"] else "not reached"]
        errors = [f"{saved:.0%}", f"{row['error']:.1%}", f"{row['worst']:.1%}", f"{100 * row['tested']:.1f} pt"]
        start = [row["name"], f"{row['quality']:.3f}, {row['ms']:.3f} ms", f"{100 * row['drop']:g} pt"]
        print(f"| {' | '.join([*start, *figures, *errors])} |")
    faster = {row["name"] for row in rows if row["front"] <= (1 - FASTER) * min(row["bits"], row["cut"])}
    print(f"\nat least {FASTER:.0%} faster than the better single stage at some drop: {', '.join(faster) or 'none'}\n")
    return all(row["front"] <= min(row["bits"], row["cut"]) and row["worst"] <= LARGEST_ERROR for row in rows)


def quantized_by_nncf(search: Compressing, network: Path, place: Path) -> Network:
    """Return a float OpenVINO network quantized within ``NNCF_DROP`` of the metric, unless its file is there."""
    if not place.exists():
        import nncf  # type: ignore[import-untyped]
        import openvino

        data = search.data
        batches = [each for each, _ in eval_batches(data.train, data.spec, batch_size=1)][:NNCF_IMAGES]
        items = list(eval_batches(data.validation, data.spec, batch_size=1))

        def validate(model: Any, given: Any) -> tuple[float, None]:
            found = evaluate(lambda x: next(iter(model(x).values())), list(given), lambda _: None, data.task)
            return data.task.quality(found.metrics), None

        model = nncf.quantize_with_accuracy_control(
            openvino.Core().read_model(network / "model.xml"), nncf.Dataset([each.numpy() for each in batches]),
            nncf.Dataset(items), validate, max_drop=NNCF_DROP, subset_size=NNCF_IMAGES,
        )  # fmt: skip
        openvino.save_model(model, place, compress_to_fp16=False)
    session = OpenVinoSession(place, {}, RuntimeOptions(threads=1))
    return lambda x: unwrapped(run(session, x))  # type: ignore[return-value]  # as candidates are called


def in_turns(networks: list[Network], sample: Any) -> list[float]:
    """Return the milliseconds of networks' fastest calls, in turns, at several moments."""
    runs = [(each, sample) for each in networks]
    moments = [fastest_ms(runs, SECONDS, None, one_thread=True) for _ in range(MOMENTS)]
    return [min(each) for each in zip(*moments, strict=True)]


def qualities(workshop: Workshop, network: Network, *, test: bool) -> list[float | None]:
    """Return a network's metric on all validation or test samples, and its parts' (see ``Judge.measure``)."""
    return [quality_of_part(workshop.judge, each) for each in workshop.evaluate(network, test=test)]


def compare_nncf(name: str, args: argparse.Namespace) -> Row:
    """Return NNCF's network beside the candidate with the least drop that is no slower; each is timed with NNCF's."""
    search = search_of(name, args, "openvino", no_training=True)
    workshop = search.workshop
    workshop.confirm("float", Plan())
    network = quantized_by_nncf(search, workshop.files(Plan())[0], search.settings.folder / "nncf.xml")
    near = [each for each in candidates_of(search) if each["drop"] <= max(DROPS)]
    theirs = [qualities(workshop, network, test=test) for test in (False, True)]
    row: Row = {"name": name, "float_ms": near[0]["latency_ms"], "theirs": theirs, "ours": None}
    tried: list[Row] = []
    for each in sorted(near, key=lambda each: float(each["drop"])):
        opened = workshop.open(plan_of(each))
        theirs_ms, ms = in_turns([network, opened], workshop._sample)
        tried.append({"nncf_ms": theirs_ms, "ms": ms, "candidate": each["name"]})
        if ms <= NOISE * theirs_ms:
            ours = [qualities(workshop, opened, test=test) for test in (False, True)]
            return row | tried[-1] | {"ours": ours}
    return row | min(tried, key=lambda each: float(each["ms"] / each["nncf_ms"]))


def print_nncf(rows: list[Row]) -> bool:
    """Print the table; return whether each candidate is at least as accurate on validation data."""
    heads = "network|float|NNCF|compress|candidate|NNCF: validation|compress|NNCF: test|compress"
    print(f"| {heads.replace('|', ' | ')} |\n| --- |{' ---: |' * heads.count('|')}")
    for row in rows:
        times = [f"{row['float_ms']:.3f} ms", f"{row['nncf_ms']:.3f} ms"]
        if row["ours"] is None:
            slow = f"none is as fast: {row['ms']:.3f} ms at least"
            print(f"| {' | '.join([row['name'], *times, slow, row['candidate']])} |{' |' * 4}")
            continue
        pairs = []
        for (theirs, *before), (ours, *after) in zip(row["theirs"], row["ours"], strict=True):
            error = error_of_drop(before, after)
            sure = "" if error is None else f" ({ours - theirs:+.4f} ± {error:.4f})"
            pairs += [f"{theirs:.4f}", f"{ours:.4f}{sure}"]
        found = [f"{row['ms']:.3f} ms", row["candidate"]]
        print(f"| {' | '.join([row['name'], *times, *found, *pairs])} |")
    return all(row["ours"] is not None and row["ours"][0][0] >= row["theirs"][0][0] for row in rows)


def main() -> int:
    """Measure every subject and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="CIFAR-10 as class folders or .npz")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--runtime", default="onnxruntime")
    parser.add_argument("--budget", default="60m")
    parser.add_argument("--nncf", action="store_true")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.nncf:
        return int(not print_nncf([compare_nncf(name, args) for name in args.only]))
    return int(not print_stages([row for name in args.only for row in compare_stages(name, args)]))


if __name__ == "__main__":
    sys.exit(main())
