"""Multiply-accumulates: equal to torch's own counter, to published numbers and to formulas."""

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from micronet import registry
from micronet.evaluation.cost import count_macs
from micronet.models.build import build_model, make_spec
from micronet.quantization.calibrate import calibrate
from micronet.quantization.config import QuantConfig
from micronet.quantization.quantize import quantize_model

IMAGE = torch.zeros(1, 3, 32, 32)


class Functional(nn.Module):
    """Layers whose work is in functional calls alone."""

    def __init__(self):
        super().__init__()
        self.kernel, self.weight = nn.Parameter(torch.ones(8, 3, 3, 3)), nn.Parameter(torch.ones(6, 8))

    def forward(self, x):
        x = F.conv2d(x, self.kernel, stride=2, padding=1).flatten(2).transpose(1, 2)
        x = torch.matmul(x, x.transpose(1, 2)) @ x
        return F.linear(x, self.weight)


def torchs_count(model, *inputs):
    """Count with torch's counter in train mode, which takes no fused attention."""
    with FlopCounterMode(display=False) as counter:
        model.train()(*inputs)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize(
    "model",
    [
        nn.Conv2d(3, 9, 3, groups=3),
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, stride=2, groups=8)),
        nn.ConvTranspose2d(3, 8, 4, stride=2, padding=1),
        nn.ConvTranspose2d(3, 6, 3, stride=2, groups=3, output_padding=1),
        nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 4, 5), nn.Linear(1020, 7)),
        Functional(),
    ],
    ids=["grouped", "depthwise", "transposed", "transposed-grouped", "one-dimension", "functional"],
)
def test_the_count_is_that_of_torchs_counter(model):
    assert count_macs(model, IMAGE) == torchs_count(model, IMAGE) > 0


@pytest.mark.parametrize("name", ["swin_t", "resnet18", "vit_b_32"])
def test_the_count_is_the_published_one(name):
    published = torchvision.models.get_model_weights(name).DEFAULT.meta["_ops"]  # in G
    model = torchvision.models.get_model(name).eval()
    assert round(count_macs(model, torch.zeros(1, 3, 224, 224)) / 1e9, 3) == published


def test_a_transposed_convolution_costs_a_kernel_for_each_input_position():
    assert count_macs(nn.ConvTranspose2d(3, 8, 4, stride=2), IMAGE) == 32 * 32 * 3 * 8 * 4 * 4


def test_attention_counts_its_products_on_every_path():
    length, width, hidden = 5, 16, 32
    layer = nn.TransformerEncoderLayer(width, 4, hidden, batch_first=True).eval()
    x = torch.zeros(1, length, width)
    work = length * (4 * width * width + 2 * width * hidden) + 2 * length * length * width
    assert count_macs(layer, x) == work
    assert count_macs(layer.requires_grad_(False), x) == work  # torch's fast path
    assert count_macs(nn.TransformerEncoder(layer, 3), x) == 3 * work
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_recurrent_layers_count_each_step(kind, gates):
    steps, batch, read, hidden = 5, 3, 8, 16
    per_step = gates * hidden * (read + hidden) + gates * hidden * (hidden + hidden)
    assert count_macs(kind(read, hidden, num_layers=2), torch.zeros(steps, batch, read)) == steps * batch * per_step


def test_any_inputs_are_taken_and_the_whole_batch_counts():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head, self.other = nn.Embedding(10, 4), nn.Linear(4, 3), nn.Linear(2, 3)

        def forward(self, tokens, features, scale):
            return self.head(self.table(tokens)).mean(1) * scale + self.other(features)

    model = Words().double()
    inputs = torch.zeros(2, 6, dtype=torch.int64), torch.zeros(2, 2), 0.5
    assert count_macs(model, inputs) == 2 * (6 * 4 * 3 + 2 * 3)


def test_the_mode_of_every_module_is_restored():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout()).train()
    model[1].eval()
    count_macs(model, IMAGE)
    assert [module.training for module in model] == [True, False, True]


@pytest.mark.parametrize("config", [*({"method": name} for name in registry.SCHEMES), {"bn_fuse": True}], ids=str)
def test_quantized_layers_count_like_float_ones(config):
    if config.get("method") == "wbwtab":
        config = {"w_bits": "ternary", "a_bits": "binary"}
    model = build_model(make_spec("nin", {"width": 0.1}))
    quantized = quantize_model(model, QuantConfig(**config))[0]
    calibrate(quantized, [torch.rand(2, 3, 32, 32)])
    assert count_macs(quantized, IMAGE) == count_macs(model, IMAGE)


def test_parameters_may_be_a_modules_input():
    class Tokens(nn.Module):  # torch's counter would hook the token's gradient, which a view of a parameter has not
        def __init__(self):
            super().__init__()
            self.token, self.layer = nn.Parameter(torch.zeros(1, 1, 4)), nn.Linear(4, 3)

        def forward(self, x):
            return self.layer(self.token) + self.layer(self.token.expand(len(x), -1, -1)) + self.layer(x)

    model = Tokens()
    assert count_macs(model, torch.zeros(2, 5, 4)) == (1 + 2 + 2 * 5) * 4 * 3
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_deformable_convolutions_count_like_others():
    net = torchvision.ops.DeformConv2d(4, 6, 3, padding=1)
    assert count_macs(net, (torch.zeros(1, 4, 8, 8), torch.zeros(1, 18, 8, 8))) == 64 * 6 * 4 * 9
