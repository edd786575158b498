"""Measure how closely torch and ONNX Runtime agree, for every scheme on several networks.

    python scripts/export_zoo.py --data FOLDER --folder OUT [--networks nin resnet18] [--images 1000]
    OMP_NUM_THREADS=1 python scripts/export_zoo.py --foreign [PART_OF_A_NAME ...]

For nin, nin_gc, resnet18 (half width each) and torchvision's mobilenet_v2: trains a float network, quantizes it with
each scheme, fuses, exports, and compares ONNX Runtime with torch on test images: the share of images put into the same
class, the relative error of the scores, and the largest difference of any activation's integers if each layer gets the
same input. Existing files in the folder are reused, so an interrupted run continues. Prints a Markdown table.

``--foreign``: other people's networks with random weights instead, beside ONNX Runtime's own quantizer. Name parts of
their names for some of them. With ``--folder``, rows are stored there as they end, and a later run continues.
"""

import argparse
from pathlib import Path

import onnx
import torch

from micronet.artifact.artifact import Artifact, load
from micronet.cli.app import run
from micronet.data.batches import eval_batches
from micronet.data.dataset import DataSpec
from micronet.data.load import load_data
from micronet.data.split import random_subset
from micronet.models.device import describe_machine
from micronet.onnx.check import compare_outputs
from micronet.onnx.layer_agreement import compare_layers

NETWORKS = {
    "nin": ["--model", "nin", "--width", "0.5"],
    "nin_gc": ["--model", "nin_gc", "--width", "0.5"],
    "resnet18": ["--model", "resnet18", "--width", "0.5"],
    # Learns slowly from 32 pixels; "same class" only means something if its scores are well separated.
    "mobilenet_v2": ["--model", "torchvision:mobilenet_v2", "--lr", "0.005", "--limit", "20000", "--epochs", "10"],
}
SHORT = ["--limit", "8000", "--epochs", "4"]  # unless a network above overrides them


def schemes(images: int) -> dict[str, list[str] | None]:
    """Return quantize's options per scheme, None for float; ``images``: the size of its one epoch of training."""
    trained = ["--epochs", "1", "--limit", str(images)]
    return {
        "float": None,
        "W8A8 sym channel": ["--mode", "ptq"],
        "W8A8 sym layer": ["--mode", "ptq", "--q-level", "layer"],
        "W8A8 asym channel": ["--mode", "ptq", "--q-type", "asym"],
        "W8A8 asym layer": ["--mode", "ptq", "--q-type", "asym", "--q-level", "layer"],
        "DoReFa W4A4": ["--method", "dorefa", "--w-bits", "4", "--a-bits", "4", *trained],
        "LSQ W4A4": ["--method", "lsq", "--w-bits", "4", "--a-bits", "4", *trained],
        "W1A1": ["--w-bits", "binary", "--a-bits", "binary", *trained],
        "WtA32": ["--w-bits", "ternary", "--a-bits", "32", *trained],
    }


SCHEMES = schemes(4000)
CHUNK = 100


def make(*arguments: object) -> None:
    """Run a micronet command unless its output exists."""
    if not Path(str(arguments[-1])).exists() and run([*map(str, arguments), "--quiet"]):
        raise SystemExit(f"failed: {' '.join(map(str, arguments))}")


def exported(folder: Path, network: str, scheme: str, data: str) -> tuple[Path, Path]:
    """Return the paths of the fused artifact and the ONNX file of a network quantized with a scheme."""
    base = folder / f"{network}.safetensors"
    make("train", *SHORT, *NETWORKS[network], "--data", data, "--output", base)
    stem = folder / f"{network}-{scheme.replace(' ', '-')}"
    quantized = base
    if SCHEMES[scheme] is not None:
        quantized = stem.with_suffix(".safetensors")
        make("quantize", base, *SCHEMES[scheme], "--output", quantized)
    fused = stem.with_name(f"{stem.name}-fused.safetensors")
    make("bn-fuse", quantized, "--output", fused)
    make("export-onnx", fused, "--check-images", CHUNK, "--output", stem.with_suffix(".onnx"))
    return fused, stem.with_suffix(".onnx")


def agreement(artifact: Artifact, proto: onnx.ModelProto, images: int) -> tuple[float, float, int]:
    """Return the share of equal classes, the scores' error, and the largest difference of integers in steps."""
    data = load_data(None, like=DataSpec.from_json(artifact.data))
    chosen = random_subset(data.test, images, 1)
    batches = [batch for batch, _ in eval_batches(chosen, data.spec, CHUNK)]
    outputs = compare_outputs(artifact.model, proto, batches)
    worst = [max(compare_layers(artifact.model, proto, batch).values(), default=0) for batch in batches]
    return outputs.classes, outputs.error, max(worst)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--foreign", nargs="*", metavar="PART_OF_A_NAME")
    parser.add_argument("--seconds", type=float, default=3, help="how long to time each foreign network; 0: not")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=SCHEMES)
    parser.add_argument("--images", type=int, default=1000)
    args = parser.parse_args()
    if args.foreign is not None:
        print(f"{describe_machine()}\n")
        from foreign_zoo import print_table  # the script beside this one

        if args.folder is not None:
            args.folder.mkdir(parents=True, exist_ok=True)
        return print_table(args.foreign, args.seconds, args.folder and args.folder / "foreign.jsonl")
    if args.data is None or args.folder is None:
        parser.error("--data and --folder are required, or --foreign")
    args.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(1)
    print(f"{describe_machine()}; {args.images} test images\n")
    print("| network | scheme | same class | score error | largest step, layer by layer | bytes |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for network in args.networks:
        for scheme in args.schemes:
            fused, file = exported(args.folder, network, scheme, args.data)
            same, error, step = agreement(load(fused), onnx.load(file), args.images)
            size = file.stat().st_size
            print(f"| {network} | {scheme} | {same:.2%} | {error:.4%} | {step} | {size:,} |", flush=True)


if __name__ == "__main__":
    main()
