#!/usr/bin/env python
"""Accuracy against seconds for the preset plain, SGD with one cycle, and the preset fast, which is the default.

    OMP_NUM_THREADS=1 python scripts/bench_recipe.py --data path/to/cifar10 --model nin_3x3 --width 0.5 --epochs 12

Each recipe trains the same network on the same images, once per seed, each time in a process of its own. The preset
fast trains for a third of the epochs too, because a schedule reaches its accuracy at its end. Accuracy is that on the
validation images, and seconds are those of the CPU (user and system, all threads), which depend less on the machine's
other work than wall-clock time. Prints a row per epoch as it ends on standard error, then Markdown tables for
BENCHMARKS.md: each training's result, and the time that each recipe needed to an accuracy (default: the mean final one
of plain). Exits with 1 if fast needed more than a third of plain's time to it.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import micronet
from micronet.artifact.artifact import versions
from micronet.core.progress import Silent
from micronet.models.device import describe_machine

SGD_LR = 0.1  # usual for networks with batch norms
RECIPES: dict[str, dict[str, Any]] = {
    "plain": {"preset": "plain"},
    "SGD, one cycle": {"preset": "plain", "optimizer": "sgd", "lr": SGD_LR},
    "fast": {"preset": "fast"},
}
LEAST_GAIN = 3.0
Run = list[tuple[float, float]]  # CPU seconds and validation accuracy at the end of each epoch


class Clock(Silent):
    """Progress that records the CPU seconds at the end of each epoch."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def line(self, text: str) -> None:
        """Record the end of an epoch."""
        if text.startswith("epoch"):
            self.ends.append(time.process_time())


def train(args: argparse.Namespace) -> Run:
    """Train with one recipe and seed."""
    clock, settings = Clock(), RECIPES[args.only]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "a.safetensors"
        start = time.process_time()
        micronet.train(
            data=args.data, model=args.model, width=args.width, limit=args.limit, epochs=args.epochs, seed=args.seeds,
            output=output, progress=clock, **settings,
        )  # fmt: skip
        rows = [json.loads(line) for line in output.with_suffix(".metrics.jsonl").read_text().splitlines()]
    return [(end - start, row["validation_accuracy"]) for end, row in zip(clock.ends, rows, strict=True)]


def run(name: str, epochs: int, seed: int) -> Run:
    """Train in a new process."""
    words = [sys.executable, *sys.argv, "--only", name, "--epochs", str(epochs), "--seeds", str(seed)]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    found = [(seconds, accuracy) for seconds, accuracy in json.loads(done.stdout.splitlines()[-1])]
    for number, (seconds, accuracy) in enumerate(found, 1):
        print(f"{name}, seed {seed}, epoch {number}/{epochs}: {accuracy:.2%} after {seconds:.0f} s", file=sys.stderr)
    return found


def time_to(accuracy: float, runs: list[Run]) -> float | None:
    """Return the seconds after which the mean of a recipe's seeds first reached an accuracy, or None."""
    for epochs in zip(*runs, strict=True):
        if statistics.mean(reached for _, reached in epochs) >= accuracy:
            return float(statistics.mean(seconds for seconds, _ in epochs))
    return None


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="nin_3x3")
    parser.add_argument("--width", type=float)
    parser.add_argument("--limit", type=int, help="train on at most N images")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=2, help="how many")
    parser.add_argument("--accuracy", type=float, help="0..1")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(train(args)))
        return 0
    lengths = dict.fromkeys([(name, args.epochs) for name in RECIPES] + [("fast", max(1, args.epochs // 3))])
    runs = {(name, epochs): [run(name, epochs, seed) for seed in range(1, args.seeds + 1)] for name, epochs in lengths}
    goal = args.accuracy or statistics.mean(each[-1][1] for each in runs["plain", args.epochs])
    print(f"{describe_machine()}, torch {versions()['torch']}; {args.model}, {args.seeds} seeds\n")
    print(f"| recipe | epochs | validation accuracy | CPU seconds | seconds to {goal:.2%} |")
    print("| --- | ---: | ---: | ---: | ---: |")
    needed: dict[str, float] = {}
    for (name, epochs), each in runs.items():
        reached, seconds = time_to(goal, each), statistics.mean(one[-1][0] for one in each)
        if reached is not None:
            needed[name] = min(reached, needed.get(name, reached))
        accuracies = ", ".join(f"{one[-1][1]:.2%}" for one in each)
        print(f"| {name} | {epochs} | {accuracies} | {seconds:.0f} | {'-' if reached is None else round(reached)} |")
    gain = needed.get("plain", runs["plain", args.epochs][0][-1][0]) / needed.get("fast", float("inf"))
    print(f"\nfast reaches {goal:.2%} {gain:.1f} times as fast as plain (at least {LEAST_GAIN:g} expected)")
    return int(gain < LEAST_GAIN)


if __name__ == "__main__":
    sys.exit(main())
