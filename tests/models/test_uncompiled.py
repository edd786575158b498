import logging

import torch
from torch import nn

from micronet.models.uncompiled import uncompiled


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
