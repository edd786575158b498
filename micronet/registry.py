"""Every name a user can type, and the object behind it as ``module:object``, imported only when asked for.

Adding a model, a data set, a scheme, a stage or a runtime is one new file and one line here; the contract tests
are parametrized over these tables.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from micronet.errors import unknown


class Command(NamedTuple):
    """A subcommand: its module, and what the list of all says of it, so that the list imports none of them."""

    module: str
    summary: str


MODELS = {
    "nin": "micronet.models.nin:nin",
    "nin_3x3": "micronet.models.nin:nin_3x3",
    "nin_gc": "micronet.models.nin:nin_gc",
    "resnet18": "micronet.models.resnet:resnet18",
    "resnet34": "micronet.models.resnet:resnet34",
    "resnet50": "micronet.models.resnet:resnet50",
    "resnet101": "micronet.models.resnet:resnet101",
    "resnet152": "micronet.models.resnet:resnet152",
    "lenet": "micronet.models.lenet:lenet",
    "lenet_bn": "micronet.models.lenet:lenet_bn",
}

DATA = {
    "digits": "micronet.data.sources:digits",
    "cifar10": "micronet.data.sources:cifar10",
    "cifar100": "micronet.data.sources:cifar100",
    "mnist": "micronet.data.sources:mnist",
    "fashion-mnist": "micronet.data.sources:fashion_mnist",
}

SCHEMES = {
    "iao": "micronet.quantization.schemes.iao:IAO",
    "dorefa": "micronet.quantization.schemes.dorefa:DoReFa",
    "lsq": "micronet.quantization.schemes.lsq:LSQ",
    "wbwtab": "micronet.quantization.schemes.wbwtab:WbWtAb",
}

# A quantizer's name in a record -> its class.
QUANTIZERS = {
    "iao": "micronet.quantization.schemes.iao:AffineQuantizer",
    "dorefa-weight": "micronet.quantization.schemes.dorefa:TanhQuantizer",
    "dorefa-activation": "micronet.quantization.schemes.dorefa:ClippedQuantizer",
    "lsq": "micronet.quantization.schemes.lsq:LearnedQuantizer",
    "binary": "micronet.quantization.schemes.wbwtab:BinaryQuantizer",
    "ternary": "micronet.quantization.schemes.wbwtab:TernaryQuantizer",
    "sign": "micronet.quantization.schemes.wbwtab:SignQuantizer",
}

# What judges channels: a module with scores(model, flow) and, perhaps, a penalty that prepares for it.
CRITERIA = {
    "bn-scale": "micronet.pruning.criteria.bn_scale",
    "l1": "micronet.pruning.criteria.l1",
    "l2": "micronet.pruning.criteria.l2",
    "fpgm": "micronet.pruning.criteria.fpgm",
    "taylor": "micronet.pruning.criteria.taylor",
    "random": "micronet.pruning.criteria.random",
}

# Stages that change a model's structure, and the function that rebuilds that structure from a record.
RESTORE = {
    "prune": "micronet.pruning.prune:restore",
    "quantize": "micronet.quantization.quantize:restore",
    "bn-fuse": "micronet.quantization.fold:restore",
}

# The subcommands, in the order that the help lists them: modules with run and EXAMPLE.
COMMANDS = {
    "train": Command("micronet.cli.train", "Train a network from scratch."),
    "import": Command(
        "micronet.cli.import_model",
        "Make an artifact of any network: torchvision's, your own factory's, or the original micronet's checkpoint.",
    ),
    "sparse-train": Command(
        "micronet.cli.sparse_train",
        "Train with the penalty of a pruning criterion, so that channels the network can do without approach zero.",
    ),
    "prune": Command("micronet.cli.prune", "Cut the channels that matter least and carry the rest's weights over."),
    "finetune": Command(
        "micronet.cli.finetune", "Train an artifact further: float or pruned as it is, quantized with its quantizers."
    ),
    "quantize": Command(
        "micronet.cli.quantize",
        "Quantize a network and train it to live with that (QAT); --mode ptq trains nothing and takes seconds.",
    ),
    "bn-fuse": Command(
        "micronet.cli.bn_fuse",
        "Fold every batch norm into the layer before it; quantized weights keep their integers, biases become int32.",
    ),
    "export-onnx": Command(
        "micronet.cli.export_onnx",
        "Export to ONNX with quantized weights as int8, in the form ONNX Runtime or TensorRT is fast with.",
    ),
    "check-onnx": Command(
        "micronet.cli.check_onnx",
        "Say what makes an ONNX file slow or wrong in ONNX Runtime or TensorRT, and what to do about it.",
    ),
    "pack": Command(
        "micronet.cli.pack",
        "Write a network at its weights' true width: 1 bit binary, five ternary weights a byte, 2 to 8 bits dense.",
    ),
    "trt-build": Command("micronet.cli.trt_build", "Build a TensorRT engine: strongly typed, int8 by explicit Q/DQ."),
    "trt-eval": Command(
        "micronet.cli.trt_eval",
        "Run a TensorRT engine on an NVIDIA GPU: accuracy or mean IoU, latency and images a second by batch size.",
    ),
    "evaluate": Command(
        "micronet.cli.evaluate", "Measure accuracy and loss on the test images, and latency at 1 and 64 images."
    ),
    "compare": Command(
        "micronet.cli.compare",
        "Put networks side by side: accuracy, MACs, bytes, latency, agreement. The first is what others are held to.",
    ),
    "predict": Command(
        "micronet.cli.predict", "Name the likeliest classes of images, with the network's probability of each."
    ),
    "inspect": Command(
        "micronet.cli.inspect_artifact",
        "Show an artifact's network, history, data, metrics and layers, without loading it.",
    ),
    "sensitivity": Command(
        "micronet.cli.sensitivity",
        "Quantize one layer at a time, without training: the scores' signal-to-noise ratio, and the accuracy lost.",
    ),
    "run": Command(
        "micronet.cli.run",
        "Run a recipe's commands in order; skip those whose options and input files are unchanged; end in a compare.",
    ),
}

# A file's suffix -> the runtime that opens it as a predictor.
PREDICTORS = {
    ".safetensors": "micronet.runtimes.torch:EagerPredictor",
    ".onnx": "micronet.runtimes.onnxruntime:OrtPredictor",
    ".packed": "micronet.runtimes.packed.adapter:PackedPredictor",
    ".engine": "micronet.runtimes.tensorrt.engine:EnginePredictor",
}


def load_object(reference: str) -> Any:
    """Import the object named by ``"module:attribute"``, or a module by its name alone."""
    module, _, attribute = reference.partition(":")
    found = import_module(module)
    return getattr(found, attribute) if attribute else found


@contextmanager
def importable_from(folder: Path) -> Iterator[None]:
    """Let the user's code, and its imports of its neighbours, be found in a folder."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def resolve(table: dict[str, str], name: str, noun: str) -> Any:
    """Return the object registered as ``name``; raise MicronetError with the allowed names otherwise."""
    if name not in table:
        raise unknown(noun, name, table)
    return load_object(table[name])
