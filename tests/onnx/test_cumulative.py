"""Operations along an axis that ONNX does not have are exported, and compute what torch computes."""

import numpy as np
import pytest
import torch
from torch import nn

import micronet
from micronet.runtimes.config import RuntimeOptions
from micronet.runtimes.onnxruntime import session_predictor


class Products(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.layer, self.dim = nn.Linear(6, 6), dim

    def forward(self, x):
        return torch.cumprod(self.layer(x), self.dim)


@pytest.mark.parametrize("dim", [-1, 1])
@pytest.mark.parametrize("opset", [18, 23])
def test_cumulative_products_are_exported(dim, opset):
    torch.manual_seed(0)
    net = Products(dim).eval()
    file = micronet.export_onnx(net, torch.randn(2, 5, 6), opset=opset).SerializeToString()
    x = torch.randn(4, 5, 6)
    np.testing.assert_allclose(session_predictor(file, RuntimeOptions())(x.numpy()), net(x).detach(), atol=1e-6)
