"""Plain layers: however an author wrote a layer, the graph calls a module of torch with the same tensors."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from micronet.graph import ops
from micronet.graph.rewrite import Outline, rewrite
from micronet.graph.trace import trace
from micronet.models.layers import FrozenBatchNorm, Noise

IMAGES, OTHERS = torch.randn(2, 4, 6, 6), torch.randn(3, 4, 8, 8)


class NormAct(nn.BatchNorm2d):
    """A batch norm with an activation and a counter, as timm writes them."""

    def __init__(self, channels):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU()

    def forward(self, x):
        if self.training and self.track_running_stats:
            self.num_batches_tracked.add_(1)
        training = self.training or (self.running_mean is None and self.running_var is None)
        x = F.batch_norm(
            x, self.running_mean if not self.training or self.track_running_stats else None,
            self.running_var if not self.training or self.track_running_stats else None,
            self.weight, self.bias, training, 0.1, self.eps,
        )  # fmt: skip
        return self.act(self.drop(x))


class SamePadded(nn.Conv2d):
    """A convolution that pads as TensorFlow does."""

    def forward(self, x):
        x = F.pad(x, [1, 1, 1, 1])
        return F.conv2d(x, self.weight, self.bias, self.stride, (0, 0), self.dilation, self.groups)


class CastingLinear(nn.Linear):
    """A linear layer over channels that is written as a function."""

    def forward(self, x):
        return F.linear(x.permute(0, 2, 3, 1), weight=self.weight, bias=self.bias).permute(0, 3, 1, 2)


class ByHand(nn.Module):
    """A convolution written by hand."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 2, 3, 3)), nn.Parameter(torch.randn(6))

    def forward(self, x):
        return F.conv2d(x, self.weight, self.bias, padding=1, groups=2)


class OtherNames(nn.Module):
    """A convolution whose tensors have other names; the bias is a buffer."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(6, 4, 1, 1))
        self.register_buffer("offset", torch.randn(6))

    def forward(self, x):
        return torch.relu(F.conv2d(input=x, weight=self.kernel, bias=self.offset, stride=2))


class Upward(nn.Module):
    """A transposed convolution without a bias."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 2, 2))

    def forward(self, x):
        return F.conv_transpose2d(x, self.weight, stride=2)


class FixedStatistics(nn.BatchNorm2d):
    """A batch norm that never updates its statistics, though its scale is trained."""

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, training=False)


class Twice(ByHand):
    """The same function on two inputs."""

    def forward(self, x):
        return super().forward(x) + super().forward(-x)


class TwoWays(nn.Module):
    """The same weight with two strides: two layers."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, 1, 1))

    def forward(self, x):
        return F.conv2d(x, self.weight).mean() + F.conv2d(x, self.weight, stride=2)


class Frozen(nn.Module):
    """A batch norm of fixed statistics, as detectors write them."""

    def __init__(self):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(4) + 0.5)

    def forward(self, x):
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale.view(1, -1, 1, 1) + (self.bias - self.running_mean * scale).view(1, -1, 1, 1)

    eps = 1e-5


class Path(nn.Module):
    """Stochastic depth."""

    def forward(self, x):
        if not self.training:
            return x
        return x * x.new_empty(len(x), 1, 1, 1).bernoulli_(0.9)


class Dropping(SamePadded):
    """A convolution of the user's before a dropout that is a function."""

    def forward(self, x):
        return F.dropout(super().forward(x), 0.5, self.training)


def test_a_dropout_by_hand_follows_the_mode_beside_plain_layers():
    model = network(lambda: Dropping(4, 4, 3))
    graph = trace(model)
    assert graph.plain
    plain = rewrite(copy.deepcopy(graph.model), Outline())
    for training in (True, False):
        out = []
        for each in (model, graph.model, plain):
            torch.manual_seed(0)
            out.append(each.train(training)(IMAGES))
        assert torch.equal(out[1], out[0]) and torch.equal(out[2], out[0])


class Layers(nn.Module):
    """Layer and group norms by hand, with a group's count as an argument."""

    def __init__(self):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.rand(4)), nn.Parameter(torch.rand(4))

    def forward(self, x):
        x = F.group_norm(x, 2, self.scale, self.shift)
        return F.layer_norm(x.permute(0, 2, 3, 1), (4,), self.scale, self.shift, 1e-6)


class JoinedBias(nn.Module):
    """A projection to queries, keys and values, of which the keys have no bias (BEiT, EVA, Swin v2)."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(4, 12, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.rand(4)), nn.Parameter(torch.rand(4))
        self.table = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 4, bias=False))
        self.register_buffer("places", torch.rand(9, 2), persistent=False)

    def forward(self, x):
        x = x.flatten(2).transpose(1, 2)
        bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias, requires_grad=False), self.v_bias))
        q, k, v = F.linear(input=x, weight=self.qkv.weight, bias=bias).chunk(3, -1)
        return (q @ k.transpose(1, 2)).softmax(-1) @ v + self.table(self.places).mean()


WRITTEN = {
    "norm": (lambda: NormAct(4), nn.BatchNorm2d),
    "convolution": (lambda: SamePadded(4, 6, 3, stride=2, bias=False), nn.Conv2d),
    "linear": (lambda: CastingLinear(4, 6), nn.Linear),
    "by hand": (ByHand, nn.Conv2d),
    "other names": (OtherNames, nn.Conv2d),
    "transposed": (Upward, nn.ConvTranspose2d),
    "twice": (Twice, nn.Conv2d),
    "frozen": (Frozen, FrozenBatchNorm),
    "fixed": (lambda: FixedStatistics(4), FrozenBatchNorm),
    "path": (Path, Noise),
    "norms": (Layers, (nn.GroupNorm, nn.LayerNorm)),
    "joined bias": (JoinedBias, nn.Linear),
}


def network(written):
    """The module between two plain convolutions."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 1), written()).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(), module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight), nn.init.normal_(module.bias)
    return model


@pytest.mark.parametrize("name", WRITTEN)
def test_every_spelling_is_the_layer_that_it_computes(name):
    written, kind = WRITTEN[name]
    model = network(written)
    keys = list(model.state_dict())
    graph = trace(model)
    assert any(isinstance(module, kind) for _, module in graph.calls())
    assert not any(ops.WEIGHTED_FUNCTIONS.matches(node) for node in graph.fx.nodes)
    for images in (IMAGES, OTHERS):
        if name in ("frozen", "joined bias"):  # the same few operations in another order, each rounded once
            torch.testing.assert_close(graph.model(images), model(images), rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(graph.model(images), model(images))
    assert list(model.state_dict()) == keys
    for plain in graph.plain.values():  # the same tensors, not copies of them
        for own, place in plain.tensors.items():
            owner, _, attribute = place.rpartition(".")
            assert getattr(plain.module, own) is getattr(model.get_submodule(owner), attribute)


@pytest.mark.parametrize("name", ["norm", "convolution", "linear", "by hand", "transposed", "twice"])
def test_usual_names_stay_in_the_state_dict(name):
    model = network(WRITTEN[name][0])
    assert trace(model).model.state_dict().keys() == model.state_dict().keys()


def test_a_norm_in_training_mode_uses_and_updates_its_own_statistics():
    model = network(lambda: NormAct(4))
    plain = trace(model).model
    expected = copy.deepcopy(model).train()
    out = expected(IMAGES)
    assert torch.equal(plain.train()(IMAGES), out)
    for key, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor)  # the plain norm wrote into the network's own buffers


def test_a_norm_of_fixed_statistics_trains_its_scale_only():
    model = network(lambda: FixedStatistics(4))
    plain = trace(model).model.train()
    assert torch.equal(plain(IMAGES), model.train()(IMAGES))
    plain(IMAGES).sum().backward()
    assert model[1].weight.grad is not None
    assert int(model[1].num_batches_tracked) == 0


def test_one_weight_in_two_ways_stays_a_call_of_the_function_once():
    model = network(TwoWays)
    graph = trace(model)
    assert sum(isinstance(module, nn.Conv2d) for _, module in graph.calls()) == 2  # the plain first layer, and one way
    assert sum(node.target is F.conv2d for node in graph.fx.nodes) == 1
    assert torch.equal(graph.model(IMAGES), model(IMAGES))


class CalledToo(nn.Module):
    """A layer that is called as a module, and whose weight a function uses in another way."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return self.layer(x) + F.conv2d(x, self.layer.weight, padding=2, dilation=2)


def test_a_module_that_is_also_called_as_it_is_keeps_its_own_computation():
    model = network(CalledToo)
    graph = trace(model)
    assert not graph.plain
    assert torch.equal(graph.model(IMAGES), model(IMAGES))


class OwnEpsilon(Frozen):
    """A frozen norm whose epsilon is a constant in its forward, as DETR writes it."""

    eps = None


class NotANorm(Frozen):
    """A module with the tensors of a frozen norm that computes something else."""

    def forward(self, x):
        return super().forward(x) * self.weight.view(1, -1, 1, 1)


@pytest.mark.parametrize(("written", "kind"), [(OwnEpsilon, FrozenBatchNorm), (NotANorm, NotANorm)])
def test_a_frozen_norm_is_known_by_what_it_computes(written, kind):
    model = network(written)
    model[1].running_var.fill_(1e-6)  # far below epsilon
    plain = trace(model).model
    assert type(plain.get_submodule("1")) is kind
    torch.testing.assert_close(plain(IMAGES), model(IMAGES), rtol=1e-5, atol=1e-3)


class Remaining(nn.Module):
    """A norm of the user's whose momentum is the share that remains, as in TensorFlow."""

    def __init__(self):
        super().__init__()
        self.momentum = 0.99
        self.weight, self.bias = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))
        self.register_buffer("running_mean", torch.zeros(4)), self.register_buffer("running_var", torch.ones(4))

    def forward(self, x):
        statistics = self.running_mean, self.running_var
        return F.batch_norm(x, *statistics, self.weight, self.bias, self.training, 1 - self.momentum)


def test_a_norm_updates_its_statistics_by_the_momentum_that_its_forward_passes():
    model = network(Remaining)
    expected = copy.deepcopy(model).train()
    expected(IMAGES)
    trace(model).model.train()(IMAGES)
    assert torch.equal(model[1].running_mean, expected[1].running_mean)


class Standardized(nn.Conv2d):
    """A convolution that computes its weight."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias)


class BatchStatistics(nn.BatchNorm2d):
    """A norm that never uses its running statistics."""

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, True, 0.0, self.eps)


class Doubled(SamePadded):
    """A function that is called in a loop: one layer, called twice."""

    def forward(self, x):
        for _ in range(2):
            x = super().forward(x)
        return x


@pytest.mark.parametrize("written", [lambda: Standardized(4, 4, 3), lambda: BatchStatistics(4)])
def test_a_layer_that_computes_its_own_tensors_or_uses_the_batch_stays_a_function(written):
    model = network(written)
    graph = trace(model)
    assert not graph.plain
    assert torch.equal(graph.model(IMAGES), model(IMAGES))


def test_a_loop_calls_one_layer_again():
    model = network(lambda: Doubled(4, 4, 3))
    graph = trace(model)
    assert [str(node.target) for node, module in graph.calls() if isinstance(module, SamePadded | nn.Conv2d)] == [
        "0", "1", "1",
    ]  # fmt: skip
    assert torch.equal(graph.model(IMAGES), model(IMAGES))
