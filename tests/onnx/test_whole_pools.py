"""Pools over all of their input keep its sizes free in an exported file; other pools stay what they are."""

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import micronet


class Pooling(nn.Module):
    """Each kind of pool behind a convolution."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.conv = kind, nn.Conv2d(2, 4, 3)

    def forward(self, x):
        x = self.conv(x)
        if self.kind == "sides":
            return F.avg_pool2d(x, (x.size(2), x.size(3))).flatten(1) + F.max_pool2d(x, x.shape[2:]).flatten(1)
        if self.kind == "rows":
            return F.avg_pool1d(x.flatten(2), kernel_size=x.shape[2] * x.shape[3], stride=1).squeeze(2)
        return F.avg_pool2d(F.avg_pool2d(x, 3, 1, 1), x.shape[2:]).flatten(1)


@pytest.mark.parametrize("kind", ["sides", "rows", "behind another"])
def test_a_pool_over_all_of_its_input_keeps_sizes_free(kind):
    torch.manual_seed(0)
    net = Pooling(kind).eval()
    proto = micronet.export_onnx(net, torch.randn(2, 2, 8, 10), dynamic="batch,height,width", skip_timing=True)
    images = torch.randn(3, 2, 13, 7)
    [found] = onnxruntime.InferenceSession(proto.SerializeToString()).run(None, {"images": images.numpy()})
    np.testing.assert_allclose(found, net(images).detach(), atol=1e-5)
