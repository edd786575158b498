"""How fast is a packed network beside ONNX Runtime, float and int8, in the same run?

    OPENBLAS_NUM_THREADS=1 python scripts/bench_packed.py [--network nin] [--batch 1 64] [--threads 1 2] [--layers]

Initial weights (speed does not ask what is learned), interleaved in one process, pinned to as many cores as threads.
OPENBLAS_NUM_THREADS=1: numpy's products run on the threads that are timed. "over fp32" and "over int8": the median over
rounds of ONNX Runtime's time over own time in the same round; "least": the same of each one's least time, which is what
the core does while nobody else uses what it shares. ``--layers``: each binary layer alone, one image, in
billions of operations a second (two a product); then, of the nin family, all of them together beside the same blocks
alone in ONNX Runtime.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from micronet.artifact.artifact import Artifact
from micronet.core.machine import describe_machine
from micronet.models.build import ModelSpec, build_model
from micronet.onnx.export import to_onnx
from micronet.packed.from_onnx import pack_model
from micronet.packed.program import Program, to_bytes
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
}


# Products a cycle that the vector units allow: on Zen 4 (four of 256 bits) three operations for 256 products; by AVX2's
# tables, of which two a cycle are read, two for 128.
LIMITS = {"avx512": 341, "avx2": 256}


def floating(spec: ModelSpec, images: torch.Tensor) -> nn.Module:
    """Return a network with batch norms that have seen images."""
    torch.manual_seed(1)
    model = build_model(spec)
    with torch.no_grad():
        for _ in range(3):
            model(images)
    return model.eval()


def quantized(model: nn.Module, spec: ModelSpec, images: torch.Tensor, **config: object) -> Artifact:
    """Return a network by a scheme."""
    model, record = quantize_model(model, QuantConfig(**config))
    calibrate(model, [images])
    return Artifact(model.eval(), spec, [record])


def in_onnx(model: nn.Module, spec: ModelSpec, images: torch.Tensor) -> dict[str, bytes]:
    """Return a network as float and as int8 ONNX model."""
    artifacts = {"fp32": Artifact(model, spec), "int8": quantized(model, spec, images)}
    return {kind: to_onnx(artifact, images).SerializeToString() for kind, artifact in artifacts.items()}


def between_ends(model: nn.Module, images: torch.Tensor) -> tuple[nn.Module, torch.Tensor]:
    """Return a nin's blocks without the first and the last, and what the first hands them."""
    first, *between, _ = model.features
    with torch.no_grad():
        return nn.Sequential(*between), first(images)


def ratios(times: dict[str, list[float]], name: str) -> str:
    """Return ONNX Runtime's time over a network's, fp32's and int8's, less two rounds to warm up, as cells of a table.

    Medians over the rounds, and least time over least time.
    """
    own, found = times[name][2:], []
    for kind in ("fp32", "int8"):
        theirs = times[f"ONNX Runtime {kind}"][2:]
        found += [statistics.median(a / b for a, b in zip(theirs, own, strict=True)), min(theirs) / min(own)]
    return "{:.2f} (least {:.2f}) | {:.2f} (least {:.2f})".format(*found)


def interleave(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return each run's seconds, round by round, in alternating order; the caches are as its own run left them."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 2):
        for name in list(runs) if number % 2 else list(runs)[::-1]:
            runs[name]()
            start = time.perf_counter()
            runs[name]()
            times[name].append(time.perf_counter() - start)
    return times


def together(program: Program, theirs: dict[str, bytes], batches: list[int], rounds: int) -> None:
    """Print the speed of all binary layers, with the pools between them, beside ONNX Runtime's of the same blocks."""
    from micronet.runtimes.packed.execution_plan import Plan
    from micronet.runtimes.packed.kernels.cpu import BITS, TABLE
    from micronet.runtimes.packed.kernels.interpreter import execute

    plan, counter = Plan(program), np.zeros(1, np.int64)
    binary = [i for i, (row, step) in enumerate(zip(plan.steps, plan.layers, strict=True))
              if step.weight is not None and row["product"] == BITS]  # fmt: skip
    steps = plan.steps[binary[0] : binary[-1] + 1]
    options = RuntimeOptions(threads=1, arithmetic="fast")
    sessions = {f"ONNX Runtime {kind}": session_predictor(model, options) for kind, model in theirs.items()}
    width = plan.layers[binary[0] - 1].weight.shape[0]  # what the first layer hands on
    print("\n| batch | binary layers | ms (median) | over fp32 | over int8 |\n| ---: | --- | ---: | ---: | ---: |")
    for batch in batches:
        memory = plan.room(batch).memory
        values = np.random.default_rng(0).standard_normal((batch, width, 32, 32), dtype=np.float32)
        runs: dict[str, Callable[[], object]] = {name: partial(run, values) for name, run in sessions.items()}
        runs["packed"] = partial(execute, steps, batch, memory, plan.constants, TABLE, 0, 1, counter)
        times = interleave(runs, rounds)
        for name, own in times.items():
            print(f"| {batch} | {name} | {1000 * statistics.median(own[2:]):.3f} | {ratios(times, name)} |")


def layers(program: Program) -> None:
    """Print each binary layer's speed, one image, and its share of the most the core can do at the clock measured."""
    from micronet.runtimes.packed.execution_plan import Plan
    from micronet.runtimes.packed.kernels.cpu import BITS, TABLE, WAY
    from micronet.runtimes.packed.kernels.interpreter import execute

    plan, counter = Plan(program), np.zeros(1, np.int64)
    memory, hertz = plan.room(1).memory, clock()
    limit = LIMITS.get(WAY)
    print(f"\nclock {hertz / 1e9:.2f} GHz; {WAY}" + (f": at most {limit} products a cycle" if limit else ""))
    print("\n| layer | products | us | GOP/s | of the limit |\n| --- | ---: | ---: | ---: | ---: |")
    for number, (row, step) in enumerate(zip(plan.steps, plan.layers, strict=True)):  # 0 turns the images
        if step.weight is None or row["product"] != BITS:
            continue
        times = []
        for _ in range(200):
            start = time.perf_counter()
            execute(plan.steps[number : number + 1], 1, memory, plan.constants, TABLE, 0, 1, counter)
            times.append(time.perf_counter() - start)
        spent = statistics.median(times)
        products = int(row["rows"] * row["columns"]) * step.weight.size
        share = "" if limit is None else f"{products / spent / hertz / limit:.0%}"
        print(f"| {number}: {'x'.join(map(str, step.weight.shape))} | {products / 1e6:.1f} M | {1e6 * spent:.0f} | "
              f"{2 * products / spent / 1e9:.0f} | {share} |")  # fmt: skip


def clock() -> float:
    """Return the core's cycles a second, by a chain of additions that each wait for the one before."""
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
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="nin", choices=["nin", "nin_3x3", "nin_gc", "resnet18"])
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=SCHEMES)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--layers", action="store_true")
    asked = parser.parse_args()
    spec, images = ModelSpec(asked.network, {}), torch.randn(8, 3, 32, 32)
    cores = sorted(os.sched_getaffinity(0))
    plain = floating(spec, images)
    models = in_onnx(plain, spec, images)
    programs = {
        name: pack_model(to_onnx(quantized(plain, spec, images, **SCHEMES[name]), images)) for name in asked.schemes
    }
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / f"{index}.packed" for index, name in enumerate(programs)}
        for name, program in programs.items():
            paths[name].write_bytes(to_bytes(program))
        print(f"{describe_machine()}; {asked.network}\n")
        print("| threads | batch | network | bytes | ms (median) | over fp32 | over int8 |")
        print("| ---: | ---: | --- | ---: | ---: | ---: | ---: |")
        for threads in asked.threads:
            os.sched_setaffinity(0, set(cores[:threads]))
            options = RuntimeOptions(threads=threads, arithmetic="fast")
            runs = {f"ONNX Runtime {name}": session_predictor(model, options) for name, model in models.items()}
            runs |= {f"packed {name}": PackedNetwork(path, threads) for name, path in paths.items()}
            sizes = [*map(len, models.values()), *(path.stat().st_size for path in paths.values())]
            for batch in asked.batch:
                batches = np.random.default_rng(0).standard_normal((batch, 3, 32, 32), dtype=np.float32)
                times = interleave({name: partial(run, batches) for name, run in runs.items()}, asked.rounds)
                for (name, own), size in zip(times.items(), sizes, strict=True):
                    print(f"| {threads} | {batch} | {name} | {size:,} | {1000 * statistics.median(own[2:]):.2f} | "
                          f"{ratios(times, name)} |", flush=True)  # fmt: skip
            if asked.layers and threads == 1:
                for name in [name for name in programs if "A1" in name]:
                    print(f"\n{name}")
                    layers(programs[name])
                    if asked.network.startswith("nin") and "all layers" not in name:
                        between, handed = between_ends(plain, images)
                        together(programs[name], in_onnx(between, spec, handed), asked.batch, asked.rounds)
                print()


if __name__ == "__main__":
    main()
