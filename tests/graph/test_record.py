"""Forwards recorded while they run: the record computes the same, for other values and other sizes of the batch too."""

import copy
import math
from collections import namedtuple

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from torchvision.ops import FrozenBatchNorm2d

from micronet.errors import MicronetError
from micronet.graph.graph_module import GraphModule, uncalled
from micronet.graph.leaves import find_leaves
from micronet.graph.record import record, record_network
from micronet.graph.trace import trace
from micronet.pruning.traced_network import trace_network

IMAGES, MORE = torch.randn(2, 3, 8, 8), torch.randn(5, 3, 8, 8)
Pair = namedtuple("Pair", "first second")


class Network(nn.Module):
    """Layers for the forwards below."""

    def __init__(self, forward):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.blocks = nn.ModuleList([nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1)])
        self.head, self.scale = nn.Linear(8, 4), nn.Parameter(torch.rand(8, 1, 1))
        self.register_buffer("table", torch.rand(8, 1, 1), persistent=False)
        self.written = [forward]

    def forward(self, *inputs):
        return self.written[0](self, *inputs)


def control_flow_on_shapes(m, x):
    x = m.stem(x)
    if x.shape[-1] > 4 and x.size(1) == 8:
        x = F.avg_pool2d(x, x.shape[-1] // 4)
    for _ in range(x.shape[-1] // 2):
        x = m.blocks[0](x)
    return m.head(x.mean((2, 3)))


def lists_of_features(m, x):
    features = [m.stem(x)]
    for block in m.blocks:
        features.append(block(features[-1]))
    first, *others = features
    return m.head(sum(others, first).flatten(2).mean(-1))


def unpacked_parts(m, x):
    left, right = m.stem(x).chunk(2, 1)
    b, c, h, w = left.shape
    parts = [each * number for number, each in enumerate(left.split([1, 3], 1), 1)]
    return torch.cat([*parts, right], 1).view(b, 2 * c, h * w).transpose(1, 2)


def constants_of_the_forward(m, x):
    x = m.stem(x)
    grid = torch.arange(x.shape[-1], dtype=x.dtype) / 8
    mask = torch.ones(8, 8).tril().bool()
    return (x + grid).masked_fill(~mask, 0.5) * torch.tensor([0.25])


def sizes_of_the_batch(m, x):
    b, c = x.shape[:2]
    tokens = m.stem(x).reshape(b, 8, -1).permute(0, 2, 1)
    first = torch.zeros(len(x), 1, 8) + m.table.view(1, 1, 8)
    rolled = torch.cat([first, tokens], 1)[:, : tokens.shape[1] - c + 1]
    return m.head(rolled.reshape(b * rolled.size(1), 8)).unflatten(0, (b, -1))


def sizes_by_python(m, x):
    rows = m.stem(x)[:, :, : math.ceil(x.shape[2] / 3), : math.floor(x.shape[3] * 0.5)].flatten(2)
    windows = rows.reshape(len(x) * int((x.shape[2] * x.shape[3]) ** 0.5) // 2, -1)
    return windows.view(int(windows.shape[0] / (8 * 8 / 4 / 4)), 4, -1) if isinstance(x.shape[0], int) else rows


def in_place(m, x):
    x = m.norm(m.stem(x)).clone()
    x += m.blocks[0](x)
    x[:, :4] = 0.5
    x[:, 4:6] *= m.scale[4:6]
    x.relu_().add_(1)
    return x


def dictionaries(m, x):
    x = m.stem(x)
    out = {"deep": m.blocks[1](x), "flat": Pair(x.amax(1), [x.sum(1)])}
    return {**out, "shape": x.shape[2:]}


def several_inputs(m, x, y, scale):
    return m.stem(x) * m.head(y)[:, :1, None, None] + scale


def methods_and_reflected_operators(m, x):
    x = m.stem(x)
    y = 1.0 - x
    y = 2 / (y.abs() + 1) ** 2 - (3.0 ** y.tanh())
    return y.max(1).values @ x.sum(1).mT if y.ndim == 4 else x


def functions_with_weights(m, x):
    x = F.conv2d(x, m.stem.weight, m.stem.bias, padding=1)
    return F.linear(F.adaptive_avg_pool2d(x, 1).squeeze(-1).squeeze(-1), m.head.weight)


def a_dropout_and_an_assertion(m, x):
    assert x.shape[1] == 3 and x.is_floating_point()
    return F.dropout(m.stem(x), 0.5, m.training)


def nearest(m, x):
    x = m.stem(x)
    y = F.interpolate(x[..., ::2, ::2], size=x.shape[2:], mode="nearest")
    return torch.stack([x, y]).unbind(0)[1] + torch.einsum("bchw,cij->bchw", x, m.scale)


INPUTS = {several_inputs: lambda x: (x, torch.rand(len(x), 8), torch.rand(len(x), 1, 1, 1))}
FORWARDS = [
    control_flow_on_shapes, lists_of_features, unpacked_parts, constants_of_the_forward, sizes_of_the_batch,
    sizes_by_python, in_place, dictionaries, several_inputs, methods_and_reflected_operators, functions_with_weights,
    a_dropout_and_an_assertion, nearest,
]  # fmt: skip


def inputs_of(forward, images):
    return INPUTS.get(forward, lambda x: (x,))(images.clone())


@pytest.mark.parametrize("forward", FORWARDS, ids=lambda forward: forward.__name__)
def test_a_record_computes_what_the_network_computes(forward):
    torch.manual_seed(0)
    model = Network(forward).eval()
    recorded, _ = record_network(model, inputs_of(forward, IMAGES))
    graph = trace(recorded)
    own = model.state_dict()
    read = recorded.state_dict()
    assert read.keys() <= own.keys()
    assert all(own[key] is tensor or own[key].data_ptr() == tensor.data_ptr() for key, tensor in read.items())
    with torch.no_grad():
        for images in (IMAGES, -IMAGES, MORE):
            inputs = inputs_of(forward, images)
            expected = tree_leaves(model(*(x.clone() for x in inputs)))
            for network in (recorded, graph.model):
                actual = tree_leaves(network(*(x.clone() for x in inputs)))
                assert len(actual) == len(expected)
                assert all(
                    torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
                    for x, y in zip(actual, expected, strict=True)
                )


def branch_on_values(m, x):
    x = m.stem(x)
    if x.sum() > 0:
        return x
    return -m.blocks[0](x)


def number_from_values(m, x):
    return m.stem(x) * float(x.mean())


def indices_from_values(m, x):
    x = m.stem(x)
    return x[:, : int(x.flatten().argmax()) % 8 + 1]


def branch_that_no_input_here_takes(m, x):
    if x.mean() > 1e6:
        return m.stem(-x)
    return m.stem(x)


def branch_on_the_number_of_values(m, x):
    rows = torch.where(x[0, 0, 0, :1] > 0)[0]  # one row, or none for -x
    if rows.numel() == 0:
        return m.stem(x)
    return m.stem(x[rows])


@pytest.mark.parametrize(
    ("forward", "line"),
    [
        (branch_on_values, "if x.sum() > 0:"),
        (branch_on_the_number_of_values, "if rows.numel() == 0:"),
        (number_from_values, "float(x.mean())"),
        (indices_from_values, "int(x.flatten().argmax())"),
        (branch_that_no_input_here_takes, "if x.mean() > 1e6:"),
    ],
)
def test_a_forward_that_depends_on_values_is_refused_with_its_line(forward, line):
    torch.manual_seed(0)
    with pytest.raises(MicronetError, match=r"depends on the values of its inputs at .*test_record.py:") as caught:
        record_network(Network(forward), IMAGES)
    assert line in str(caught.value)


def test_a_forward_that_goes_another_way_for_the_inputs_of_a_restored_network_has_no_graph():
    def only_if_there_are_any(m, x):
        rows = torch.where(x[:, 0, 0, 0].abs() > 1)[0]
        return m.stem(x).index_add(0, rows, m.stem(x[rows])) if rows.numel() else m.stem(x)

    model, large = Network(only_if_there_are_any).eval(), torch.full((2, 3, 8, 8), 9.0)
    record_network(model, large)
    assert trace(model, large) is None


def test_a_layer_that_is_skipped_because_a_mask_selects_nothing_is_not_lost():
    def only_if_there_are_any(m, x):
        rows = torch.where(x[:, 0, 0, 0] > 9)[0]
        return x.index_add(0, rows, m.stem(x[rows])) if len(rows) else x

    model = Network(only_if_there_are_any)
    model.stem = nn.Conv2d(3, 3, 1)
    with pytest.raises(MicronetError, match=r"nothing selected .*len\(rows\) .* does not call stem.* more samples"):
        record_network(model, IMAGES)
    assert record_network(model, torch.full((2, 3, 8, 8), 10.0)) and trace(model.eval(), IMAGES) is None


@pytest.mark.parametrize(
    "selected", [lambda x: x[:, :0], lambda x: x[torch.nonzero(x.isnan().flatten(1).any(1))[:, 0]]]
)
def test_an_empty_selection_that_decides_nothing_is_recorded_beside_modules_that_are_never_called(selected):
    def followed(m, x):
        assert x.shape[-1] > 4
        return m.head(torch.cat([selected(x), x], 0 if len(selected(IMAGES)) == 0 else 1).mean((1, 2, 3))[:, None])

    model = Network(followed)
    model.head = nn.Linear(1, 4)
    assert "head" in [node.target for node in record_network(model, IMAGES)[0].graph.nodes]


def test_a_branch_on_values_whose_errors_are_caught_is_not_lost():
    def hidden(m, x):
        try:
            return m.stem(x) if x.sum() < 1e9 else -m.stem(x)
        except Exception:
            return m.stem(x)

    assert trace(Network(hidden).eval()) is None and trace(Network(hidden).eval(), IMAGES) is None


@torch.jit.script
def gated(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x)


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 1), torch.jit.script(nn.Sequential(nn.Conv2d(8, 8, 1), nn.Flatten()))

    def forward(self, x):
        return self.head(gated(self.stem(x)))


class GatedBySize(Gated):
    def forward(self, x):
        return super().forward(x * 2 if x.shape[-1] > 4 else x)


@pytest.mark.parametrize("network", [Gated, GatedBySize])  # the latter is recorded
def test_scripted_functions_are_traced_through_and_scripted_modules_are_leaves(network):
    model = network().eval()
    graph = trace(model, IMAGES)
    assert [str(node.target) for node, _ in graph.calls()] == ["stem", "head"]
    assert torch.sigmoid in {node.target for node in graph.fx.nodes}
    assert torch.equal(graph.model(MORE), model(MORE))
    assert type(gated).__call__.__module__ != "micronet.graph.record"  # as it was
    with pytest.raises(MicronetError, match=r"network is a TorchScript network .*; pass the Python network"):
        record_network(model.head, torch.randn(2, 8, 4, 4))


def test_such_a_line_is_found_in_a_module_that_is_a_leaf_too():
    inner = Network(branch_on_values)
    inner.is_leaf = True
    model = nn.Sequential(inner).eval()
    assert not record(model, (IMAGES,)).reads
    assert "if x.sum() > 0:" in record(model, (IMAGES,), into_leaves=True).reads


def weights_of_other_names(m, x):
    x = F.conv2d(x, m.kernel)
    return x * 2 if x.shape[-1] > 4 else x


def test_a_layer_whose_tensors_have_other_names_is_a_module_of_the_record_too():
    model = Network(weights_of_other_names).eval()
    model.kernel = nn.Parameter(torch.randn(4, 3, 3, 3))
    graph = trace(model, IMAGES)
    assert any(isinstance(module, nn.Conv2d) for _, module in graph.calls())
    assert torch.equal(graph.model(IMAGES), model(IMAGES))


class Helped(nn.Module):
    """A layer with another beside it while training: one that learns, or noise."""

    def __init__(self, helper):
        super().__init__()
        self.stem, self.helper = nn.Conv2d(3, 8, 1), helper

    def forward(self, x):
        x = self.stem(x)
        return (x, self.helper(x)) if self.training else x


class HelpedOfSize(Helped):
    """One that torch.fx cannot trace."""

    def forward(self, x):
        return super().forward(x * 2 if x.shape[-1] > 4 else x)


@pytest.mark.parametrize(("helper", "has_graph"), [(nn.Conv2d(8, 2, 1), False), (nn.Dropout(), True)])
@pytest.mark.parametrize("written", [Helped, HelpedOfSize])
def test_a_record_in_eval_mode_never_loses_layers_that_learn(written, helper, has_graph):
    assert (trace(written(helper), IMAGES) is not None) == has_graph


def drops(m, x):
    x = m.stem(x)
    if x.shape[-1] > 4:
        x = F.dropout2d(F.dropout(x, 0.25, m.training), 0.5, training=m.training)
    return x


def test_dropout_by_hand_follows_the_mode():
    model = Network(drops).eval()
    recorded, _ = record_network(model, IMAGES)
    assert torch.equal(recorded(IMAGES), model(IMAGES))
    out = []
    for network in (model, recorded, trace(recorded).model):
        torch.manual_seed(0)
        out.append(network.train()(IMAGES))
    assert torch.equal(out[1], out[0]) and torch.equal(out[2], out[0])


def adds_to_a_tensor_of_its_own(m, x):
    first, second = torch.zeros(1, 4), torch.zeros(1, 4)
    first += m.head(m.stem(x).mean((0, 2, 3)))
    return first + second


def adds_to_a_view_of_one(m, x):
    total = torch.zeros(1, 4)
    total.view(-1)[:2].add_(m.head(m.stem(x).mean((0, 2, 3)))[:2])
    return total


@pytest.mark.parametrize("forward", [adds_to_a_tensor_of_its_own, adds_to_a_view_of_one])
def test_a_tensor_that_a_forward_makes_and_writes_into_starts_anew_in_every_call(forward):
    model = Network(forward).eval()
    if (graph := trace(model, IMAGES)) is not None:
        assert graph.recorded and torch.equal(graph.model(IMAGES), graph.model(IMAGES))
        torch.testing.assert_close(graph.model(IMAGES), model(IMAGES))


def test_a_long_forward_with_operations_in_place_is_traced():
    class Long(nn.Module):
        def forward(self, x):
            x = x.clone()
            for _ in range(1100):  # more than Python's stack holds
                x = x.add_(0.5)
            return x

    assert trace(Long().eval()) is not None


def loops_over_the_batch(m, x):
    return torch.stack([m.head(row.mean((1, 2))) for row in m.stem(x)])


def fixes_the_batch(m, x):
    return m.head(m.stem(x).mean((2, 3)).view(round(x.shape[0] ** 1.0), -1))


@pytest.mark.parametrize("forward", [loops_over_the_batch, fixes_the_batch])
def test_a_forward_that_takes_the_size_of_the_batch_apart_has_no_graph(forward, capsys):
    model = Network(forward).eval()
    record_network(model, IMAGES)  # for these images it would
    assert trace(model, IMAGES) is None
    assert not capsys.readouterr().err


class Frozen(nn.Module):
    """A batch norm with fixed statistics that checks its input, so that torch.fx cannot trace it."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 1), FrozenBatchNorm2d(8)
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        if x.shape[1] != 3:
            raise ValueError("expected 3 channels")
        return self.norm(self.stem(x))


def test_a_record_may_round_in_another_way_than_its_network():
    assert trace(Frozen().eval(), IMAGES).recorded  # a plain batch norm scales after it subtracts the mean


def test_plain_layers_come_in_the_order_of_the_forward():
    names = [str(number) for number in range(6)]
    assert list(trace(nn.Sequential(*(FrozenBatchNorm2d(3) for _ in names))).plain) == names


def goes_another_way_in_torch_fx(m, x):
    x = m.stem(x)
    try:
        bool(x.shape[-1] > 0)
    except Exception:
        x = x * 1.5
    return x * 1e25, x.masked_fill(x < 0, -torch.inf)


def test_a_symbolic_trace_that_computes_something_else_is_refused_however_large_the_outputs_are():
    """In float32, the norm of numbers like these is infinite."""
    model = Network(goes_another_way_in_torch_fx).eval()
    graph = trace(model, IMAGES)
    assert graph.recorded
    for ours, own in zip(graph.model(IMAGES), model(IMAGES), strict=True):
        assert torch.equal(ours, own)


def test_a_forward_that_fails_is_refused_with_its_line():
    with pytest.raises(
        MicronetError, match=r"cannot run on the example input \(2, 3, 8, 8\) at .*test_record.py:\d+ \(.*m.head"
    ):
        record_network(Network(lambda m, x: m.head(m.stem(x).flatten(1))), IMAGES)
    with pytest.raises(
        MicronetError, match=r"\(2,\): forward\(\) takes 1 input \(.*\), but 2 were given; pass the inputs"
    ):
        record_network(nn.Sequential(nn.Conv2d(3, 4, 1)), (IMAGES, torch.arange(2)))


def test_the_modes_and_the_gradients_of_a_network_stay_as_they_are():
    model = Network(in_place)
    model.norm.eval()
    model.head.weight.requires_grad_(False)
    recorded, _ = record_network(model, IMAGES)
    assert model.training and model.stem.training and not model.norm.training
    assert recorded.training and recorded.stem.training and not recorded.norm.training
    assert model.stem.weight.requires_grad and not model.head.weight.requires_grad


class Masked(nn.Module):
    """As transformers do: a mask that hides nothing is left out, unless a tracer runs."""

    def __init__(self):
        super().__init__()
        self.norm, self.fc = FrozenBatchNorm2d(3), nn.Linear(3, 2)

    def forward(self, x, mask):
        x = self.norm(x).mean((2, 3)) * torch.ones(3, device=x.device)
        if not torch.jit.is_tracing() and mask.all():
            return self.fc(x)
        return self.fc(torch.where(mask, x, 0))


def test_code_that_looks_at_values_unless_a_tracer_runs_is_recorded_and_reads_no_tensor_of_a_leaf():
    net, x = Masked().eval(), torch.rand(2, 3, 4, 4)
    recorded, _ = record_network(net, (x, torch.tensor([[True, False, True], [True, True, True]])))
    for mask in (torch.ones(2, 3, dtype=torch.bool), torch.eye(2, 3, dtype=torch.bool)):
        torch.testing.assert_close(recorded(x, mask), net(x, mask))
    assert not torch.jit.is_tracing()
    assert "norm.running_mean" not in recorded.code


def test_a_network_that_runs_a_graph_prints_no_traceback_of_its_errors(capsys):
    network = GraphModule(nn.Linear(2, 3), fx.symbolic_trace(nn.Linear(2, 3)).graph)
    for each in (network, copy.deepcopy(network)):
        with pytest.raises(RuntimeError):
            each(torch.zeros(4, 5))
    assert capsys.readouterr() == ("", "")


class Codes(nn.Module):
    """A table whose last columns number categories, read in a loop over the columns."""

    def __init__(self):
        super().__init__()
        self.words, self.fc = nn.Embedding(4, 3), nn.Linear(8, 2)

    def forward(self, x):
        return self.fc(torch.cat([x[:, :2], *(self.words(x[:, i].long()) for i in range(2, x.shape[1]))], 1))


def test_values_that_the_network_refuses_say_nothing_against_its_record():
    x = torch.cat([torch.randn(6, 2), torch.randint(0, 4, (6, 2)).float()], 1)
    net = Codes().eval()
    traced, _ = record_network(net, x)
    assert torch.equal(traced(x), net(x))


@torch.fx.wrap
def project(x, weight, bias, summed):
    x = F.linear(x, weight, bias)
    return x.cumsum(1) if summed and x.shape[1] > 4 else x


class Wrapped(nn.Module):
    """Applies a layer to (N, length, 3) in a function that torch.fx keeps whole; ``summed``: and sums long inputs."""

    def __init__(self, summed=False):
        super().__init__()
        self.head, self.summed = nn.Linear(3, 4), summed

    def forward(self, x):
        return project(x, self.head.weight, self.head.bias, self.summed).mean(1)


def test_layers_inside_a_function_that_torch_fx_keeps_whole_are_found():
    graph = trace(Wrapped().eval(), torch.rand(2, 8, 3))
    assert graph is not None and "head" in [node.target for node in graph.fx.nodes]
    assert "head" in trace_network(Wrapped().eval(), torch.rand(2, 8, 3)).plain


def test_a_record_does_not_take_the_place_of_a_graph_that_follows_other_sizes():
    model = Wrapped(summed=True).eval()
    graph = trace(model, torch.rand(2, 8, 3))
    assert graph is not None
    for length in (2, 4, 8, 12):
        x = torch.rand(2, length, 3)
        torch.testing.assert_close(graph.model(x) if graph.plain else GraphModule(model, graph.fx)(x), model(x))


class Cached(nn.Module):
    """Computes something for its first input, and keeps it, as torchvision's region pools do."""

    scale = None

    def forward(self, x):
        if self.scale is None:
            self.scale = x.mean(1)
        return x * sum(self.scale)


def test_what_a_module_stores_when_leaves_are_looked_for_is_forgotten():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), Cached())
    find_leaves(model)
    assert model[1].scale is None


def test_modules_are_uncalled_if_none_of_their_parameters_is_used():
    model = nn.Module()
    model.a, model.table, model.decoder = nn.Linear(4, 4), nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
    model.groups = nn.ModuleList([nn.ModuleList([model.a]), nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])])
    model.decoder.weight = model.table.weight
    graph = fx.Graph()
    x = graph.call_module("table", (graph.placeholder("x"),))
    graph.output(graph.call_module("a", (x,)))
    assert uncalled(model, model, [graph]) == ["groups.1"]
