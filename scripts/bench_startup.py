#!/usr/bin/env python
"""How soon the command line answers: seconds from start to exit, each call a process of its own, interleaved.

    python scripts/bench_startup.py [--rounds 20]

Prints a Markdown table for BENCHMARKS.md.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from micronet.models.device import describe_machine

MICRONET = "import sys; from micronet.cli.app import main; sys.argv[0] = 'micronet'; main()"
COMPLETE = {"_MICRONET_COMPLETE": "complete_bash", "COMP_WORDS": "micronet quantize --calib", "COMP_CWORD": "2"}


def seconds(arguments: list[str], variables: dict[str, str]) -> float:
    """Run the command line once."""
    known = {**os.environ, "PYTHONDONTWRITEBYTECODE": "", **variables}  # what Python compiled once is on the disk
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", MICRONET, *arguments], env=known, capture_output=True, check=True)
    spent = time.perf_counter() - start
    if not done.stdout:
        raise RuntimeError(f"{arguments} printed nothing")
    return spent


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        artifact = str(Path(folder) / "nin.safetensors")
        making = ["train", "--width", "0.1", "--limit", "100", "--epochs", "1", "-o", artifact]
        subprocess.run([sys.executable, "-c", MICRONET, *making], check=True, capture_output=True)
        calls: dict[str, tuple[list[str], dict[str, str]]] = {
            "micronet --help": (["--help"], {}),
            "micronet train --help": (["train", "--help"], {}),
            "micronet quantize --help": (["quantize", "--help"], {}),
            "micronet inspect FILE": (["inspect", artifact], {}),
            "micronet inspect FILE --json": (["inspect", artifact, "--json"], {}),
            "micronet card FILE": (["card", artifact], {}),
            "micronet list": (["list"], {}),
            "completion of `micronet quantize --calib`": ([], COMPLETE),
        }
        spent: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(asked.rounds):
            for name, call in calls.items():
                spent[name].append(seconds(*call))
    print(f"{describe_machine()}; {asked.rounds} rounds")
    print("| call | median (s) | least | most |\n| --- | ---: | ---: | ---: |")
    for name, found in spent.items():
        print(f"| {name} | {statistics.median(found):.2f} | {min(found):.2f} | {max(found):.2f} |")


if __name__ == "__main__":
    main()
