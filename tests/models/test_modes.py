"""Copies of networks that hold more than their parameters, and networks that rewrite these in eval mode."""

import copy
import threading

import pytest
import torch
from torch import nn

import micronet
from micronet.errors import MicronetError
from micronet.models.modes import check_modes, copy_model


class Caches(nn.Linear):
    """Attention in several libraries keeps what it computed: in an attribute, a list or a dict."""

    def forward(self, x):
        y = super().forward(x)
        self.last, self.all, self.by_device = y, [y], {x.device: (y, 1)}
        return y


def test_what_a_forward_stored_is_copied_without_its_gradient():
    net = Caches(3, 2)
    expected = net(torch.ones(1, 3))
    copied = copy_model(net)
    kept = copied.by_device[torch.device("cpu")][0]
    assert copied.last is copied.all[0] is kept and torch.equal(kept, expected)
    assert not kept.requires_grad and net.last.requires_grad


def test_what_cannot_be_copied_is_said():
    net = nn.Linear(3, 2)
    net.lock = threading.Lock()
    with pytest.raises(MicronetError, match=r"cannot be copied: cannot pickle '_thread.lock' object"):
        copy_model(net)


class Collects(nn.Module):
    """Calls a layer through a function that it holds, and reads what a hook has collected."""

    def __init__(self):
        super().__init__()
        self.layer, self.seen = nn.Linear(3, 2), {}
        layer = self.layer
        self.call = lambda x: layer(x)

        def collect(module, inputs, output):
            self.seen["layer"] = output

        self.layer.register_forward_hook(collect)

    def forward(self, x):
        self.seen.clear()
        return self.call(x) + self.seen["layer"]


def test_functions_that_a_network_holds_are_copied_with_its_modules():
    net, x = Collects(), torch.ones(1, 3)
    copied = copy_model(net)
    nn.init.zeros_(copied.layer.weight)
    torch.testing.assert_close(copied(x), 2 * copied.layer.bias[None])
    assert not net.seen and torch.equal(net(x), 2 * net.layer(x))


class LoRA(nn.Linear):
    """Merges a product of two matrices into its weight in eval mode, in one of several ways."""

    def __init__(self, merge=None):
        super().__init__(6, 6)
        self.a, self.b, self.merged, self.merge = (
            nn.Parameter(torch.rand(2, 6)),
            nn.Parameter(torch.rand(6, 2)),
            0,
            merge,
        )
        self.register_buffer("base", torch.rand(6, 6))

    def train(self, mode=True):
        super().train(mode)
        if self.merge is not None and not mode and not self.merged:
            self.merge(self)
            self.merged = True
        return self


def adds(layer):
    layer.weight.data += layer.b @ layer.a


def replaces(layer):
    layer.weight = nn.Parameter(layer.weight + layer.b @ layer.a)


def adds_to_a_buffer(layer):
    layer.base += (layer.b @ layer.a).detach()


def deletes(layer):
    del layer.a


@pytest.mark.parametrize("merge", [adds, replaces, adds_to_a_buffer, deletes], ids=lambda merge: merge.__name__)
def test_a_network_that_rewrites_its_weights_in_eval_mode_is_refused_and_stays_as_it_is(merge):
    net = nn.Sequential(LoRA(merge), nn.Linear(6, 3))
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(MicronetError, match=r"rewrites 0\.\w+ when its mode changes .* merge them permanently"):
        micronet.quantize(net, data=[torch.randn(4, 6)], mode="ptq")
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    check_modes(nn.Sequential(LoRA(), nn.Linear(6, 3)))
