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
    """A command: its stage, and its summary, so that the list of commands imports no stage and stays fast."""

    stage: str
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
    "digits": "micronet.data.load:digits",
    "cifar10": "micronet.data.load:cifar10",
    "cifar100": "micronet.data.load:cifar100",
    "mnist": "micronet.data.load:mnist",
    "fashion-mnist": "micronet.data.load:fashion_mnist",
}

# What outputs mean: the loss, the metrics, how data are read.
TASKS = {
    "classification": "micronet.tasks.classification:Classification",
    "segmentation": "micronet.tasks.segmentation:Segmentation",
    "agreement": "micronet.tasks.agreement:Agreement",
}

# A module with weight_quantizer(config, bits, axis, channels) and activation_quantizer(config, bits, signed).
SCHEMES = {
    "iao": "micronet.quantization.schemes.iao",
    "dorefa": "micronet.quantization.schemes.dorefa",
    "lsq": "micronet.quantization.schemes.lsq",
    "wbwtab": "micronet.quantization.schemes.wbwtab",
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

# The stages, in the order that the help lists them. A recipe may hold any of them.
STAGES = {
    "train": Command("micronet.stages.train:Train", "Train a network from scratch."),
    "import": Command("micronet.stages.import_model:Import", "Create an artifact from any network."),
    "sparse-train": Command("micronet.stages.train:SparseTrain", "Train with a sparsity penalty before pruning."),
    "prune": Command("micronet.stages.prune:Prune", "Remove the least important channels."),
    "finetune": Command("micronet.stages.train:Finetune", "Continue training an artifact."),
    "quantize": Command("micronet.stages.quantize:Quantize", "Quantize a network with or without training (QAT, PTQ)."),
    "bn-fuse": Command("micronet.stages.bn_fuse:BnFuse", "Fold every batch norm into the layer before it."),
    "export-onnx": Command(
        "micronet.stages.export:ExportOnnx", "Export a network to ONNX, with quantized weights as int8."
    ),
    "export": Command("micronet.stages.export_target:Export", "Export a network to any runtime."),
    "check-onnx": Command(
        "micronet.stages.check_onnx:CheckOnnx", "Find out what makes an ONNX model slow or inaccurate."
    ),
    "pack": Command("micronet.stages.export:Pack", "Pack a network into a file with 1 to 8 bits per weight."),
    "trt-build": Command("micronet.stages.trt_build:TrtBuild", "Build a strongly typed TensorRT engine."),
    "trt-eval": Command("micronet.stages.trt_eval:TrtEval", "Evaluate a TensorRT engine on an NVIDIA GPU."),
    "evaluate": Command("micronet.stages.evaluate:Evaluate", "Measure the accuracy, loss and latency of a network."),
    "compare": Command("micronet.stages.evaluate:Compare", "Compare the accuracy, MACs, size and latency of networks."),
    "report": Command("micronet.stages.report:Report", "Write a page that compares the networks in a folder."),
    "plot": Command("micronet.stages.plot:Plot", "Draw training curves, or histograms of weights and activations."),
    "predict": Command("micronet.stages.evaluate:Predict", "Find the most likely classes of images."),
    "inspect": Command("micronet.stages.inspect_artifact:Inspect", "Show a network file's layers, bits and history."),
    "verify": Command("micronet.stages.verify:Verify", "Check that files are whole and hold what they say."),
    "sensitivity": Command(
        "micronet.stages.sensitivity:Sensitivity", "Measure each layer's sensitivity to quantization."
    ),
    "compress": Command(
        "micronet.compression.stage:Compress", "Find the smallest or fastest network that keeps its accuracy."
    ),
}
# Every command: the stages, and what works on recipes.
COMMANDS = {
    **STAGES,
    "run": Command("micronet.recipe.run:RunRecipe", "Run a recipe, skipping stages that are unchanged."),
    "schema": Command("micronet.recipe.schema:Schema", "Print the JSON Schema of recipes, for editors."),
    "list": Command("micronet.recipe.list_names:ListNames", "List the names of models, data, schemes and others."),
    "init": Command("micronet.recipe.init:Init", "Write a recipe from the answers to five questions."),
    "card": Command("micronet.stages.card:Card", "Write a model card from what a network file says of itself."),
    "doctor": Command("micronet.stages.doctor:Doctor", "Show what is installed, and what will be fast here."),
}

# The Python API's name of a command -> the command's.
_API_NAMES = {"import": "import_model", "bn-fuse": "fuse", "run": "run_recipe"}
_NOT_IN_API = ("schema", "list", "init")  # they are for editors and terminals
API = {_API_NAMES.get(name, name.replace("-", "_")): name for name in COMMANDS if name not in _NOT_IN_API}

# A file's suffix -> the runtime that opens it as a predictor.
PREDICTORS = {
    ".safetensors": "micronet.runtimes.torch:EagerPredictor",
    ".onnx": "micronet.runtimes.onnxruntime:OrtPredictor",  # or one of ONNX_RUNTIMES
    ".packed": "micronet.runtimes.packed.adapter:PackedPredictor",
    ".engine": "micronet.runtimes.tensorrt.engine:EnginePredictor",
}

# What --runtime chooses for an ONNX file.
ONNX_RUNTIMES = {
    "onnxruntime": "micronet.runtimes.onnxruntime:OrtPredictor",
    "openvino": "micronet.runtimes.openvino:OpenVinoPredictor",
}

# What --target of export chooses: a stage, or a module with
# - write(proto, folder, fp16=), which fills a folder and returns what its note says,
# - open_folder(folder, note, options), which returns it as a network,
# - TITLE, FILES (those that it reads), STORES_FP16 (whether it can store float weights in fp16),
# - PAIRS: whether activations are pairs of QuantizeLinear and DequantizeLinear in proto (see ``onnx.export.to_onnx``).
TARGETS = {
    "onnxruntime": "export-onnx",
    "openvino": "micronet.runtimes.openvino",
    "ncnn": "micronet.runtimes.ncnn.target",
    "c": "micronet.runtimes.c.target",
    "tensorrt": "trt-build",
    "packed": "pack",
}
# Targets by what they run: any operator that torch exports, and any that ``pack`` takes.
RUN_ANY = ("onnxruntime", "openvino")
RUN_PACKED = (*RUN_ANY, "packed", "c")


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
