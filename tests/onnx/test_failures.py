"""What torch cannot export is named by module, file and line, never in the exporter's own words."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence

import micronet
from micronet.errors import FailedError
from micronet.models.device import Inputs
from micronet.onnx.config import ExportConfig
from micronet.onnx.graph_export import export_graph

IMAGES = torch.rand(2, 3, 4, 4)


class Dynamic(nn.Module):
    """A convolution whose weight is computed from the input, for all samples at once or one after another."""

    def __init__(self, loops):
        super().__init__()
        self.route, self.weight, self.loops = nn.Linear(3, 2), nn.Parameter(torch.randn(2, 4, 3, 1, 1)), loops

    def forward(self, x):
        if self.loops:
            return torch.cat([self.one(x[i : i + 1]) for i in range(len(x))])
        n, c, height, width = x.shape
        weight = self.route(x.mean((2, 3))) @ self.weight.flatten(1)
        y = F.conv2d(x.reshape(1, n * c, height, width), weight.view(n * 4, c, 1, 1), groups=n)
        return y.view(n, 4, height, width)

    def one(self, x):
        return F.conv2d(x, (self.route(x.mean((2, 3))) @ self.weight.flatten(1)).view(4, 3, 1, 1))


@pytest.mark.parametrize(
    ("loops", "message"),
    [(False, r": conv2d\(\) in 0 has a number of groups .*none"), (True, "fixes the size of the axis batch .*none")],
)
def test_a_weight_for_each_sample_is_named_and_exported_for_one(loops, message):
    quantized = micronet.quantize(nn.Sequential(Dynamic(loops)).eval(), data=[IMAGES], mode="ptq")
    with pytest.raises(micronet.MicronetError, match=message):
        micronet.export_onnx(quantized, IMAGES)
    micronet.export_onnx(quantized, IMAGES, dynamic="none")


def test_a_users_module_is_named_with_its_file_and_line():
    with pytest.raises(micronet.MicronetError, match=r"in 0 \(Dynamic\.forward at .*test_failures\.py:\d+\)"):
        export_graph(nn.Sequential(Dynamic(False)).eval(), IMAGES, ExportConfig())


class Distances(nn.Module):
    def forward(self, x):
        return torch.cdist(x, x)


def test_an_operator_that_onnx_lacks_has_no_cure_in_fixed_sizes():
    with pytest.raises(micronet.MicronetError, match=r"_cdist_forward\(\).*; write that part with other op") as found:
        export_graph(Distances(), IMAGES, ExportConfig())
    assert "--dynamic" not in str(found.value)


class Selecting(nn.Module):
    def forward(self, x):
        rows = (x > 0.5).nonzero()
        return x if rows.numel() == 0 else x.relu()


def test_a_size_that_depends_on_values_is_named_with_its_line_and_a_way_on():
    with pytest.raises(
        micronet.MicronetError, match=r"test_failures\.py:\d+ \(return x if .*\); .*torch\.where"
    ) as found:
        export_graph(Selecting(), IMAGES, ExportConfig())
    assert "--dynamic" not in str(found.value)  # it would not help


class Flattening(nn.Module):
    def forward(self, x):
        return x.reshape(len(x), len([*self.children(), x]), -1)


def test_the_len_of_a_tensor_stays_free_in_the_file():
    graph = export_graph(Flattening(), IMAGES, ExportConfig()).graph
    assert str(graph.outputs[0].shape) == "[batch,1,48]"
    assert "len" not in globals()


class Packing(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.GRU(3, 2, batch_first=True)

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.layer(packed)[1]


@pytest.mark.parametrize("dynamic", ["batch", "batch,1", "none"])
def test_packed_sequences_are_named_with_their_line_and_a_way_on(dynamic):
    inputs = Inputs([torch.rand(2, 5, 3), torch.tensor([5, 3])])
    with pytest.raises(
        micronet.MicronetError, match=r"no packed sequences at .*test_failures\.py:\d+ \(.*run the layer on the padded"
    ) as found:
        export_graph(Packing().eval(), inputs, ExportConfig(dynamic=dynamic))
    assert "--dynamic" not in str(found.value)


class Caching(nn.Module):
    """Scales each position by a number that is kept until a longer sequence comes, as a rotary embedding's."""

    def __init__(self):
        super().__init__()
        self.layer, self.most = nn.Linear(3, 3), 0

    def forward(self, x):
        if x.shape[1] > self.most:
            self.most = x.shape[1]
            self.scales = torch.arange(self.most, dtype=torch.float32)[:, None].cos()
        return self.layer(x) * self.scales[: x.shape[1]]


def test_what_a_forward_keeps_for_the_length_of_its_input_fixes_no_length():
    x = torch.randn(4, 6, 3)
    for net in (Caching().eval(), quantized := micronet.quantize(Caching().eval(), data=[x], mode="ptq")):
        proto = micronet.export_onnx(net, x, dynamic="batch,1", skip_timing=True)  # compares it at 3 and at 12
        assert [each.dim_param for each in proto.graph.input[0].type.tensor_type.shape.dim[:2]] == ["batch", "axis1"]
    assert not quantized.history[-1].result.get("fixed_sizes")


class EvenLengths(nn.Module):
    """Drops the last of an odd number of positions."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        x = self.layer(x)
        return x[:, :-1] if x.shape[1] % 2 else x


def test_a_file_that_fixes_whether_a_length_is_odd_is_refused():
    with pytest.raises(FailedError, match="for inputs of 9x3, so a size may be fixed in it"):
        micronet.export_onnx(EvenLengths().eval(), torch.randn(4, 8, 3), dynamic="batch,1", skip_timing=True)
