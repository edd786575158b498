"""Networks and their ONNX files, each made once per process for all tests; every caller gets a copy of its own."""

import copy
import json
from functools import cache

import onnx
import torch

from micronet.artifact.artifact import Artifact
from micronet.models.build import ModelSpec, build_model
from micronet.onnx.config import ExportConfig
from micronet.onnx.export import to_onnx
from micronet.quantization.calibrate import calibrate
from micronet.quantization.config import QuantConfig
from micronet.quantization.quantize import quantize_model

IMAGES = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(1))
NIN = ("nin", {"width": 0.1})
RESNET = ("resnet18", {"width": 0.1})
LENET = ("lenet_bn", {"in_channels": 3, "image_size": 32})  # half as many layers to export as nin has
BLOCKS = ("torchvision:mobilenet_v2", {  # two of its kinds of block: with and without a sum
    "num_classes": 4, "inverted_residual_setting": [[1, 16, 1, 1], [6, 24, 2, 2]],
})  # fmt: skip


def plain(name="nin", args=None):
    """Return a float artifact."""
    return copy.deepcopy(_artifact(name, json.dumps(args or NIN[1]), None))


def quantized(name, args, **config):
    """Return an artifact whose batch norms have statistics, quantized and calibrated."""
    return copy.deepcopy(_artifact(name, json.dumps(args), json.dumps(config)))


def plain_file(name="nin", args=None, **export):
    """Return ``plain``'s ONNX model."""
    return _copy(_exported(name, json.dumps(args or NIN[1]), None, json.dumps(export)))


def quantized_file(name, args, config=None, **export):
    """Return the ONNX model of ``quantized`` with the same config."""
    return _copy(_exported(name, json.dumps(args), json.dumps(config or {}), json.dumps(export)))


@cache
def _artifact(name, args, config):
    torch.manual_seed(0)
    spec = ModelSpec(name, json.loads(args))
    model = build_model(spec)
    if config is None:
        return Artifact(model.eval(), spec)
    with torch.no_grad():
        for _ in range(3):
            model(IMAGES)
    model, record = quantize_model(model.eval(), QuantConfig(**json.loads(config)))
    calibrate(model, [IMAGES])
    return Artifact(model.eval(), spec, [record])


@cache
def _exported(name, args, config, export):
    return to_onnx(copy.deepcopy(_artifact(name, args, config)), IMAGES, ExportConfig(**json.loads(export)))


def _copy(proto):
    copied = onnx.ModelProto()
    copied.CopyFrom(proto)
    return copied
