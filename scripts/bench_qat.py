#!/usr/bin/env python
"""Step time of quantization-aware training relative to a float step of the same network, interleaved.

    python scripts/bench_qat.py [--width 1.0] [--batch 64] [--rounds 12]

Compared with: micronet of 2021 in plain autograd operations (round, clamp, detach; batch norms folded with one
convolution for the statistics and one for the output), the fused fake-quantize operators of torch, and Brevitas.
Prints a Markdown table for BENCHMARKS.md.
"""

import argparse
import copy
import importlib.util
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from micronet.artifact.artifact import versions
from micronet.core.machine import tune_allocator
from micronet.models.build import ModelSpec, build_model
from micronet.models.device import describe_machine
from micronet.models.layers import ConvBNReLU
from micronet.quantization.calibrate import calibrate, observing
from micronet.quantization.config import QuantConfig
from micronet.quantization.quantize import quantize_model

OURS = {
    "IAO W8A8": QuantConfig(),
    "IAO W8A8, asymmetric": QuantConfig(q_type="asym"),
    "IAO W8A8, batch norms folded": QuantConfig(bn_fuse=True),
    "LSQ W4A4": QuantConfig(method="lsq", w_bits=4, a_bits=4),
    "DoReFa W8A8": QuantConfig(method="dorefa"),
    "W1A1": QuantConfig(w_bits="binary", a_bits="binary"),
    "ternary W, A1": QuantConfig(w_bits="ternary", a_bits="binary"),
}


class PlainFakeQuant(nn.Module):
    """Symmetric 8 bits in plain operations: moving-average range, round with a detached difference, clamp."""

    def __init__(self, per_channel: bool) -> None:
        super().__init__()
        self.per_channel = per_channel
        self.largest = torch.tensor(0.0)

    def forward(self, x: Tensor) -> Tensor:
        """Return x on its grid."""
        size = x.detach().abs()
        now = size.flatten(1).amax(1).view(-1, *[1] * (x.dim() - 1)) if self.per_channel else size.amax()
        self.largest = now if self.per_channel else 0.9 * self.largest + 0.1 * now
        scale = (self.largest / 127).clamp(min=1e-12)
        q = x / scale
        q = q + (q.round() - q).detach()
        return q.clamp(-127, 127) * scale


class NativeFakeQuant(PlainFakeQuant):
    """Symmetric 8 bits with torch's fused operators."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x on its grid."""
        size = x.detach().abs()
        if self.per_channel:
            scale = (size.flatten(1).amax(1) / 127).clamp(min=1e-12)
            zero = torch.zeros_like(scale, dtype=torch.int32)
            return torch.fake_quantize_per_channel_affine(x, scale, zero, 0, -127, 127)
        self.largest = 0.9 * self.largest + 0.1 * size.amax()
        return torch.fake_quantize_per_tensor_affine(x, float(self.largest / 127) or 1e-12, 0, -127, 127)


class Rival(nn.Module):
    """A convolution block with another library's quantizers."""

    def __init__(self, block: ConvBNReLU, kind: type[nn.Module], fold: bool) -> None:
        super().__init__()
        self.conv, self.bn, self.fold = block.conv, block.bn, fold
        self.weight, self.input = kind(True), kind(False)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the block."""
        conv, bn = self.conv, self.bn
        if not self.fold:
            return F.relu(bn(conv._conv_forward(self.input(x), self.weight(conv.weight), conv.bias)))
        plain = conv(x)  # the batch's statistics
        mean, var = plain.mean((0, 2, 3)), plain.var((0, 2, 3))
        bn.running_mean.lerp_(mean.detach(), 0.1)
        bn.running_var.lerp_(var.detach(), 0.1)
        factor = bn.weight / (bn.running_var + bn.eps).sqrt()
        out = conv._conv_forward(self.input(x), self.weight(conv.weight * factor.view(-1, 1, 1, 1)), None)
        correction = ((bn.running_var + bn.eps) / (var + bn.eps)).sqrt().view(1, -1, 1, 1)
        shift = bn.bias + (conv.bias - mean) * bn.weight / (var + bn.eps).sqrt()
        return F.relu(out * correction + shift.view(1, -1, 1, 1))


def rival(model: nn.Module, kind: type[nn.Module], fold: bool = False) -> nn.Module:
    """Return a copy of nin with another library's blocks."""
    model = copy.deepcopy(model)
    for index, layer in enumerate(model.features):
        if isinstance(layer, ConvBNReLU):
            model.features[index] = Rival(layer, kind, fold)
    return model


def brevitas(model: nn.Module) -> nn.Module | None:
    """Return a copy of nin with Brevitas's layers, or None if it is not installed."""
    if importlib.util.find_spec("brevitas") is None:
        return None
    from brevitas import nn as qnn

    model = copy.deepcopy(model)
    for layer in model.features:
        if isinstance(layer, ConvBNReLU):
            conv = layer.conv
            layer.conv = qnn.QuantConv2d(
                conv.in_channels, conv.out_channels, conv.kernel_size, stride=conv.stride, padding=conv.padding,
                weight_bit_width=8,
            )  # fmt: skip
            layer.relu = qnn.QuantReLU(bit_width=8)
    return model


def step(model: nn.Module) -> Callable[[Tensor, Tensor], None]:
    """Return a function that takes one training step with Adam."""
    model.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

    def run(images: Tensor, labels: Tensor) -> None:
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return run


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=12)
    args = parser.parse_args()
    tune_allocator()
    torch.manual_seed(0)
    base = build_model(ModelSpec("nin", {"width": args.width}))
    images = torch.randn(args.batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (args.batch,))
    models: dict[str, nn.Module] = {"float": copy.deepcopy(base)}
    contexts = ExitStack()
    for name, config in OURS.items():
        model, _ = quantize_model(base, config)
        calibrate(model, [images])
        contexts.enter_context(observing(model))  # as training does
        models[name] = model
    models["plain autograd (2021's formulas)"] = rival(base, PlainFakeQuant)
    models["plain autograd, batch norms folded"] = rival(base, PlainFakeQuant, fold=True)
    models["torch's fake_quantize"] = rival(base, NativeFakeQuant)
    if (other := brevitas(base)) is not None:
        models["Brevitas W8A8"] = other
    steps = {name: step(model) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(args.rounds + 2):
        for name, run in steps.items():
            start = time.perf_counter()
            run(images, labels)
            if turn >= 2:
                times[name].append(time.perf_counter() - start)
    print(f"{describe_machine()}, torch {versions()['torch']}; nin width {args.width}, batch {args.batch}, "
          f"{args.rounds} interleaved steps")  # fmt: skip
    print("| step | ms (median) | over float (median of pairs) |\n| --- | ---: | ---: |")
    for name, found in times.items():
        ratio = statistics.median(own / base for own, base in zip(found, times["float"], strict=True))
        print(f"| {name} | {1000 * statistics.median(found):.0f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
