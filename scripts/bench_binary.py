#!/usr/bin/env python
"""What each way to train binary and ternary networks is worth: an ablation.

    OMP_NUM_THREADS=1 python scripts/bench_binary.py --data path/to/cifar10 --folder OUT --width 0.5 --limit 20000

Trains a float network with the preset fast, then quantizes it once a row: with the defaults, and with one option
changed. Existing files in the folder are reused, so an interrupted run continues. Accuracy is that on the validation
images, from which the defaults were chosen. Prints a Markdown table for BENCHMARKS.md.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import micronet
from micronet.artifact.artifact import versions
from micronet.models.device import describe_machine

ROWS: dict[str, dict[str, Any]] = {
    "the defaults": {},
    "weights binary from the first step": {"float_weights": 0.0},
    "float weights for longer": {"float_weights": 0.75},
    "centered weights": {"w_center": True},
    "triangular gradient of the sign": {"a_ste": "soft"},
    "labels alone": {"distill_weight": 0.0},
    "the teacher alone": {"distill_weight": 1.0},
    "preset plain": {"preset": "plain"},
    "half the learning rate": {"lr": 0.005},
    "twice the learning rate": {"lr": 0.02},
    "averaged weights": {"ema": 0.99},
    "no scales": {"no_alpha": True},
}


def accuracy(args: argparse.Namespace, floating: Path, name: str, seed: int) -> float:
    """Return the validation accuracy of a row, in percent; train it unless its file exists."""
    path = args.folder / f"{args.model}-{args.w_bits}-{name.replace(' ', '-')}-{seed}.safetensors"
    if not path.exists():
        micronet.quantize(
            floating, w_bits=args.w_bits, a_bits="binary", epochs=args.epochs, limit=args.limit, seed=seed, output=path,
            **ROWS[name],
        )  # fmt: skip
    return 100 * float(micronet.load(path).metrics["validation_accuracy"])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--model", default="nin_3x3")
    parser.add_argument("--width", type=float)
    parser.add_argument("--limit", type=int, help="train on at most N images")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--float-epochs", type=int, default=6)
    parser.add_argument("--w-bits", choices=["binary", "ternary"], default="binary")
    parser.add_argument("--seeds", type=int, default=2, help="how many")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    floating = args.folder / f"{args.model}.safetensors"
    if not floating.exists():
        micronet.train(
            data=args.data, model=args.model, width=args.width, limit=args.limit, epochs=args.float_epochs,
            preset="fast", output=floating,
        )  # fmt: skip
    reached = 100 * float(micronet.load(floating).metrics["validation_accuracy"])
    print(
        f"{describe_machine()}, torch {versions()['torch']}; {args.model}, {args.epochs} epochs, {args.seeds} seeds\n"
    )
    print(f"| {args.w_bits} weights, binary activations; float {reached:.2f} % | validation accuracy |\n| --- | ---: |")
    for name in args.rows:
        found = [accuracy(args, floating, name, seed) for seed in range(1, args.seeds + 1)]
        print(f"| {name} | {statistics.mean(found):.2f} ({', '.join(f'{one:.2f}' for one in found)}) |", flush=True)


if __name__ == "__main__":
    main()
