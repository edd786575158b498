import pytest
import torch
from torch import nn

import micronet


def network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


def test_a_users_network_is_pruned_quantized_saved_and_loaded(tmp_path):
    whole = network()
    pruned = micronet.prune(whole, torch.randn(2, 3, 12, 12), percent=0.5)
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in whole.parameters())
    assert whole[0].out_channels == 8
    images = torch.randn(4, 3, 12, 12)
    pruned(images).sum().backward()
    quantized = micronet.quantize(pruned, w_bits=8, a_bits=8)
    micronet.calibrate(quantized, [images])
    fused = micronet.fuse(quantized.eval())
    micronet.save(fused, tmp_path / "a.safetensors", build="tests.pruning.test_api:network")
    assert torch.equal(micronet.load(tmp_path / "a.safetensors", network())(images), fused(images))
    with pytest.raises(micronet.MicronetError, match="prune first, then quantize"):
        micronet.prune(quantized, images)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"percent": 1}, "percent"),
        ({"share": 0.5}, "unknown setting 'share'"),
        ({"regular": 2.5}, "whole number"),
        ({"percent": "0.5"}, "a number"),
        ({"exclude": ["0"]}, "--exclude is .*; expected text"),
    ],
)
def test_impossible_configs_are_refused(config, message):
    with pytest.raises(micronet.MicronetError, match=message):
        micronet.prune(network(), torch.randn(2, 3, 12, 12), **config)


def test_a_network_that_cannot_be_traced_is_refused():
    class Untraceable(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 1)

        def forward(self, x):
            return self.conv(x) if x.sum() > 0 else x

    with pytest.raises(micronet.MicronetError, match="cannot trace"):
        micronet.prune(Untraceable(), torch.randn(2, 3, 4, 4))


def test_a_network_is_pruned_in_place():
    model, images = network().eval(), torch.randn(2, 3, 12, 12)
    copy = micronet.prune(model, images)
    assert micronet.prune(model, images, in_place=True) is model
    assert model[0].out_channels == copy[0].out_channels < 8
    assert torch.equal(model(images), copy(images))


def test_an_attention_loses_heads_in_place():
    model, images = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval(), torch.randn(2, 5, 16)
    copy = micronet.prune(model, images, criterion="l2")
    assert micronet.prune(model, images, criterion="l2", in_place=True) is model
    assert model.self_attn.num_heads < 4
    assert torch.equal(model(images), copy(images))


def test_a_users_cost_is_a_target():
    def cost(model):
        return model[0].out_channels

    pruned = micronet.prune(network(), torch.randn(2, 3, 12, 12), criterion="l2", target_latency=0.5, cost=cost)
    assert pruned[0].out_channels <= 4
