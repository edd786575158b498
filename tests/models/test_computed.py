"""Weights that weight norm and the like compute become plain ones, and nothing else changes."""

import pytest
import torch
from torch import nn
from torch.nn import utils
from torch.nn.utils import parametrize, prune

import micronet

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
