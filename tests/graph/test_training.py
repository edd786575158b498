"""Recorded networks while training: what training mode alone does is kept, draw for draw, or training is refused."""

import copy
import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import micronet
from micronet.errors import MicronetError
from micronet.graph.record import UnbuiltError, record_network
from micronet.graph.trace import trace

IMAGES, MORE = torch.randn(2, 3, 8, 8), torch.randn(5, 3, 8, 8)


class Network(nn.Module):
    """Layers for the forwards below, which torch.fx cannot trace in both modes."""

    def __init__(self, forward):
        super().__init__()
        self.stem, self.norm, self.body = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)
        self.drop, self.scale = nn.Dropout(0.5), nn.Parameter(torch.rand(8, 1, 1))
        self.register_buffer("mean", torch.zeros(8)), self.register_buffer("calls", torch.zeros(()))
        self.seen, self.written = [], [forward]

    def forward(self, x):
        return self.written[0](self, self.norm(self.stem(x)) if x.shape[-1] > 4 else x)


def additive(m, x):
    if m.training:
        x = x + 0.1 * torch.randn_like(x) * m.scale
    return m.body(x)


def drop_path(m, x):
    def drop(x, p=0.5):
        return x / p * x.new_empty(x.shape[:1] + (1,) * (x.ndim - 1)).bernoulli_(p) if m.training else x

    x = x + drop(m.body(x))
    return x + drop(m.body(x))


def mask_of_another_tensor(m, x):
    y = m.body(x)
    if m.training:
        y = y * (torch.rand(x.shape[0], 1, 1, 1) > 0.25) / 0.75
    return x + y


def mask_of_constant_size(m, x):
    return m.body(x * torch.rand(8, 1, 1).round() if m.training else x)


def dropout_in_one_mode(m, x):
    x = m.body(m.drop(F.dropout(x, 0.25)) if m.training else x)
    return F.dropout2d(x, 0.5, m.training)


def numbers(m, x):
    x = x.flatten(2)
    x = F.scaled_dot_product_attention(x, x, x, dropout_p=0.5 if m.training else 0.0)
    return F.rrelu(x, training=m.training)


def softmax_in_eval(m, x):
    x = m.body(x)
    return x if m.training else x.softmax(1)


def norm_by_hand(m, x):
    return F.batch_norm(x, m.norm.running_mean, m.norm.running_var, training=m.training)


def counters(m, x):
    m.calls += 1
    if x.shape[-1] > 4:
        m.mean.mul_(0.9).add_(x.detach().mean((0, 2, 3)), alpha=0.1)
    return m.body(x)


KEPT = [
    additive, drop_path, mask_of_another_tensor, mask_of_constant_size, dropout_in_one_mode, numbers, softmax_in_eval,
    norm_by_hand, counters,
]  # fmt: skip


@pytest.mark.parametrize("forward", KEPT, ids=lambda forward: forward.__name__)
def test_a_record_trains_as_its_network_does(forward):
    torch.manual_seed(0)
    model = Network(forward)
    before = copy.deepcopy(model.state_dict())
    recorded, _ = record_network(model, IMAGES)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    networks = [copy.deepcopy(each) for each in (model, recorded, trace(recorded).model)]
    for training in (True, False):
        for images in (IMAGES, MORE):
            out = []
            for network in networks:
                torch.manual_seed(1)
                out.append(network.train(training)(images))
            assert torch.equal(out[1], out[0]) and torch.equal(out[2], out[0])
    own = networks[0].state_dict()
    for network in networks[1:]:
        assert all(torch.equal(tensor, own[key]) for key, tensor in network.state_dict().items())


def python_draws(m, x):
    return m.body(x) if not m.training or random.random() < 2 else x


def torch_draws(m, x):
    return m.body(x) if not m.training or torch.rand(1) < 2 else x


def values(m, x):
    return m.body(x) if not m.training or x.mean() < 1e9 else x


def running_value(m, x):
    if m.training:
        m.mean = 0.9 * m.mean + 0.1 * x.detach().mean((0, 2, 3))
    return m.body(x)


def written_statistics(m, x):
    if m.training:
        m.mean.copy_(x.detach().mean((0, 2, 3)))
    return m.body(x)


def more_outputs(m, x):
    return (m.body(x), x.mean()) if m.training else m.body(x)


def noisy_weight(m, x):
    return F.conv2d(x, m.body.weight + 0.1 * m.scale.mean() if m.training else m.body.weight)


def fails(m, x):
    assert not m.training
    return m.body(x)


@pytest.mark.parametrize(
    "forward",
    [python_draws, torch_draws, values, running_value, written_statistics, more_outputs, noisy_weight, fails],
    ids=lambda forward: forward.__name__,
)
def test_a_record_that_cannot_follow_training_mode_refuses_to_train(forward):
    model = Network(forward)
    state = random.getstate(), torch.get_rng_state()
    recorded, _ = record_network(model, IMAGES)
    assert random.getstate() == state[0] and torch.equal(torch.get_rng_state(), state[1])
    assert torch.equal(recorded.eval()(IMAGES), model.eval()(IMAGES))
    with pytest.raises(MicronetError, match=r"--mode ptq"):
        recorded.train()(IMAGES)


def keeps_features(m, x):
    m.seen.append(x)
    m.calls.add_(1)
    m.last = x
    return m.body(x)


def keeps_features_and_fails(m, x):
    keeps_features(m, x)
    raise ValueError


@pytest.mark.parametrize("forward", [keeps_features, keeps_features_and_fails])
def test_tracing_and_recording_leave_a_network_as_it_was(forward):
    model = Network(forward)
    model.norm.eval()
    before = copy.deepcopy(model.state_dict())
    trace(model, IMAGES)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert model.seen == [] and not hasattr(model, "last")
    assert model.training and not model.norm.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Optional(nn.Module):
    """An argument with a default of None."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 1)

    def forward(self, x, mask=None):
        x = self.layer(x)
        return x if mask is None else x * mask


class Tried(Optional):
    """An operation that fails for some inputs, and another in its place."""

    def forward(self, x):
        try:
            return self.layer(x).view(len(self.layer.weight), 7, -1)
        except RuntimeError:
            return self.layer(x)


class Called(Optional):
    """More than its forward."""

    def __call__(self, x):
        return super().__call__(x) * 2


def hooked():
    model = Optional()
    model.register_forward_hook(lambda module, args, out: out + 1)
    return model


def compiled():
    return torch.compile(Optional(), backend="eager")


@pytest.mark.parametrize("build", [Optional, Tried, Called, hooked, compiled, lambda: nn.DataParallel(Optional())])
def test_a_trace_computes_what_the_network_computes(build):
    model = build().eval()
    graph = trace(model, IMAGES)
    for images in (IMAGES, MORE):
        assert all(
            torch.equal(x, y) for x, y in zip(tree_leaves(graph.model(images)), tree_leaves(model(images)), strict=True)
        )
    assert any(isinstance(module, nn.Conv2d) for _, module in graph.calls())


class Unbuilt(nn.Module):
    """A layer that is built when it is first called."""

    def __init__(self):
        super().__init__()
        self.layer = None

    def forward(self, x):
        if self.layer is None:
            self.layer = nn.Conv2d(x.shape[1], 4, 1)
        return self.layer(x)


def test_layers_that_do_not_exist_yet_are_named():
    with pytest.raises(UnbuiltError, match=r"builds layers when it first runs \(layer\)"):
        trace(Unbuilt(), IMAGES)
    model = Unbuilt()
    model(IMAGES)
    assert trace(model, IMAGES) is not None
    assert isinstance(micronet.quantize(Unbuilt(), data=[IMAGES], mode="ptq").model.layer, nn.Module)  # it ran first
