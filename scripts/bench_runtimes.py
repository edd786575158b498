"""Deploy six networks to every runtime, and measure how close they come to torch and how fast they are.

    OMP_NUM_THREADS=1 python scripts/bench_runtimes.py [--networks nin resnet18] [--schemes W8A8] [--runtimes c ncnn]

Each network has initial weights and batch norms with statistics of noise: neither speed nor agreement depends on what
was learned. It is exported with ``micronet.export``, opened as ``compare`` opens it, and all runtimes of a network and
scheme run in turns with one thread. "error": the difference from torch's outputs over their spread, on 64 images of
noise. "integers": how many of the layers with weights the runtime executed in integers. "over float": the time of the
same runtime's float network over this one's, in the same run. Prints a Markdown table; a cell without a figure has the
reason below the table.
"""

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import micronet
from micronet.artifact.artifact import versions
from micronet.core.files import file_size
from micronet.errors import MicronetError, first_line
from micronet.evaluation.latency import latencies
from micronet.evaluation.network import Network
from micronet.models.build import ModelSpec, build_model
from micronet.models.device import describe_machine
from micronet.models.outputs import tensors_in
from micronet.onnx.integers import count_integer_layers
from micronet.runtimes.config import RuntimeOptions
from micronet.runtimes.network import open_network
from micronet.runtimes.onnxruntime import OrtPredictor

RUNTIMES = {"onnxruntime": ".onnx", "openvino": "", "ncnn": "", "packed": ".packed", "c": ""}
IMAGES = 64
SCHEMES: dict[str, dict[str, Any]] = {
    "float": {},
    "W8A8": {"mode": "ptq"},
    "W1A1": {"mode": "ptq", "w_bits": "binary", "a_bits": "binary"},
}
SIGNED = {"q_type": "sym", "a_sign": "signed"}  # what ncnn takes
OPTIONS = RuntimeOptions(threads=1)


class UNet(nn.Module):
    """Two levels down and up again, as for small masks (Ronneberger et al. 2015)."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep = nn.ModuleList([block(3, 16), block(16, 32)]), block(32, 64)
        self.up, self.head = nn.ModuleList([block(96, 32), block(48, 16)]), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of 4 classes for every pixel."""
        kept = []
        for level in self.down:
            x = level(x)
            kept.append(x)
            x = F.max_pool2d(x, 2)
        x = self.deep(x)
        for level in self.up:
            x = level(torch.cat([F.interpolate(x, scale_factor=2.0, mode="nearest"), kept.pop()], 1))
        scores: Tensor = self.head(x)
        return scores


def block(inputs: int, outputs: int) -> nn.Module:
    """Return two convolutions with batch norm and ReLU."""
    layers: list[nn.Module] = []
    for width in (inputs, outputs):
        layers += [nn.Conv2d(width, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


def named(name: str) -> Callable[[], nn.Module]:
    """Return what builds a network that ``--model`` names."""
    return lambda: build_model(ModelSpec(name))


# A network's name -> what builds it, its image size, and whether binary layers make sense in it.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, bool]] = {
    "nin": (named("nin"), 32, True),
    "nin_gc": (named("nin_gc"), 32, True),
    "resnet18": (named("resnet18"), 32, True),
    "mobilenet_v2": (named("torchvision:mobilenet_v2"), 128, False),
    "mobilenet_v3_small": (named("torchvision:mobilenet_v3_small"), 128, False),
    "U-Net": (UNet, 64, False),
}


def made(name: str, scheme: str, runtime: str, images: Tensor) -> Any:
    """Return a network as the artifact that a runtime's export takes."""
    build, _, _ = NETWORKS[name]
    torch.manual_seed(1)
    model = build().train()
    with torch.no_grad():
        for _ in range(3):
            model(images)  # gives the batch norms statistics
    artifact: Any = model.eval()
    if SCHEMES[scheme]:
        more = SIGNED if runtime == "ncnn" and scheme == "W8A8" else {}
        artifact = micronet.quantize(artifact, data=images, **SCHEMES[scheme], **more)
    norms = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    return micronet.fuse(artifact, images[:2]) if norms else artifact


def exported(artifact: Any, runtime: str, folder: Path, images: Tensor) -> Path:
    """Export an artifact; return the file or folder."""
    path = folder / f"network_{runtime}{RUNTIMES[runtime]}"
    micronet.export(artifact, target=runtime, data=[images], output=path, skip_timing=True)
    return path


def error(network: Network, artifact: Any, images: Tensor) -> float:
    """Return ||outputs - torch's|| / ||torch's - their mean||."""
    with torch.no_grad():
        expected = tensors_in(artifact.model(images))[0].numpy()
    return float(np.linalg.norm(network(images.numpy()) - expected) / np.linalg.norm(expected - expected.mean()))


def integers(network: Network) -> str:
    """Return how many layers a network's runtime executed in integers, of how many."""
    if isinstance(network, OrtPredictor):
        found = count_integer_layers(network.proto)
    elif hasattr(network, "integer_layers"):
        found = network.integer_layers()
    else:  # the packed runtime computes what it stores
        weights = [each.weight for each in network.program.operations if each.weight is not None]  # type: ignore[attr-defined]
        return f"{sum(weight.dtype.kind != 'f' for weight in weights)}/{len(weights)}"
    if found is None:
        return "none"
    kinds = [found["convolutions"], found["linear"]]
    return f"{sum(kind['integer'] for kind in kinds)}/{sum(kind['all'] for kind in kinds)}"


def rows(name: str, schemes: list[str], runtimes: list[str], reasons: list[str]) -> list[str]:
    """Measure a network in every scheme and runtime; return the rows of the table."""
    _, side, binary = NETWORKS[name]
    images = torch.randn(IMAGES, 3, side, side, generator=torch.Generator().manual_seed(0))
    opened: dict[tuple[str, str], tuple[Any, float, str, int]] = {}
    refused = []
    with tempfile.TemporaryDirectory() as place:
        for scheme in (each for each in schemes if binary or each != "W1A1"):
            folder = Path(place, scheme)
            folder.mkdir()
            for runtime in ["torch", *runtimes]:
                artifact = made(name, scheme, runtime, images)
                if runtime == "torch":
                    run = partial(run_torch, artifact.model.eval())
                    opened[scheme, runtime] = run, 0.0, "none", 0
                    continue
                try:
                    path = exported(artifact, runtime, folder, images)
                    network = open_network(path, OPTIONS)
                    found = error(network, artifact, images), integers(network), file_size(path)
                    opened[scheme, runtime] = (network, *found)
                except MicronetError as problem:
                    reasons.append(f"- {name} {scheme} in {runtime}: {first_line(problem)}")
                    refused.append(f"| {name} | {scheme} | {runtime} | refused, see below | | | | | |")
        networks = [each[0] for each in opened.values()]
        times = [
            dict(zip(opened, latencies(networks, [images[:batch].numpy()] * len(networks)), strict=True))
            for batch in (1, IMAGES)
        ]
    lines = []
    for (scheme, runtime), (_, off, count, size) in opened.items():
        one, many = (each[scheme, runtime].p50_ms for each in times)
        plain = times[0].get(("float", runtime))
        ratio = f"{plain.p50_ms / one:.2f}" if plain is not None and scheme != "float" else ""
        figures = f"{off:.2%} | {count} | {one:.2f} | {many:.1f} | {ratio} | {size:,}"
        lines.append(f"| {name} | {scheme} | {runtime} | {figures} |")
    print("\n".join(lines), flush=True)
    return [*lines, *refused]


@torch.no_grad()
def run_torch(model: nn.Module, images: Any) -> Any:
    """Run a network in torch."""
    return model(torch.from_numpy(images))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=SCHEMES)
    parser.add_argument("--runtimes", nargs="+", default=list(RUNTIMES), choices=RUNTIMES)
    options = parser.parse_args()
    torch.set_num_threads(1)
    reasons: list[str] = []
    table = [row for name in options.networks for row in rows(name, options.schemes, options.runtimes, reasons)]
    print(f"\n{describe_machine()}, {versions()}\n")
    print("| network | scheme | runtime | error | integers | ms, 1 image | ms, 64 images | over float | bytes |")
    print("|---|---|---|---|---|---|---|---|---|")
    print("\n".join([*table, "", *reasons]))


if __name__ == "__main__":
    main()
