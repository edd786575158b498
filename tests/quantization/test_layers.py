"""A quantized layer is a new module with the float layer's state, in every place where the float layer was."""

import sys

import pytest
import torch
from torch import nn

from micronet.models import uncompiled as decorator
from micronet.models.uncompiled import uncompiled
from micronet.quantization.calibrate import calibrate, each_quantizer
from micronet.quantization.config import QuantConfig
from micronet.quantization.layers import Quantized, quantized, replace_modules
from micronet.quantization.quantize import quantize_model


class Listed(nn.Module):
    """A network that calls its layers through a plain list."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.norm = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3), nn.BatchNorm2d(4)
        self.relu = nn.ReLU()
        self.layers = [(self.first, self.norm), (self.second, self.relu)]

    def forward(self, x):
        for layer, after in self.layers:
            x = after(layer(x))
        return x


@pytest.mark.parametrize("kind", [nn.Conv2d(3, 4, 3), nn.Linear(3, 4), nn.ConvTranspose1d(3, 4, 3), nn.ReLU()])
def test_a_quantized_module_shares_the_float_modules_state(kind):
    calls = []
    handle = kind.register_forward_hook(lambda *_: calls.append(1))
    kind.note = object()
    layer = quantized(kind)
    assert layer is not kind
    assert type(kind).__module__.startswith("torch")
    assert "weight_quantizer" not in kind._modules
    assert isinstance(layer, (Quantized, type(kind)))
    assert quantized(layer) is layer
    assert layer.note is kind.note
    assert list(layer.state_dict()) == list(kind.state_dict())
    assert all(left is right for left, right in zip(layer.parameters(), kind.parameters(), strict=True))
    x = torch.randn(2, 3) if isinstance(kind, (nn.Linear, nn.ReLU)) else torch.randn(2, 3, 8, 8)
    x = x[..., 0] if isinstance(kind, nn.ConvTranspose1d) else x
    assert torch.equal(layer(x), kind(x))
    assert len(calls) == 2
    handle.remove()


def test_a_shared_module_is_replaced_everywhere():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Sequential(nn.Linear(3, 3))})
    model["c"] = model["a"]
    model.plain = {"key": [model["a"]]}
    other = replace_modules(model, {model["a"]: quantized(model["a"])})
    assert other["a"] is other["c"] is other.plain["key"][0]
    assert isinstance(other["a"], Quantized)
    assert list(other.state_dict()) == list(model.state_dict())
    assert all(left is right for left, right in zip(other.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("bn_fuse", [False, True])
def test_layers_in_a_plain_list_are_quantized(bn_fuse):
    model, _ = quantize_model(Listed(), QuantConfig(bn_fuse=bn_fuse))
    images = torch.randn(2, 3, 8, 8)
    calibrate(model, [images])
    seen = []
    for _, _, quantizer in each_quantizer(model):
        quantizer.register_forward_hook(lambda module, *_: seen.append(module))
    model(images)
    assert set(seen) == {quantizer for _, _, quantizer in each_quantizer(model)}


def test_an_uncompiled_method_breaks_the_graph_and_imports_no_compiler(monkeypatch):
    """It names torch's compiler by a private module, so this notices if that moves."""
    calls, graphs = [], []

    class Rounding(nn.Module):
        @uncompiled
        def forward(self, x):
            calls.append(torch.compiler.is_compiling())
            return x.round() if bool(x.sum() > 0) else x

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.rounding, self.last = nn.Linear(3, 3), Rounding(), nn.Linear(3, 3)

        def forward(self, x):
            return self.last(self.rounding(self.first(x)))

    model, x = Network(), torch.randn(2, 3)
    with monkeypatch.context() as patched:
        patched.setattr(decorator.sys, "modules", {k: v for k, v in sys.modules.items() if k != "torch._dynamo"})
        patched.setattr(torch.compiler, "disable", None)
        expected = model(x)
    compiled = torch.compile(model, backend=lambda graph, _: graphs.append(graph) or graph)
    assert "torch._dynamo" in sys.modules
    assert torch.equal(compiled(x), expected)
    assert calls == [False, False]
    assert len(graphs) == 2
