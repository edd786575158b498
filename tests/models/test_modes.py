"""Copies of networks that hold more than their parameters."""

import threading

import pytest
import torch
from torch import nn

from micronet.errors import MicronetError
from micronet.models.modes import copy_model


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
