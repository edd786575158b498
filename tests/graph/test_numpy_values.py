"""NumPy's numbers and arrays in a forward are traced, and the graph computes what the network computes."""

import numpy as np
import pytest
import torch
from torch import fx, nn

from micronet.graph.trace import trace

ARRAY, ORDER = np.linspace(-1, 1, 6)[::-1].astype(np.float32), np.array([3, 1, 2, 0, 5, 4])


class Net(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.first, self.last, self.written = nn.Linear(6, 6), nn.Linear(6, 3), [forward]

    def forward(self, x):
        return self.last(self.written[0](self.first(x)))


FORWARDS = {
    "number": lambda x: x * np.sqrt(16) / np.float32(3),
    "number-first": lambda x: np.sqrt(16) * x,
    "size": lambda x: x.view(-1, np.prod(x.shape[1:])),
    "array": lambda x: x - x.new_tensor(ARRAY),
    "index": lambda x: x[:, ORDER],
    "branch": lambda x: x * np.sqrt(16) if x.size(0) < 100 else x,
}


@pytest.mark.parametrize("forward", FORWARDS.values(), ids=FORWARDS)
def test_numpy_in_a_forward_is_traced(forward):
    net, x = Net(forward).eval(), torch.randn(2, 6)
    graph = trace(net, x)
    network = fx.GraphModule(graph.model, graph.fx)
    for given in (x, torch.randn(5, 6)):
        assert torch.equal(network(given), net(given))
    assert [type(module) for _, module in graph.calls()] == [nn.Linear, nn.Linear]
