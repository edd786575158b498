#!/usr/bin/env python
"""Training speed in images per CPU second, compared with a plain PyTorch loop on the same network and images.

    OMP_NUM_THREADS=1 python scripts/bench_training.py --data path/to/cifar10 [--rounds 5] [--images 640]

``--data``: a folder with train/<class>/*.jpg and test/<class>/*.jpg of 32 x 32 pixels. The plain loop is that of
micronet in 2021: torchvision's ImageFolder and transforms in a DataLoader, Adam, contiguous tensors, the C library's
default allocator. Ours is that of ``micronet train``. CPU seconds (user and system) depend less on the machine's other
work than wall-clock time. The allocator is set once per process, so each measurement runs in its own process, in turns;
the first epoch (or 3 steps) is not counted. Then the loaders are timed alone, and the share of our step that loading
takes is computed. For steps with quantizers see bench_qat.py. Prints Markdown tables for BENCHMARKS.md.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset
from torchvision import datasets, transforms

from micronet.artifact.artifact import versions
from micronet.core.machine import tune_allocator
from micronet.core.progress import Silent
from micronet.data.batches import train_batches
from micronet.data.load import load_data
from micronet.models.build import ModelSpec, build_model
from micronet.models.device import describe_machine
from micronet.training.config import RunContext, TrainConfig
from micronet.training.loop import Trainer

BATCH = 64
RATE = 0.01
SKIPPED_STEPS = 3


def plain_loader(args: argparse.Namespace, workers: int) -> DataLoader[Any]:
    """Return the loader of micronet in 2021."""
    transform = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ]
    )
    images = datasets.ImageFolder(str(args.data / "train"), transform)
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))[: args.images].tolist()
    return DataLoader(Subset(images, chosen), BATCH, shuffle=True, num_workers=workers)


def plain(args: argparse.Namespace, name: str) -> float:
    """Train as in 2021; return images per CPU second."""
    model = build_model(ModelSpec(name, {})).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    start, images = 0.0, 0
    for step, (inputs, labels) in enumerate(plain_loader(args, workers=0)):
        if step == SKIPPED_STEPS:
            start, images = time.process_time(), 0
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
        images += len(labels)
    return images / (time.process_time() - start)


class Clock(Silent):
    """Progress that records the epoch and the CPU seconds at the end of each training step."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, float]] = []

    def step(self, label: str, done: int, total: int, **numbers: float) -> None:
        """Record a step."""
        self.steps.append((label, time.process_time()))


def ours(args: argparse.Namespace, name: str) -> float:
    """Train as ``micronet train`` does; return images per CPU second of the second epoch."""
    data = load_data(str(args.data), limit=args.images)
    config, clock = TrainConfig(epochs=2, batch_size=BATCH, lr=RATE), Clock()
    with tempfile.TemporaryDirectory() as folder:
        run = RunContext(Path(folder) / "a.safetensors", torch.device("cpu"), progress=clock)
        Trainer(build_model(ModelSpec(name, {})), data, config, run, {}).fit()
    times = [spent for label, spent in clock.steps if label.startswith("epoch 2")]
    rest = len(data.train) % BATCH or BATCH
    return (BATCH * (len(times) - 2) + rest) / (times[-1] - times[0])


def measure(which: str, name: str) -> float:
    """Run ``ours`` or ``plain`` in a new process."""
    done = subprocess.run(
        [sys.executable, *sys.argv, "--only", f"{which} {name}"], check=True, stdout=subprocess.PIPE, text=True
    )
    return float(done.stdout.split()[-1])


def rate(batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Return the images per second of a loader."""
    start = time.perf_counter()
    count = sum(len(labels) for _, labels in batches)
    return count / (time.perf_counter() - start)


def loading(args: argparse.Namespace) -> dict[str, list[float]]:
    """Return each loader's images per second, measured in turns.

    Ours has its images cached, as in every epoch after the first. All use our allocator settings.
    """
    tune_allocator()
    data = load_data(str(args.data), limit=args.images)
    loaders: dict[str, Callable[[], Iterable[tuple[Tensor, Tensor]]]] = {
        "ours": lambda: train_batches(data.train, data.spec, BATCH, seed=1, epoch=1),
        **{f"ImageFolder, {n} workers": lambda n=n: plain_loader(args, n) for n in (0, 1, 2)},  # type: ignore[misc]
    }
    rate(loaders["ours"]())
    found: dict[str, list[float]] = {name: [] for name in loaders}
    for _ in range(args.rounds):
        for name, load in loaders.items():
            found[name].append(rate(load()))
    return found


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=640)
    parser.add_argument("--models", default="nin,nin_gc")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        which, name = args.only.split()
        print({"ours": ours, "plain": plain}[which](args, name))
        return
    steps: dict[str, list[tuple[float, float]]] = {name: [] for name in args.models.split(",")}
    for _ in range(args.rounds):
        for name, pairs in steps.items():
            pairs.append((measure("plain", name), measure("ours", name)))
            print(
                f"{name}: plain {pairs[-1][0]:.0f}, ours {pairs[-1][1]:.0f} images per CPU second",
                file=sys.stderr,
                flush=True,
            )
    loaded = loading(args)
    print(f"{describe_machine()}, torch {versions()['torch']}; batch {BATCH}, {args.rounds} rounds")
    print("| network | plain loop (images per CPU second) | ours | ours / plain (median of pairs) | least | loading |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    ours_alone = statistics.median(loaded["ours"])
    for name, pairs in steps.items():
        slow, fast = (statistics.median(side) for side in zip(*pairs, strict=True))
        ratios = [own / base for base, own in pairs]
        print(f"| {name} | {slow:.0f} | {fast:.0f} | {statistics.median(ratios):.2f} | {min(ratios):.2f} | "
              f"{fast / ours_alone:.2%} |")  # fmt: skip
    print("\n| loader | images/s | ours over it (median of rounds) |\n| --- | ---: | ---: |")
    for name, found in loaded.items():
        ratio = statistics.median(own / other for own, other in zip(loaded["ours"], found, strict=True))
        print(f"| {name} | {statistics.median(found):,.0f} | {ratio:.1f} |")


if __name__ == "__main__":
    main()
