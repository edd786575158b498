import pytest
import torch
from torch import nn

import micronet
from micronet.pruning.config import PruneConfig
from micronet.pruning.prune import prune_model


def network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


def test_a_users_network_is_pruned_quantized_saved_and_loaded(tmp_path):
    whole = network()
    images = torch.randn(4, 3, 12, 12)
    pruned = micronet.prune(whole, images, percent=0.5)
    assert sum(p.numel() for p in pruned.model.parameters()) < sum(p.numel() for p in whole.parameters())
    assert whole[0].out_channels == 8
    pruned.model(images).sum().backward()
    quantized = micronet.quantize(pruned, w_bits=8, a_bits=8)  # no data: quantizers for a training loop of one's own
    micronet.calibrate(quantized.model, [images])
    fused = micronet.fuse(quantized)
    assert [record.stage for record in fused.history] == ["prune", "quantize", "bn-fuse"]
    with pytest.raises(micronet.MicronetError, match="cannot be rebuilt"):
        micronet.save(fused, tmp_path / "a.safetensors")
    micronet.save(fused, tmp_path / "a.safetensors", build="tests.pruning.test_api:network")
    again = micronet.load(tmp_path / "a.safetensors", network()).model
    assert torch.equal(again(images), fused.model.eval()(images))
    with pytest.raises(micronet.MicronetError, match="prune first, then quantize"):
        micronet.prune(quantized, images)


def test_ptq_calibrates_on_batches_in_memory_and_returns_what_stays_float(tmp_path):
    images = torch.randn(8, 3, 12, 12)
    int8 = micronet.quantize(network(), data=[images], mode="ptq", exclude="0")
    assert int8.left_float == {"0": "excluded"}
    assert torch.isfinite(int8.model.eval()(images)).all()
    micronet.export_onnx(int8, images, output=tmp_path / "int8.onnx")
    with pytest.raises(micronet.MicronetError, match='mode="ptq" needs calibration data; pass it with data'):
        micronet.quantize(network(), mode="ptq")


def test_a_call_leaves_its_network_as_it_was(tmp_path):
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    micronet.quantize(model, data=[torch.randn(8, 3, 12, 12)], mode="ptq", equalize=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"percent": 1}, "percent"),
        ({"regular": 0}, "regular is 0; allowed: 1 or more"),
        ({"regular": 2.5}, "an integer"),
        ({"percent": "0.5"}, "a number"),
        ({"exclude": 5}, "exclude is .*; expected text"),
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

    with pytest.raises(micronet.MicronetError, match=r"depends on .* values .*test_api\.py:\d+ \(return self\.conv"):
        micronet.prune(Untraceable(), torch.randn(2, 3, 4, 4))


def test_a_network_is_pruned_in_place():
    model, images = network().eval(), torch.randn(2, 3, 12, 12)
    copy = prune_model(model, PruneConfig(), images)[0]
    assert prune_model(model, PruneConfig(), images, in_place=True)[0] is model
    assert model[0].out_channels == copy[0].out_channels < 8
    assert torch.equal(model(images), copy(images))


def test_an_attention_loses_heads_in_place():
    model, images = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval(), torch.randn(2, 5, 16)
    copy = prune_model(model, PruneConfig(criterion="l2"), images)[0]
    cut = prune_model(model, PruneConfig(criterion="l2"), images, in_place=True)[0]
    assert cut.self_attn.num_heads < 4
    assert torch.equal(cut(images), copy(images))


def test_a_users_cost_is_a_target():
    def cost(model):
        return model[0].out_channels

    config = PruneConfig(criterion="l2", target_latency=0.5)
    assert prune_model(network(), config, torch.randn(2, 3, 12, 12), cost)[0][0].out_channels <= 4


class Noisy(nn.Module):
    """A variational autoencoder's noise, in eval mode too."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8), nn.Conv2d(8, 4, 3)

    def forward(self, x):
        x = self.last(self.norm(self.first(x)).relu())
        return x + torch.randn_like(x)


def test_noise_in_eval_mode_hinders_nothing_and_norms_without_values_know_their_width(recwarn):
    images = torch.randn(2, 3, 8, 8)
    pruned = micronet.prune(Noisy(), images, percent=0.5, criterion="l2").model
    assert (pruned.first.out_channels, pruned.norm.num_features) == (4, 4)
    pruned(images)
    assert not [each for each in recwarn if "num_features" in str(each.message)]


def test_numbers_computed_from_channels_may_be_added():
    class Sums(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

        def forward(self, x):
            x = self.last(self.first(x).relu())
            return x * (x.mean() + x.amax())

    assert micronet.prune(Sums(), torch.randn(2, 3, 8, 8), percent=0.5, criterion="l2").model.first.out_channels == 4


def test_own_numbers_without_axes_may_be_multiplied():
    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)
            self.size = nn.Parameter(torch.tensor(0.5))
            self.register_buffer("times", torch.rand(2))

        def forward(self, x):
            return self.last(self.first(x).relu() * (self.size * self.times[0]))

    assert micronet.prune(Steps(), torch.randn(2, 3, 8, 8), percent=0.5, criterion="l2").model.first.out_channels == 4
