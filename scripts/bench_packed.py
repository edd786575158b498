"""Compare the speed of packed networks with ONNX Runtime, float and int8, in one run.

    OPENBLAS_NUM_THREADS=1 python scripts/bench_packed.py [--network nin] [--batch 1 64] [--threads 1 2] [--layers]

The weights are initial ones, because speed does not depend on training. All networks run interleaved in one process,
pinned to one core per thread. Set OPENBLAS_NUM_THREADS=1 so that numpy does not use other cores. "over fp32" and "over
int8" are ONNX Runtime's time divided by the network's: the median over rounds, and "least", the ratio of the shortest
times, which are the least disturbed by other processes. ``--layers`` times each binary layer alone, on one image, in
billions of operations per second (two per product), and for the nin family all of them together beside the same blocks
in ONNX Runtime.
"""

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import nn

from micronet.artifact.artifact import Artifact
from micronet.models.build import ModelSpec, build_model
from micronet.models.device import describe_machine
from micronet.onnx.export import to_onnx
from micronet.packed.file_format import to_bytes
from micronet.packed.from_onnx import pack_model
from micronet.packed.program import Program
from micronet.quantization.calibrate import calibrate
from micronet.quantization.config import QuantConfig
from micronet.quantization.quantize import quantize_model
from micronet.runtimes.config import RuntimeOptions
from micronet.runtimes.onnxruntime import session_predictor
from micronet.runtimes.packed.predictor import PackedNetwork

BINARY = {"w_bits": "binary", "a_bits": "binary"}
SCHEMES = {
    "W1A1": BINARY,
    "W1A1, first and last 8-bit": {**BINARY, "first_last": "8bit"},
    "W1A1, first and last W1A8": {**BINARY, "first_last": "8bit-input"},
    "W1A1, all layers": {**BINARY, "first_last": "same"},
    "WtA1": {"w_bits": "ternary", "a_bits": "binary"},
    "WtA1, first and last WtA8": {"w_bits": "ternary", "a_bits": "binary", "first_last": "8bit-input"},
    "W2A8": {"w_bits": 2, "method": "lsq"},
    "W8A8": {},
}
OURS = ["nin", "nin_3x3", "nin_gc", "resnet18"]


# Most products per cycle. AVX-512 on Zen 4: four 256-bit units, three operations per 256 products. AVX2: two table
# look-ups per cycle, two instructions per 128 products.
MAX_PRODUCTS_PER_CYCLE = {"avx512": 341, "avx2": 256}


class UNet(nn.Module):
    """A U-Net of three levels, from 16 channels on, with bilinear upsampling."""

    def __init__(self) -> None:
        super().__init__()
        widths = [3, 16, 32, 64]
        self.down = nn.ModuleList(self._block(*pair) for pair in itertools.pairwise(widths))
        self.up = nn.ModuleList([self._block(64 + 32, 32), self._block(32 + 16, 16)])
        self.pool, self.resize, self.head = nn.MaxPool2d(2), nn.Upsample(None, 2, "bilinear"), nn.Conv2d(16, 4, 1)

    @staticmethod
    def _block(inputs: int, outputs: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for width in (inputs, outputs):
            layers += [nn.Conv2d(width, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        return nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the scores of each pixel."""
        one = self.down[0](x)
        two = self.down[1](self.pool(one))
        x = self.up[0](torch.cat([self.resize(self.down[2](self.pool(two))), two], 1))
        return self.head(self.up[1](torch.cat([self.resize(x), one], 1)))


def float_network(spec: ModelSpec, images: torch.Tensor) -> nn.Module:
    """Return a network whose batch norms have seen images."""
    torch.manual_seed(1)
    if spec.name == "unet":
        model: nn.Module = UNet()
    elif spec.name in OURS:
        model = build_model(spec)
    else:
        model = getattr(torchvision.models, spec.name)()
    with torch.no_grad():
        for _ in range(3):
            model(images)
    return model.eval()


def quantized(model: nn.Module, spec: ModelSpec, images: torch.Tensor, **config: object) -> Artifact:
    """Return a quantized network."""
    model, record = quantize_model(model, QuantConfig(**config))
    calibrate(model, [images])
    return Artifact(model.eval(), spec, [record])


def onnx_models(model: nn.Module, spec: ModelSpec, images: torch.Tensor) -> dict[str, bytes]:
    """Return a network as a float and an int8 ONNX model."""
    artifacts = {"fp32": Artifact(model, spec), "int8": quantized(model, spec, images)}
    return {kind: to_onnx(artifact, images).SerializeToString() for kind, artifact in artifacts.items()}


def middle_blocks(model: nn.Module, images: torch.Tensor) -> tuple[nn.Module, torch.Tensor]:
    """Return all blocks of a nin network but the first and the last, and the first one's output."""
    first, *middle, _ = model.features
    with torch.no_grad():
        return nn.Sequential(*middle), first(images)


def ratios(times: dict[str, list[float]], name: str) -> str:
    """Return ONNX Runtime's time over a network's, for fp32 and int8, without two warm-up rounds, as table cells."""
    own, found = times[name][2:], []
    for kind in ("fp32", "int8"):
        theirs = times[f"ONNX Runtime {kind}"][2:]
        found += [statistics.median(a / b for a, b in zip(theirs, own, strict=True)), min(theirs) / min(own)]
    return "{:.2f} (least {:.2f}) | {:.2f} (least {:.2f})".format(*found)


def interleave(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return each run's seconds per round, in alternating order, each after an untimed run that warms the caches."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 2):
        for name in list(runs) if number % 2 else list(runs)[::-1]:
            runs[name]()
            start = time.perf_counter()
            runs[name]()
            times[name].append(time.perf_counter() - start)
    return times


def time_binary_layers(program: Program, theirs: dict[str, bytes], batches: list[int], rounds: int) -> None:
    """Print the time of all binary layers, with the pools between them, and of the same blocks in ONNX Runtime."""
    from micronet.runtimes.packed.compiled_backend import ExecutionPlan
    from micronet.runtimes.packed.kernels.cpu import BITS, DIFFERENCE_TABLE
    from micronet.runtimes.packed.kernels.interpreter import execute

    plan, counter = ExecutionPlan(program), np.zeros(1, np.int64)
    binary = [i for i, (row, call) in enumerate(zip(plan.instructions, plan.calls, strict=True))
              if call.weight is not None and row["arithmetic"] == BITS]  # fmt: skip
    instructions = plan.instructions[binary[0] : binary[-1] + 1]
    options = RuntimeOptions(threads=1, arithmetic="fast")
    sessions = {f"ONNX Runtime {kind}": session_predictor(model, options) for kind, model in theirs.items()}
    width = plan.calls[binary[0] - 1].weight.shape[0]  # output channels of the first layer
    print("\n| batch | binary layers | ms (median) | over fp32 | over int8 |\n| ---: | --- | ---: | ---: | ---: |")
    for batch in batches:
        memory = plan.workspace(batch).memory
        values = np.random.default_rng(0).standard_normal((batch, width, 32, 32), dtype=np.float32)
        runs: dict[str, Callable[[], object]] = {name: partial(run, values) for name, run in sessions.items()}
        runs["packed"] = partial(execute, instructions, batch, memory, plan.constants, DIFFERENCE_TABLE, 0, 1, counter)
        times = interleave(runs, rounds)
        for name, own in times.items():
            print(f"| {batch} | {name} | {1000 * statistics.median(own[2:]):.3f} | {ratios(times, name)} |")


def time_each_layer(program: Program) -> None:
    """Print each binary layer's speed on one image, and its share of the core's maximum at the measured clock rate."""
    from micronet.runtimes.packed.compiled_backend import ExecutionPlan
    from micronet.runtimes.packed.kernels.cpu import BITS, DIFFERENCE_TABLE, INSTRUCTION_SET
    from micronet.runtimes.packed.kernels.interpreter import execute

    plan, counter = ExecutionPlan(program), np.zeros(1, np.int64)
    memory, hertz = plan.workspace(1).memory, clock_hertz()
    limit = MAX_PRODUCTS_PER_CYCLE.get(INSTRUCTION_SET)
    print(
        f"\nclock {hertz / 1e9:.2f} GHz; {INSTRUCTION_SET}" + (f": at most {limit} products per cycle" if limit else "")
    )
    print("\n| layer | products | us | GOP/s | of the limit |\n| --- | ---: | ---: | ---: | ---: |")
    for number, (row, call) in enumerate(zip(plan.instructions, plan.calls, strict=True)):
        if call.weight is None or row["arithmetic"] != BITS:
            continue
        times = []
        for _ in range(200):
            start = time.perf_counter()
            execute(plan.instructions[number : number + 1], 1, memory, plan.constants, DIFFERENCE_TABLE, 0, 1, counter)
            times.append(time.perf_counter() - start)
        spent = statistics.median(times)
        products = int(row["rows"] * row["columns"]) * call.weight.size
        share = "" if limit is None else f"{products / spent / hertz / limit:.0%}"
        print(f"| {number}: {'x'.join(map(str, call.weight.shape))} | {products / 1e6:.1f} M | {1e6 * spent:.0f} | "
              f"{2 * products / spent / 1e9:.0f} | {share} |")  # fmt: skip


def clock_hertz() -> float:
    """Measure the core's clock rate with a chain of operations that each wait for the one before."""
    from numba import njit

    @njit
    def chain(count: int, value: int) -> int:
        for _ in range(count):
            value = (value ^ (value << 1)) + 1  # three operations, one cycle each, that cannot overlap
        return value

    chain(1, 1)
    rates = []
    for _ in range(5):
        start = time.perf_counter()
        chain(10_000_000, 1)
        rates.append(30_000_000 / (time.perf_counter() - start))
    return max(rates)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="nin", choices=[*OURS, "unet", "mobilenet_v3_small"])
    parser.add_argument("--size", type=int, default=32, help="height and width of the images")
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=SCHEMES)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--layers", action="store_true")
    arguments = parser.parse_args()
    spec, images = ModelSpec(arguments.network, {}), torch.randn(8, 3, arguments.size, arguments.size)
    cores = sorted(os.sched_getaffinity(0))
    plain = float_network(spec, images)
    models = onnx_models(plain, spec, images)
    programs = {
        name: pack_model(to_onnx(quantized(plain, spec, images, **SCHEMES[name]), images)) for name in arguments.schemes
    }
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / f"{index}.packed" for index, name in enumerate(programs)}
        for name, program in programs.items():
            paths[name].write_bytes(to_bytes(program))
        print(f"{describe_machine()}; {arguments.network}\n")
        print("| threads | batch | network | bytes | ms (median) | over fp32 | over int8 |")
        print("| ---: | ---: | --- | ---: | ---: | ---: | ---: |")
        for threads in arguments.threads:
            os.sched_setaffinity(0, set(cores[:threads]))
            options = RuntimeOptions(threads=threads, arithmetic="fast")
            runs = {f"ONNX Runtime {name}": session_predictor(model, options) for name, model in models.items()}
            runs |= {f"packed {name}": PackedNetwork(path, threads) for name, path in paths.items()}
            sizes = [*map(len, models.values()), *(path.stat().st_size for path in paths.values())]
            for batch in arguments.batch:
                batches = np.random.default_rng(0).standard_normal((batch, *images.shape[1:]), dtype=np.float32)
                times = interleave({name: partial(run, batches) for name, run in runs.items()}, arguments.rounds)
                for (name, own), size in zip(times.items(), sizes, strict=True):
                    print(f"| {threads} | {batch} | {name} | {size:,} | {1000 * statistics.median(own[2:]):.2f} | "
                          f"{ratios(times, name)} |", flush=True)  # fmt: skip
            if arguments.layers and threads == 1:
                for name in [name for name in programs if "A1" in name]:
                    print(f"\n{name}")
                    time_each_layer(programs[name])
                    if arguments.network.startswith("nin") and "all layers" not in name:
                        middle, middle_images = middle_blocks(plain, images)
                        time_binary_layers(
                            programs[name], onnx_models(middle, spec, middle_images), arguments.batch, arguments.rounds
                        )
                print()


if __name__ == "__main__":
    main()
