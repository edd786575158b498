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
