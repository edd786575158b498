import logging
import sys

import pytest
import torch
from torch import nn

from micronet.models.uncompiled import uncompiled
from micronet.training.config import TrainConfig
from micronet.training.step import OPTIMIZERS, make_optimizer


def module(index):
    """Return a module of a class of its own, whose method notes whether torch.compile traced it."""

    class Rounded(nn.Module):
        @uncompiled
        def forward(self, x, *, bias=0.0):
            traced.append(torch.compiler.is_compiling())
            return x.round() + index + bias

    traced = []
    return Rounded(), traced


def test_methods_run_as_python_inside_a_compiled_network_however_many_there_are(caplog):
    modules, traced = zip(*map(module, range(12)), strict=True)  # more than torch compiles one function for
    network = nn.Sequential(*modules)
    x = torch.randn(3)
    expected = network(x)
    compiled = torch.compile(network, backend="eager")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert torch.equal(compiled(x), expected)
    assert [notes for notes in traced if notes != [False] * 4] == []
    assert not caplog.records


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_optimizer_imports_the_compiler(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch._dynamo", None)  # an import raises ImportError
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    optimizer = make_optimizer(network, TrainConfig(optimizer=name))
    network(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.load_state_dict(optimizer.state_dict())
