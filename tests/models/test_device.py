import pytest
import torch
from torch import nn

from micronet.models.device import inference_format, memory_format, place_input
from micronet.models.resnet import resnet18


def test_maps_lie_so_that_strided_pointwise_convolutions_get_their_gradient():
    """oneDNN gives a wrong one or dies where few channels lie last (its issue 6035)."""
    layer = nn.Conv2d(6, 13, 1, stride=2, bias=False)
    layout = memory_format(layer)
    images = torch.randn(4, 6, 64, 64).to(memory_format=layout)
    layer.to(memory_format=layout)(images).square().sum().backward()
    dense = nn.Linear(6, 13, bias=False).double()
    dense.weight.data.copy_(layer.weight.detach()[:, :, 0, 0])
    dense(images[:, :, ::2, ::2].permute(0, 2, 3, 1).double()).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad[:, :, 0, 0].double(), dense.weight.grad, rtol=1e-4, atol=1e-2)
    assert memory_format(resnet18(width=0.1)) is torch.contiguous_format
    assert memory_format(resnet18(width=0.25)) is torch.channels_last


@pytest.mark.parametrize("layer", [nn.Conv1d(2, 3, 1), nn.Conv2d(2, 3, 1), nn.Conv3d(2, 3, 1), nn.Linear(2, 3)])
@pytest.mark.parametrize("layout", [memory_format, inference_format])
def test_networks_and_inputs_of_every_rank_have_a_memory_format(layer, layout):
    chosen = layout(layer)
    layer.to(memory_format=chosen)
    x = torch.randn(4, 2, *[5] * (layer.weight.dim() - 2))
    assert layer(place_input(x, torch.device("cpu"), chosen)).shape == (4, 3, *x.shape[2:])
