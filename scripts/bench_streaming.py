#!/usr/bin/env python
"""Memory of a training on a folder of many images, over the whole process tree, streamed and cached.

    python scripts/bench_streaming.py --folder many [--images 100000] [--model lenet_bn] [--image-size 32]

Creates the folder if it does not exist: small JPEGs of smooth noise in 100 classes, 95 % train/ and 5 % val/. Then runs
``micronet train`` for one epoch, once with MICRONET_IMAGE_MEMORY=0 (every image is decoded each time) and once with the
default, and samples the processes' memory ten times per second. PSS counts memory shared by processes once, RSS in each
process. Prints a Markdown table for BENCHMARKS.md.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from micronet.models.device import describe_machine

CLASSES = 100
MICRONET = "import sys; from micronet.cli.app import run; sys.exit(run(sys.argv[1:]))"


def make(folder: Path, count: int) -> None:
    """Write the images."""
    random = np.random.default_rng(0)
    for index in range(count):
        part = "val" if index % 20 == 0 else "train"
        place = folder / part / f"n{index // 20 % CLASSES:08}" / f"{index}.JPEG"
        place.parent.mkdir(parents=True, exist_ok=True)
        blocks = Image.fromarray(random.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        blocks.resize((80, 64), Image.Resampling.BICUBIC).save(place, quality=85)


def tree(root: int) -> list[int]:
    """Return the ids of a process and its descendants."""
    found = [root]
    for process in found:
        for task in Path(f"/proc/{process}/task").glob("*/children"):
            found += map(int, task.read_text().split())
    return found


def memory(root: int) -> tuple[int, int, int]:
    """Return the number of processes in a tree, and their RSS and PSS in bytes."""
    rss = pss = count = 0
    for process in tree(root):
        try:
            text = Path(f"/proc/{process}/smaps_rollup").read_text()
        except OSError:  # the process has ended
            continue
        count += 1
        rss += 1024 * int(re.findall(r"^Rss:\s+(\d+)", text, re.MULTILINE)[0])
        pss += 1024 * int(re.findall(r"^Pss:\s+(\d+)", text, re.MULTILINE)[0])
    return count, rss, pss


def train(args: argparse.Namespace, variables: dict[str, str]) -> list[str]:
    """Train for one epoch and return the cells of a table row."""
    with tempfile.TemporaryDirectory() as results:
        output = Path(results) / "a.safetensors"
        options = ["train", "--model", args.model, "--image-size", args.image_size, "--data", args.folder,
                   "--epochs", 1, "-o", output]  # fmt: skip
        running = subprocess.Popen(
            [sys.executable, "-c", MICRONET, *map(str, options)], env={**os.environ, **variables}
        )
        seen = []
        while running.poll() is None:
            seen.append(memory(running.pid))
            time.sleep(0.1)
        if running.returncode:
            raise SystemExit(running.returncode)
        row = json.loads(output.with_name("a.metrics.jsonl").read_text().splitlines()[-1])
    quarter = len(seen) // 4
    second, last = (
        statistics.median(pss for *_, pss in part) for part in (seen[quarter : 2 * quarter], seen[-quarter:])
    )
    figures = [max(rss for _, rss, _ in seen), max(pss for *_, pss in seen), second, last]
    return [str(max(count for count, *_ in seen)), *(f"{figure / 2**20:,.0f}" for figure in figures),
            f"{row['images_per_s']:,.0f}"]  # fmt: skip


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--model", default="lenet_bn")
    parser.add_argument("--image-size", type=int, default=32)
    args = parser.parse_args()
    if not args.folder.exists():
        make(args.folder, args.images)
    rows = {
        "streamed": train(args, {"MICRONET_IMAGE_MEMORY": "0"}),
        "the default": train(args, {}),
    }
    print(f"{describe_machine()}; {args.model}, {args.images} images, {args.image_size} pixels a side; MiB")
    print("| images | processes | RSS, most | PSS, most | PSS, 2nd quarter | PSS, last quarter | images/s |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, cells in rows.items():
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
