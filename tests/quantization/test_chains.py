"""PTQ, QAT, QAFT and bn-fuse in every legal order, on networks of many kinds: saved, reloaded, exported."""

import numpy as np
import onnx
import pytest
import torch

from micronet.artifact.artifact import Artifact, load, save
from micronet.artifact.header import StageRecord
from micronet.graph.trace import trace
from micronet.models.build import ModelSpec, build_model
from micronet.onnx.export import to_onnx
from micronet.onnx.layer_agreement import compare_layers
from micronet.quantization.calibrate import calibrate, collect, freeze, frozen, observing, set_ranges
from micronet.quantization.config import QuantConfig
from micronet.quantization.fold import fold_model
from micronet.quantization.functional import int8_grid
from micronet.quantization.quantize import quantize_model
from micronet.runtimes.config import RuntimeOptions
from micronet.runtimes.onnxruntime import OrtPredictor
from micronet.stages.bn_fuse import BnFuse
from micronet.stages.quantize import Quantize
from micronet.stages.stage import Stage
from micronet.stages.train import Finetune

IMAGES = torch.randn(4, 3, 32, 32)
NETWORKS = {
    "lenet_bn": {"in_channels": 3, "image_size": 32},
    "nin": {"width": 0.1},
    "nin_gc": {"width": 0.1},
    "resnet18": {"width": 0.1},
    "torchvision:mobilenet_v2": {  # two of its kinds of block: with and without a sum
        "num_classes": 10, "width_mult": 0.25, "inverted_residual_setting": [[1, 16, 1, 1], [6, 24, 2, 2]],
    },
    "torchvision:vit_b_16": {"num_classes": 10, "image_size": 32},
}  # fmt: skip
ORDERS = [
    ["ptq", "bn-fuse"],
    ["bn-fuse", "ptq", "qaft"],
    ["ptq", "qaft", "qaft", "bn-fuse"],
    ["qat", "qat", "qaft", "bn-fuse"],
    ["qat --bn-fuse", "qaft", "bn-fuse"],
]
QUICK = {  # activations before the pools; folded before training or during it: sums in both, groups in the second
    "nin": [ORDERS[0]],
    "resnet18": [ORDERS[1]],
    "torchvision:mobilenet_v2": [ORDERS[-1]],
}


def train_once(model, context):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    model.train()
    with context(model):
        model(IMAGES).square().mean().backward()
        optimizer.step()
    model.eval()


def check_order(history, stage):
    Stage.check_order(stage, [record.stage for record in history])


def apply(artifact, step):
    """Do one step as its command does."""
    model, history = artifact.model, artifact.history
    if step == "bn-fuse":
        check_order(history, BnFuse)
        folded, record = fold_model(model, history)
        return artifact.after(record, model=folded)
    quantized = any(record.stage == "quantize" for record in history)
    if step == "qaft" or quantized:
        if not any(record.stage == "bn-fuse" for record in history):
            check_order(history, Finetune)
        if step == "qaft":
            freeze(model)
        train_once(model, frozen if step == "qaft" else observing)
        return artifact.after(StageRecord("finetune"))
    check_order(history, Quantize)
    model, record = quantize_model(model, QuantConfig(bn_fuse=step.endswith("bn-fuse")))
    if step == "ptq":
        set_ranges(model, collect(model, [IMAGES]), "mse", 100.0)
    else:
        calibrate(model, [IMAGES])
        train_once(model, observing)
    return artifact.after(record, model=model)


def cases():
    """Every order on every network; lenet_bn runs all of them, the others those of QUICK, the rest is marked slow."""
    for name in NETWORKS:
        for order in ORDERS:
            quick = name == "lenet_bn" or order in QUICK.get(name, ())
            marks = () if quick else pytest.mark.slow
            yield pytest.param(name, order, marks=marks, id=f"{name}: {' > '.join(order)}")


@pytest.mark.parametrize(("name", "order"), cases())
def test_every_legal_order_saves_reloads_and_exports(tmp_path, name, order):
    spec = ModelSpec(name, NETWORKS[name])
    torch.manual_seed(1)
    model = build_model(spec).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and not module.weight.any():
            torch.nn.init.normal_(module.weight, std=0.02)  # torchvision's transformer begins with a head of zeros
    for _ in range(3):
        model(IMAGES)  # batch norms get statistics
    if "vit" in name:
        order = [step.removesuffix(" --bn-fuse") for step in order if step != "bn-fuse"]  # it has no batch norm
    artifact = Artifact(model.eval(), spec, [StageRecord("import")])
    for step in order:
        artifact = apply(artifact, step)
        path = tmp_path / "a.safetensors"
        save(artifact, path)
        again = load(path)
        artifact.model.eval()
        assert torch.equal(again.model.eval()(IMAGES), artifact.model(IMAGES)), step
        assert [record.to_json() for record in again.history] == [record.to_json() for record in artifact.history]
    assert trace(artifact.model) is not None
    onnx.save(to_onnx(artifact, IMAGES), tmp_path / "a.onnx")
    scores = OrtPredictor(tmp_path / "a.onnx", RuntimeOptions())(IMAGES.numpy())
    expected = artifact.model(IMAGES).detach().numpy()
    if "vit" in name:  # an untrained transformer's dozen blocks multiply every step that a rounding takes
        assert max(compare_layers(artifact.model, onnx.load(tmp_path / "a.onnx"), IMAGES).values(), default=0) <= 1
    else:
        assert np.linalg.norm(scores - expected) < 0.05 * np.linalg.norm(expected)


@pytest.mark.parametrize("bits", [8, 4])
def test_biases_of_a_network_fused_before_quantization_are_rounded_by_folding_again(tmp_path, bits):
    spec = ModelSpec("resnet18", {"width": 0.1})
    model, fused = fold_model(build_model(spec).eval())
    model, record = quantize_model(model, QuantConfig(w_bits=bits, a_bits=8))
    set_ranges(model, collect(model, [IMAGES]), "minmax", 100.0)
    history = [StageRecord("import"), fused, record]
    rounded, again = fold_model(model, history)
    assert again.result["pairs"] == []
    for name, source in record.result["inputs"].items():
        layer, (module, _, slot) = rounded.get_submodule(name), source.rpartition(".")
        read = getattr(rounded.get_submodule(module), slot).qparams(IMAGES)
        unit = read.scale.double() * int8_grid(layer.weight_quantizer.qparams(layer.weight)).scale.double()
        q = layer.bias.double() / unit
        assert ((q - q.round()).abs() <= q.abs() * 2**-23 + 1e-6).all(), name  # a float32 holds 24 bits
    save(Artifact(rounded, spec, [*history, again]), tmp_path / "a.safetensors")
    assert torch.equal(load(tmp_path / "a.safetensors").model.eval()(IMAGES), rounded.eval()(IMAGES))
