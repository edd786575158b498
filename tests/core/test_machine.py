import pytest
import torch
from torch import nn

from micronet.core.machine import usable_cores, usable_threads
from micronet.models.device import memory_format
from micronet.models.resnet import resnet18


@pytest.mark.parametrize(("said", "threads"), [("3", 3), ("3,2", 3), ("0", None), ("many", None), (None, None)])
def test_as_many_threads_as_openmp_is_told_or_one_a_core(monkeypatch, said, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if said is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", said)
    assert usable_threads() == (threads or usable_cores())


def test_networks_are_run_with_as_many_threads(micronet, monkeypatch, chain):
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert micronet("evaluate", chain / "float.safetensors", "--limit", "8").code == 0
    assert torch.get_num_threads() == 3
    torch.set_num_threads(before)


def test_maps_lie_so_that_strided_pointwise_convolutions_get_their_gradient():
    """oneDNN gives a wrong one or dies where few channels lie last (its issue 6035)."""
    layer = nn.Conv2d(6, 13, 1, stride=2, bias=False)
    layout = memory_format(layer)
    images = torch.randn(4, 6, 64, 64).to(memory_format=layout)
    layer.to(memory_format=layout)(images).square().sum().backward()
    dense = nn.Linear(6, 13, bias=False).double()
    dense.weight.data.copy_(layer.weight.detach()[:, :, 0, 0])
    dense(images[:, :, ::2, ::2].permute(0, 2, 3, 1).double()).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad[:, :, 0, 0].double(), dense.weight.grad, rtol=1e-4, atol=1e-2)
    assert memory_format(resnet18(width=0.1)) is torch.contiguous_format
    assert memory_format(resnet18(width=0.25)) is torch.channels_last
