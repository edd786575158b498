#!/usr/bin/env python
"""Prune every classification network of torchvision: half of the channels, widths in multiples of 8.

    python scripts/prune_zoo.py [NAME ...] [--size 224] [--no-onnx] [--torch-pruning]

Each is pruned (every layer by the same share, judged by its weights' length, which untrained networks have), held
against the whole one with the cut channels silenced, run forward and backward, saved, loaded and exported to ONNX.
It counts where at least 40 % of the channels that could be cut and 25 % of the parameters went. Prints a Markdown table
for BENCHMARKS.md. ``--torch-pruning``: the same networks by Torch-Pruning with its defaults (half of the channels,
multiples of 8, the class scores ignored), which counts where the pruned network runs forward and backward and 25 % of
the parameters went.
"""

import argparse
import gc
import tempfile
import time
import warnings
from pathlib import Path

import torch
from torchvision import models

from micronet.artifact.artifact import Artifact, load, save, versions
from micronet.artifact.header import StageRecord
from micronet.models.build import ModelSpec, build_model
from micronet.models.device import describe_machine
from micronet.onnx.export import to_onnx
from micronet.pruning.config import PruneConfig
from micronet.pruning.prune import prune_model

CONFIG = PruneConfig(0.5, regular=8, criterion="l2", scope="layer")
SMALLEST = {"inception_v3": 299}  # its pools leave nothing of less than this


def prune_one(name: str, size: int, onnx: bool, folder: Path) -> tuple[str, bool]:
    """Prune one network; return its row of the table, and whether it counts."""
    torch.manual_seed(0)
    spec = ModelSpec(f"torchvision:{name}", {})
    model = build_model(spec).eval()
    before = sum(p.numel() for p in model.parameters())
    images = torch.rand(2, 3, size, size)
    start = time.perf_counter()
    pruned, record, plan = prune_model(model, CONFIG, images)
    seconds = time.perf_counter() - start
    after = sum(p.numel() for p in pruned.parameters())
    pruned.train()
    for module in pruned.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()  # two images are too few for statistics at 1 x 1
    out = pruned(images)
    leaves = out if isinstance(out, tuple) else (out,)
    torch.stack([leaf.sum() for leaf in leaves if leaf is not None]).sum().backward()
    lacking = [key for key, p in pruned.named_parameters() if p.grad is None]
    artifact = Artifact(pruned.eval(), spec, [StageRecord("import"), record])
    path = folder / "pruned.safetensors"
    save(artifact, path)
    again = load(path)
    same = torch.equal(again.model.eval()(images), artifact.model(images))
    if onnx:
        to_onnx(again, images)
    whole = sum(group.before for group in plan.groups.values())
    share, params = plan.cut / plan.total, 1 - after / before
    counts = share >= 0.4 and params >= 0.25 and same and not lacking
    note = "" if counts else "reloads otherwise" if not same else ", ".join(lacking[:2]) or "too little went"
    return (
        f"| {name} | {share:.0%} | {1 - plan.total / whole:.0%} | {before / 1e6:.1f} -> {after / 1e6:.1f} "
        f"| {params:.0%} | {seconds:.1f} | {'yes' if counts else 'no: ' + note} |"
    ), counts


def prune_by_torch_pruning(name: str, size: int) -> tuple[str, bool]:
    """Prune one network by Torch-Pruning; return its row, and whether it counts."""
    import torch_pruning as tp

    torch.manual_seed(0)
    model = build_model(ModelSpec(f"torchvision:{name}", {})).eval()
    before = sum(p.numel() for p in model.parameters())
    images = torch.rand(2, 3, size, size)
    classes = [
        module
        for module in model.modules()
        if (isinstance(module, torch.nn.Linear) and module.out_features == 1000)
        or (isinstance(module, torch.nn.Conv2d) and module.out_channels == 1000)
    ]
    start = time.perf_counter()
    importance = tp.importance.GroupMagnitudeImportance(p=2)
    tp.pruner.BasePruner(
        model, images, importance=importance, pruning_ratio=0.5, ignored_layers=classes, round_to=8
    ).step()
    seconds = time.perf_counter() - start
    params = 1 - sum(p.numel() for p in model.parameters()) / before
    model(images).sum().backward()
    counts = params >= 0.25
    return f"| {name} | | | {before / 1e6:.1f} | {params:.0%} | {seconds:.1f} | {'yes' if counts else 'no'} |", counts


def main() -> None:
    """Prune and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--no-onnx", action="store_true")
    parser.add_argument("--torch-pruning", action="store_true")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    names = asked.names or models.list_models(module=models)
    print(f"{describe_machine()}, {versions()}; {asked.size} pixels\n")
    print(
        "| network | cut | pinned | parameters, M | fewer | seconds | counts |\n"
        "| --- | ---: | ---: | --- | ---: | ---: | --- |"
    )
    total = 0
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            try:
                size = SMALLEST.get(name, asked.size)
                if asked.torch_pruning:
                    row, counts = prune_by_torch_pruning(name, size)
                else:
                    row, counts = prune_one(name, size, not asked.no_onnx, Path(folder))
            except Exception as error:  # a zoo of failures is what this counts
                row, counts = f"| {name} | | | | | | no: {str(error).splitlines()[0]} |", False
            total += counts
            print(row, flush=True)
            gc.collect()
    print(f"\n{total} of {len(names)} networks count.")


if __name__ == "__main__":
    main()
