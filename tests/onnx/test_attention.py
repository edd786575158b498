"""Attention that torch's exporter does not write, or writes as something else."""

import numpy as np
import onnxruntime
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import micronet


class Attending(nn.Module):
    """Attention over three and five axes, causal, masked, grouped, with keys hidden from a query, and so on."""

    def __init__(self):
        super().__init__()
        self.hidden = torch.ones(4, 4, dtype=torch.bool).tril(-1)  # the first query sees nothing

    def forward(self, x):  # (batch, 24, 8)
        five, four = x.reshape(-1, 2, 3, 4, 8), x.reshape(-1, 6, 4, 8)
        added = torch.zeros(4, 4).masked_fill(~self.hidden, -torch.inf)
        found = [
            scaled_dot_product_attention(x, 0.5 * x, x + 1, is_causal=True),
            scaled_dot_product_attention(five, 0.5 * five, five + 1, self.hidden, scale=-0.3),
            scaled_dot_product_attention(five, 0.5 * five, five + 1, added),
            scaled_dot_product_attention(five, five[:, :, :1], five[:, :, :1], enable_gqa=True),
            scaled_dot_product_attention(four, four[:, :1], four[:, :1]),
        ]
        return torch.stack([each.reshape(x.shape) for each in found], 1)


def test_any_attention_is_exported():
    net, x = Attending(), torch.randn(2, 24, 8)
    proto = micronet.export_onnx(net, x, skip_timing=True, opset=23)
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    x = torch.randn(5, 24, 8)
    [have] = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(have, net(x).numpy(), atol=32 * 2**-23 * float(x.abs().max()))  # sums of 8 and 24 terms
