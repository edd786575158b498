import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import micronet
from micronet.evaluation.accuracy import predictor
from micronet.models.device import inference_format, memory_format, place_input
from micronet.models.modes import copy_model
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


class Views(nn.Module):
    """A network as in torch's tutorials, which flattens with ``view``, and a table of complex numbers."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(3, 2, 5, 2))
        self.conv, self.norm, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8 * 6 * 6, 10)

    def forward(self, x):
        angle = torch.view_as_complex(self.table).real.mean()
        x = F.relu(self.norm(self.conv(x)))
        return self.fc(x.view(-1, 8 * 6 * 6)) + angle


def test_a_forward_that_views_its_features_is_run_and_trained_with_contiguous_tensors():
    model, images = Views().eval(), torch.randn(4, 3, 8, 8)
    expected = model(images).detach().numpy()
    model.to(memory_format=memory_format(model))
    with pytest.raises(RuntimeError, match=r"view|stride"):
        model(images)
    np.testing.assert_allclose(predictor(model)(images.numpy()), expected, rtol=1e-5, atol=1e-6)
    for part in (model, copy_model(model), nn.Sequential(model.conv)):
        assert memory_format(part) is inference_format(part) is torch.contiguous_format
    model.train()(images).sum().backward()
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        predictor(nn.Linear(3, 2))(images.numpy()[..., :2])


@pytest.mark.parametrize("mode", [{"mode": "qat", "epochs": 1}, {"mode": "ptq"}], ids=["qat", "ptq"])
def test_such_a_network_is_trained_and_quantized_in_memory(mode):
    batches = [(torch.randn(8, 3, 8, 8), torch.arange(8)) for _ in range(3)]
    trained = micronet.train(model=Views(), data=batches, epochs=1)
    assert not micronet.quantize(trained.model, data=batches, **mode).left_float


def test_what_only_training_views_is_found_out_before_the_first_step(monkeypatch):
    class Auxiliary(Views):
        def forward(self, x):
            features = F.relu(self.norm(self.conv(x)))
            scores = self.fc(features.reshape(len(x), -1))
            return scores + features.view(len(x), -1)[:, :10] if self.training else scores

    net = Auxiliary()
    trained = micronet.train(model=net, data=[(torch.randn(8, 3, 8, 8), torch.arange(8))] * 3, epochs=1)
    assert memory_format(trained.model) is torch.contiguous_format
