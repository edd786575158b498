"""Pruning a large network takes minutes: it says what it does, and runs the network no more often than it must."""

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from micronet.models import device
from micronet.pruning.check import check_cut
from micronet.pruning.config import PruneConfig
from micronet.pruning.groups import find_groups
from micronet.pruning.prune import Pruner, prune_model

CONFIG = PruneConfig(0.5, criterion="l2")
IMAGES = torch.randn(2, 1, 4, 4)


class Heard:
    """Progress that keeps the labels."""

    def __init__(self):
        self.labels = []

    def step(self, label, done, total, **numbers):
        self.labels.append(label)


@pytest.fixture
def seen():
    """The number of samples in each run of a network's first layer, on values."""
    batches = []

    def look(module, inputs, output):
        if isinstance(module, nn.Conv2d) and module.in_channels == 1 and inputs[0].is_floating_point():
            batches.append(len(inputs[0]))

    handle = register_module_forward_hook(look)
    yield batches
    handle.remove()


def network():
    return nn.Sequential(nn.Conv2d(1, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1)).eval()


def test_a_network_runs_twice_to_be_traced_and_not_again(seen):
    traced = find_groups(network(), IMAGES).network
    assert seen == [2, 2]  # the network and its graph, to compare them
    pruner = Pruner(network(), PruneConfig(0.5, regular=8, criterion="l2"), IMAGES, traced=traced)
    assert seen == [2, 2]
    assert [group.multiple for group in pruner.channels.groups.values()] == [1, 1]


@pytest.mark.parametrize(("large", "samples"), [(16, 1), (17, 2)])
def test_large_inputs_are_compared_by_one_sample(monkeypatch, seen, large, samples):
    monkeypatch.setattr(device, "_LARGE", large)
    prune_model(network(), CONFIG, IMAGES)
    assert seen == [2, 2, samples, samples]


def test_a_network_that_needs_all_samples_is_compared_by_all(monkeypatch):
    class Pairs(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = network()

        def forward(self, x):
            first, second = self.layers(x)
            return first + second

    monkeypatch.setattr(device, "_LARGE", 1)
    assert prune_model(Pairs(), CONFIG, IMAGES)[0].layers[0].out_channels == 4


def test_a_wrong_cut_is_found_by_one_sample(monkeypatch):
    monkeypatch.setattr(device, "_LARGE", 1)
    pruner = Pruner(network(), CONFIG, IMAGES)
    plan = pruner.planner.plan(0.5)
    pruned, _ = pruner.cut(plan)
    pruned[0].weight.data.mul_(2)
    assert "wrong values" in check_cut(pruned, pruner.channels, plan.channels, plan.keep, IMAGES)


def test_progress_names_the_slow_steps():
    progress = Heard()
    prune_model(network(), CONFIG, IMAGES, progress=progress)
    assert progress.labels == ["tracing the network", "checking the pruned network"]
