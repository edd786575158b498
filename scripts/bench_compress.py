#!/usr/bin/env python
"""The front of micronet compress against the best single stage: uniform pruning, and bits alone.

    OMP_NUM_THREADS=1 python scripts/bench_compress.py --data path/to/cifar10 --work runs/compress --budget 60m
    OMP_NUM_THREADS=1 python scripts/bench_compress.py --data path/to/cifar10 --work runs/c --only nin --limit 5000

Trains each subject (unless its file is in the folder), compresses it, and prints a row for each drop of 0.5, 1 and 2
points: the latency of the fastest candidate within the drop, of the fastest with bits alone, and of the fastest that
cuts every layer alike, all as fractions of the float network's, and the largest error of a predicted latency. Exits
with 1 if a front is slower than a single stage, or a prediction is off by more than a tenth.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

TIMM = '{"model_name": "lcnet_050", "num_classes": 10}'
UNET = '{"encoder_name": "mobilenet_v2", "encoder_weights": null, "classes": 2}'
# A subject -> what trains it. The U-Net needs --masks, a folder of images and masks.
SUBJECTS: dict[str, list[str]] = {
    "nin": ["--model", "nin", "--width", "0.5"],
    "resnet18": ["--model", "resnet18", "--width", "0.5"],
    "mobilenet_v2": ["--model", "torchvision:mobilenet_v2"],
    "lcnet_050": ["--model", "timm:create_model", "--model-args", TIMM],
    "unet": ["--model", "segmentation_models_pytorch:Unet", "--model-args", UNET, "--task", "segmentation"],
}
DROPS = (0.005, 0.01, 0.02)
LARGEST_ERROR = 0.1
NOTHING = float("inf")


def micronet(*words: str) -> int:
    """Run a command; return its exit code."""
    return subprocess.run([sys.executable, "-m", "micronet", *words], check=False).returncode


def compressed(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Train and compress a subject, as far as that is not done; return its front."""
    folder, file = args.work / name, args.work / f"{name}.safetensors"
    data = args.masks if name == "unet" else args.data
    limit = ["--limit", str(args.limit)] if args.limit else []
    if not file.exists():
        words = ["train", *SUBJECTS[name], "--data", data, "--epochs", str(args.epochs), *limit, "-o", str(file)]
        if micronet(*words):
            sys.exit(f"{name} cannot be trained")
    if not (folder / "front.json").exists():
        words = ["compress", str(file), "--max-drop", "2", "--runtime", args.runtime, "--budget", args.budget, *limit]
        micronet(*words, "-o", str(folder))
    found: dict[str, Any] = json.loads((folder / "front.json").read_text())
    return found


def fastest(candidates: list[dict[str, Any]], drop: float) -> float:
    """Return the least latency of candidates within a drop, as a fraction of the first one's."""
    made = [each["latency_ms"] for each in candidates if not each["failed"] and each["drop"] <= drop]
    return min(made, default=NOTHING)


def rows(name: str, found: dict[str, Any]) -> list[tuple[str, float, float, float, float, float]]:
    """Return, for each drop: the front, bits alone, uniform pruning in float and with bits, the error."""
    every = found["candidates"]
    whole, made = every[0]["latency_ms"], [each for each in every if not each["failed"]]
    bits = [each for each in made if not each["plan"].get("widths")]
    uniform = [made[0], *(each for each in made if "every layer" in each["name"])]
    predicted = [each for each in made if each["predicted_ms"]]
    error = max((abs(each["predicted_ms"] / each["latency_ms"] - 1) for each in predicted), default=0.0)
    return [
        (name, drop, *(fastest(some, drop) / whole for some in (made, bits, uniform)), error)
        for drop in DROPS
    ]  # fmt: skip


def main() -> int:
    """Measure every subject and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--masks", help="a folder of images and masks, for the U-Net; without it, that is left out")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--runtime", default="onnxruntime")
    parser.add_argument("--budget", default="60m")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--limit", type=int)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    names = [name for name in args.only if name != "unet" or args.masks]
    table = [row for name in names for row in rows(name, compressed(name, args))]
    print(
        "| network | drop | front | bits alone | uniform pruning | error |\n| --- | ---: | ---: | ---: | ---: | ---: |"
    )
    for name, drop, *figures in table:
        print(f"| {name} | {100 * drop:g} pt | {' | '.join(f'{each:.2f}' for each in figures)} |")
    return int(any(row[2] > min(row[3:5]) or row[5] > LARGEST_ERROR for row in table))


if __name__ == "__main__":
    sys.exit(main())
