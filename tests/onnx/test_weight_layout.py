"""Stored weights in the layout in which ONNX Runtime finds their integers."""

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
