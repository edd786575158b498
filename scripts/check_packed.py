"""Check that a packed network classifies real images as torch does, and that only rounding explains differences.

    python scripts/check_packed.py fused.safetensors [--data DATA] [--limit N]

After a float first layer everything is integer, so a sign can differ from torch's only if the first layer's sum is
closer to 0 than float32 can resolve: within K * 2^-24 * sum(|w| |x|) for K products (Higham 2002, eq. 3.5). The script
counts images with another class, and signs of the first layer that differ beyond that bound, which would be a bug.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from micronet.artifact.artifact import load
from micronet.data.batches import eval_batches
from micronet.data.load import load_data
from micronet.onnx.export import to_onnx
from micronet.packed.from_onnx import pack_model
from micronet.packed.program import Program
from micronet.runtimes.packed.compiled_backend import CompiledNetwork

UNIT_ROUNDOFF = 2.0**-24  # of float32


def first_layer(program: Program) -> Program | None:
    """Return a program up to the signs after its first layer, or None if that is not a float convolution."""
    if [operation.kind for operation in program.operations[:2]] != ["conv", "sign"]:
        return None
    return Program(program.operations[:2], program.shape, {})


def wrong_signs(program: Program, images: torch.Tensor, signs: np.ndarray) -> tuple[int, int]:
    """Return how many signs (N, H, W, C) differ from those of float64 sums, and how many of them beyond the bound."""
    conv = program.operations[0]
    assert conv.weight is not None
    weight, attributes = torch.from_numpy(conv.weight).double(), conv.attributes
    top, left, bottom, right = attributes.get("pads", [0, 0, 0, 0])
    padded = F.pad(images.double(), (left, right, top, bottom))
    options = {
        "stride": attributes.get("stride", 1),
        "dilation": attributes.get("dilation", 1),
        "groups": attributes.get("group", 1),
    }
    bias = torch.zeros(len(weight)).double() if conv.bias is None else torch.from_numpy(conv.bias).double()
    exact = F.conv2d(padded, weight, bias, **options).permute(0, 2, 3, 1).numpy()
    size = F.conv2d(padded.abs(), weight.abs(), bias.abs(), **options).permute(0, 2, 3, 1).numpy()
    differ = (exact >= 0) != (signs > 0)
    return int(differ.sum()), int((differ & (np.abs(exact) > (weight[0].numel() + 1) * UNIT_ROUNDOFF * size)).sum())


def main() -> None:
    """Print the differences; exit 1 if a sign differs beyond the bound, or more than one image in a thousand."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--data")
    parser.add_argument("--limit", type=int)
    arguments = parser.parse_args()
    artifact = load(arguments.artifact)
    data = load_data(arguments.data or (artifact.data or {})["name"], limit=arguments.limit)
    program = pack_model(to_onnx(artifact, next(eval_batches(data.test, data.spec, 2))[0]))
    network, start = CompiledNetwork(program, 2), first_layer(program)
    begin = None if start is None else CompiledNetwork(start, 2)
    seen = missed = differing = wrong = signs = 0
    for images, _ in eval_batches(data.test, data.spec):
        with torch.no_grad():
            theirs = artifact.model.eval()(images).argmax(1).numpy()
        seen += len(images)
        missed += int((network(images.numpy()).argmax(1) != theirs).sum())
        if begin is not None and start is not None:
            found = begin(images.numpy())
            signs += found.size
            differing, wrong = (
                a + b for a, b in zip((differing, wrong), wrong_signs(start, images, found), strict=True)
            )
    print(f"{seen - missed} of {seen} images get torch's class ({1 - missed / seen:.2%})")
    if begin is not None:
        print(
            f"first layer: {differing} of {signs:,} signs differ from the exact sum's, {wrong} of them beyond rounding"
        )
    sys.exit(wrong > 0 or missed > seen / 1000)


if __name__ == "__main__":
    main()
