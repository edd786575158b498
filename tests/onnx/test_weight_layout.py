"""Stored weights in the layout in which ONNX Runtime finds their integers."""

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import micronet
from micronet.onnx.integers import count_integer_layers


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.norm(x + self.attention(x, x, x)[0]))


def test_all_linear_layers_of_attention_run_in_integers():
    x = torch.rand(4, 6, 16)
    quantized = micronet.quantize(Encoder(), data=[x], mode="ptq")
    linear = count_integer_layers(micronet.export_onnx(quantized, x))["linear"]
    assert linear == {"integer": 5, "all": 5}


def test_linear_layers_behind_whose_activations_nothing_is_quantized_run_in_integers():
    """ONNX Runtime merges such activations with the float layer unless their outputs become integers."""
    blocks = [
        (nn.ReLU(), nn.LayerNorm(16)), (nn.Sigmoid(), nn.Tanh()), (nn.LeakyReLU(), nn.BatchNorm1d(16)),
        (nn.BatchNorm1d(16), nn.ReLU(), nn.Softmax(1)), (nn.ELU(), nn.GELU()), (nn.Tanh(), nn.Dropout()),
    ]  # fmt: skip
    net = nn.Sequential(*(each for block in blocks for each in (nn.Linear(16, 16), *block)), nn.Linear(16, 3))
    x = torch.rand(8, 16)
    quantized = micronet.quantize(net.eval(), data=[x], mode="ptq")
    linear = count_integer_layers(micronet.export_onnx(quantized, x))["linear"]
    assert linear == {"integer": 7, "all": 7}


@pytest.mark.parametrize("config", [{"exclude": ["2", "6"]}, {"w_bits": 32}], ids=["excluded", "activations"])
def test_no_default_of_onnx_runtime_rounds_the_weights_of_layers_left_in_float(config):
    torch.manual_seed(0)
    x, layers = torch.randn(8, 3, 6, 6), [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.ReLU(), nn.Flatten()]
    network = nn.Sequential(*layers, nn.Linear(32, 16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    proto = micronet.export_onnx(micronet.quantize(network, data=[x], mode="ptq", **config), x)
    outputs = [
        onnxruntime.InferenceSession(proto.SerializeToString(), disabled_optimizers=disabled).run(
            None, {"images": x.numpy()}
        )
        for disabled in ([], ["WeightBiasQuantization"])
    ]
    np.testing.assert_array_equal(*[each[0] for each in outputs])
