"""The operator tables, and the questions that a traced graph answers by them."""

import pkgutil
from operator import attrgetter

import pytest
import torch
import torchvision  # noqa: F401  # adds its operators to torch.ops
from torch import nn
from torch.nn import functional as F

from micronet.graph import ops
from micronet.graph.trace import Graph, trace
from micronet.models.computed import weight_owners

FAMILIES = {name: value for name, value in vars(ops).items() if isinstance(value, ops.Family)}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_entry_exists_in_this_torch(name):
    family = FAMILIES[name]
    assert all(issubclass(module, nn.Module) for module in family.modules)
    functions = [_resolve(each) if isinstance(each, str) else each for each in family.functions]
    assert all(callable(function) for function in functions)
    assert all(hasattr(torch.Tensor, method) for method in family.methods)


def _resolve(name):
    own = name.removeprefix("torch._ops.")  # torchvision's, in torch.ops once it is imported
    return pkgutil.resolve_name(name) if own == name else attrgetter(own)(torch.ops)


class Spelled(nn.Module):
    """One operation in one of its spellings."""

    def __init__(self, operation):
        super().__init__()
        if isinstance(operation, nn.Module):
            self.module = operation
        self._operation = [operation]

    def forward(self, x):
        return self.module(x) if hasattr(self, "module") else self._operation[0](x)


def only_node(operation):
    graph = Graph(Spelled(operation))
    return graph, list(graph.fx.nodes)[1]


@pytest.mark.parametrize(
    ("family", "spellings"),
    [
        (ops.RELU, [nn.ReLU(), F.relu, torch.relu, lambda x: x.relu(), lambda x: x.relu_()]),
        (ops.RELU6, [nn.ReLU6(), F.relu6]),
        (ops.SOFTMAX, [nn.Softmax(1), lambda x: F.softmax(x, 1), lambda x: x.softmax(1)]),
        (ops.MAX_POOL, [nn.MaxPool2d(2), lambda x: F.max_pool2d(x, 2), lambda x: torch.max_pool2d(x, 2)]),
        (ops.AVERAGE_POOL, [nn.AvgPool2d(2), lambda x: F.adaptive_avg_pool1d(x, 1)]),
        (ops.RESHAPE, [nn.Flatten(), lambda x: torch.flatten(x, 1), lambda x: x.view(1, -1)]),
        (ops.MATMUL, [lambda x: x @ x, lambda x: torch.bmm(x, x), lambda x: x.matmul(x)]),
    ],
    ids=["relu", "relu6", "softmax", "max-pool", "average-pool", "reshape", "matmul"],
)
def test_every_spelling_of_an_operation_is_recognized(family, spellings):
    for spelling in spellings:
        graph, node = only_node(spelling)
        assert graph.matches(node, family)
        others = (ops.RELU, ops.RELU6, ops.SOFTMAX, ops.MAX_POOL, ops.AVERAGE_POOL, ops.RESHAPE, ops.MATMUL)
        assert sum(graph.matches(node, other) for other in others) == 1


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (lambda x: F.relu(x).flatten(1), True),
        (lambda x: F.max_pool2d(x.sigmoid(), 2), True),
        (lambda x: torch.relu(x).mean((2, 3)), True),
        (lambda x: F.relu(x).chunk(2, 1)[1], True),
        (lambda x: F.relu(x) - 1, False),
        (lambda x: F.max_pool2d(x, 2), False),
    ],
)
def test_values_stay_non_negative_when_moved_or_averaged(forward, expected):
    graph = Graph(Spelled(forward))
    last = list(graph.fx.nodes)[-2]
    assert graph.is_non_negative(last) == expected


def test_a_weight_that_is_shared_or_computed_has_no_owner():
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("own", "tied", "twin", "computed")})
    model["twin"].weight = model["tied"].weight
    nn.utils.parametrizations.weight_norm(model["computed"])
    assert weight_owners(model) == {model["own"]}


def test_a_forward_that_depends_on_data_gives_no_graph_and_modes_are_restored():
    class Branches(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    assert trace(Branches()) is None
    model = nn.Sequential(nn.Dropout(), nn.ReLU()).train()
    model[0].eval()
    assert trace(model) is not None
    assert [module.training for module in model] == [False, True]
