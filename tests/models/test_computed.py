"""Weights that weight norm and the like compute become plain ones, and nothing else changes."""

import pytest
import torch
from torch import nn
from torch.nn import utils
from torch.nn.utils import parametrize, prune

import micronet
from micronet.core.progress import Silent

CODE = """
import torch
from torch import nn
from torch.nn import utils
from torch.nn.utils import parametrize, prune

class Symmetric(nn.Module):
    def forward(self, weight):
        return weight + weight.flip(-1)

WRAPS = {
    "weight_norm": utils.weight_norm,
    "spectral_norm": utils.spectral_norm,
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
    "new weight_norm": utils.parametrizations.weight_norm,
    "new spectral_norm": utils.parametrizations.spectral_norm,
    "orthogonal": utils.parametrizations.orthogonal,
    "own": lambda layer: parametrize.register_parametrization(layer, "weight", Symmetric()),
}

def net(name):
    wrap = WRAPS[name]
    return nn.Sequential(wrap(nn.Conv2d(2, 4, 2)), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), wrap(nn.Linear(16, 3)))
"""
SCOPE: dict = {}
exec(CODE, SCOPE)


@pytest.mark.parametrize("name", SCOPE["WRAPS"])
def test_computed_weights_become_plain_ones_of_the_same_values_and_load_again(name, tmp_path):
    torch.manual_seed(0)
    x, net = torch.rand(4, 2, 3, 3), SCOPE["net"](name)
    for _ in range(3):
        net(x)  # spectral norm iterates, batch norms average, and hooks leave tensors with gradients
    expected = net.eval()(x).detach()
    fused = micronet.fuse(net, x)
    torch.testing.assert_close(fused.model(x), expected, rtol=0, atol=2**-20)  # 16 products near 1, rounded twice
    (tmp_path / "net.py").write_text(CODE)
    int8 = micronet.quantize(net, data=[x], mode="ptq", first_last="8bit")
    assert int8.left_float == {}
    micronet.save(int8, tmp_path / "int8.safetensors", build=f"{tmp_path}/net.py:net", args={"name": name})
    again = micronet.load(tmp_path / "int8.safetensors", SCOPE["net"](name))
    assert torch.equal(again.model(x), int8.model(x))
    assert torch.equal(net(x).detach(), expected)  # the given network, and its class, stay what they were


def test_a_training_leaves_a_computed_linear_layer_float_and_says_what_to_type():
    from micronet.quantization.config import QuantConfig
    from micronet.quantization.quantize import quantize_model

    net = nn.Sequential(nn.Conv2d(2, 4, 2), nn.Flatten(), utils.parametrizations.weight_norm(nn.Linear(16, 3)))
    record = quantize_model(net, QuantConfig())[1]
    assert "--mode ptq" in record.left_float["2"]
    assert parametrize.is_parametrized(net[2])
    assert not prune.is_pruned(net)


STANDARDIZED = """
import torch
from torch import nn
from torch.nn import functional as F, utils

class StdConv(nn.Conv2d):
    def forward(self, x):
        mean, std = self.weight.mean((1, 2, 3), keepdim=True), self.weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) / std, self.bias, self.stride, self.padding)

class Masked(nn.Conv2d):
    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("mask", torch.ones_like(self.weight).tril())

    def forward(self, x):
        return self._conv_forward(x, self.mask * self.weight, self.bias)

class LowRank(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.base = nn.Linear(inputs, outputs)
        self.down, self.up = nn.Parameter(torch.randn(2, inputs)), nn.Parameter(torch.randn(outputs, 2))

    def forward(self, x):
        return F.linear(x, self.base.weight + self.up @ self.down, self.base.bias)

class Filters(nn.Module):
    def __init__(self):
        super().__init__()
        self.cutoff = nn.Parameter(torch.linspace(0.2, 1.5, 6).view(-1, 1))
        self.register_buffer("time", torch.arange(-4.0, 5.0))

    def forward(self, x):
        bands = torch.sin(self.cutoff * self.time)
        return F.conv1d(x, bands[:, None])

class Lengths(nn.Sequential):
    def forward(self, x):
        assert len(x) > 0  # torch.fx cannot trace a length
        return super().forward(x)

def standardized(kind):
    return kind(StdConv(2, 4, 3), nn.ReLU(), StdConv(4, 4, 1), nn.ReLU(), Masked(4, 4, 1), nn.Flatten(), LowRank(36, 5))

def symbolic():
    return standardized(nn.Sequential)

def recorded():
    return standardized(Lengths)

class Centred(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)

    def forward(self, x):
        return F.conv2d(x, self.conv.weight - self.conv.weight.mean(), self.conv.bias)

def centred():
    return nn.Sequential(Centred(), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3))

class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        self.flat = nn.Parameter(torch.randn(72 + 4 + 144 + 4) * 0.2)

    def forward(self, x):
        y = F.conv2d(x, self.flat[:72].view(4, 2, 3, 3), self.flat[72:76]).relu()
        return F.conv2d(y, self.flat[76:220].view(4, 4, 3, 3), self.flat[220:])

def flat():
    return nn.Sequential(Flat(), nn.Flatten(), nn.Linear(4, 3))

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, 1, 1))

    def forward(self, x):
        return F.conv2d(F.conv2d(x, self.weight / 2).relu(), self.weight.flip(0))

def tied():
    return nn.Sequential(nn.Conv2d(2, 4, 3), Tied(), nn.Flatten(), nn.Linear(36, 3))

class Cosine(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.centers = StdConv(2, 8, 3), nn.BatchNorm2d(8), nn.Parameter(torch.randn(3, 6))
        self.fc = utils.parametrizations.weight_norm(nn.Linear(8, 6))

    def forward(self, x):
        x = self.fc(self.norm(self.conv(x)).relu().mean((2, 3)))
        return F.linear(F.normalize(x), F.normalize(self.centers))

def filters():
    return nn.Sequential(Filters(), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 12, 3))
"""
"""Forwards that compute their weights from stored tensors alone."""
exec(STANDARDIZED, SCOPE)


@pytest.mark.parametrize(("name", "shape"), [
    ("symbolic", (4, 2, 5, 5)), ("recorded", (4, 2, 5, 5)), ("filters", (4, 1, 20)), ("centred", (4, 2, 5, 5)),
    ("flat", (4, 2, 5, 5)), ("tied", (4, 2, 5, 5)),
])  # fmt: skip
def test_weights_that_a_forward_computes_are_quantized_as_constants(name, shape, tmp_path):
    torch.manual_seed(0)
    net, x = SCOPE[name]().eval(), torch.randn(shape)
    expected = net(x).detach()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    int8 = micronet.quantize(net, data=[x], mode="ptq", first_last="8bit")
    assert int8.left_float == {}
    assert (int8.model(x).detach() - expected).norm() < 0.05 * expected.norm()  # 8 bits in each layer
    (tmp_path / "net.py").write_text(STANDARDIZED)
    micronet.save(int8, tmp_path / "int8.safetensors", build=f"{tmp_path}/net.py:{name}")
    again = micronet.load(tmp_path / "int8.safetensors", SCOPE[name]())
    assert torch.equal(again.model(x), int8.model(x))
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


class Lines(Silent):
    def __init__(self):
        self.lines = []

    def line(self, text):
        self.lines.append(text)


def test_a_pruned_network_stores_only_computed_weights_that_are_cut_and_says_what_training_changes(tmp_path):
    torch.manual_seed(0)
    net, x, lines = SCOPE["Cosine"]().eval(), torch.randn(4, 2, 5, 5), Lines()
    pruned = micronet.prune(net, x, percent=0.5, criterion="l2", progress=lines)
    assert sorted(dict(pruned.model.named_parameters())) == [
        "centers", "conv.bias", "conv.weight", "fc.bias", "fc.weight", "norm.bias", "norm.weight"
    ]  # fmt: skip
    text = "\n".join(lines.lines)
    assert "stored the values of 2 computed weights" in text
    assert "a later training changes these values" in text
    (tmp_path / "net.py").write_text(STANDARDIZED)
    micronet.save(pruned, tmp_path / "pruned.safetensors", build=f"{tmp_path}/net.py:Cosine")
    again = micronet.load(tmp_path / "pruned.safetensors", SCOPE["Cosine"]()).model.eval()
    expected = pruned.model.eval()(x).detach()
    assert torch.equal(again(x), expected)
    with torch.no_grad():
        again.centers *= 2  # which are still normalized
    torch.testing.assert_close(again(x), expected)
