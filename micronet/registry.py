"""Every name a user can type, and the object behind it as ``module:object``, imported only when asked for.

Adding a model, a data set, a scheme, a stage or a runtime is one new file and one line here; the contract tests
are parametrized over these tables.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from micronet.errors import unknown

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
    "train": "micronet.cli.train",
    "import": "micronet.cli.import_model",
    "sparse-train": "micronet.cli.sparse_train",
    "prune": "micronet.cli.prune",
    "finetune": "micronet.cli.finetune",
    "quantize": "micronet.cli.quantize",
    "bn-fuse": "micronet.cli.bn_fuse",
    "export-onnx": "micronet.cli.export_onnx",
    "check-onnx": "micronet.cli.check_onnx",
    "pack": "micronet.cli.pack",
    "trt-build": "micronet.cli.trt_build",
    "trt-eval": "micronet.cli.trt_eval",
    "evaluate": "micronet.cli.evaluate",
    "compare": "micronet.cli.compare",
    "predict": "micronet.cli.predict",
    "inspect": "micronet.cli.inspect_artifact",
    "sensitivity": "micronet.cli.sensitivity",
    "run": "micronet.cli.run",
}

# A file's suffix -> the runtime that opens it as a predictor.
PREDICTORS = {
    ".safetensors": "micronet.runtime.eager:EagerPredictor",
    ".onnx": "micronet.runtime.ort:OrtPredictor",
    ".packed": "micronet.runtime.packed_network:PackedPredictor",
    ".engine": "micronet.deploy.tensorrt.engine:EnginePredictor",
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
