"""Networks as users write them: whatever is cut, the rest must compute what it did, and what is not must be named.

The oracle knows nothing of the pruner: without biases and with batch norms that only scale, a channel whose producing
rows are zero is zero wherever it goes, so the whole network with such rows must give what the cut one gives.
"""

import copy
import json
import re
from dataclasses import asdict

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from micronet.artifact.header import StageRecord
from micronet.core.progress import Silent
from micronet.errors import MicronetError
from micronet.pruning.config import PruneConfig
from micronet.pruning.prune import prune_model, restore

IMAGES = torch.randn(4, 3, 8, 8, dtype=torch.float64)


class Parts(nn.Module):
    """Layers for the forwards below."""

    def __init__(self, forward):
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.c2, self.b2 = nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.c3, self.c4 = nn.Conv2d(12, 5, 1, bias=False), nn.Conv2d(8, 5, 1, bias=False)
        self.cx, self.bx = nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.one = nn.Conv2d(8, 1, 1, bias=False)
        self.b_mix, self.dw = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.fc_two = nn.Linear(8 * 64 + 8 * 16, 5, bias=False)
        self.fc_view = nn.Linear(512, 5, bias=False)
        self.fc_batch = nn.Linear(2 * 512, 5, bias=False)
        self.fc_pooled = nn.Linear(16, 5, bias=False)
        self.fc1, self.bn1d, self.fc2 = nn.Linear(192, 16, bias=False), nn.BatchNorm1d(16), nn.Linear(16, 5, bias=False)
        self.hi = nn.Parameter(torch.rand(1, 8, 1, 1) + 0.5)
        self.prelu, self.up = nn.PReLU(8), nn.ConvTranspose2d(8, 8, 2, 2, bias=False)
        self.glu = nn.GLU(dim=1)
        self._forward = [forward]

    def forward(self, x):
        return self._forward[0](self, x)

    def stem(self, x):
        return F.relu(self.b1(self.c1(x)))

    def head(self, x):
        return self.c3(F.relu(self.b2(self.c2(x)))).mean((2, 3))


def maps_of_two_sizes(m, x):
    a = m.stem(x)
    b = F.relu(m.bx(m.cx(F.max_pool2d(x, 2))))
    return m.fc_two(torch.cat([a.flatten(1), b.flatten(1)], 1))


def pooled_and_flattened(m, x):
    pooled = [F.adaptive_avg_pool2d(branch, 1) for branch in (m.stem(x), F.relu(m.bx(m.cx(x))))]
    return m.fc_pooled(torch.cat(pooled, 1).flatten(1))


def layer_that_also_reads_a_flip(m, x):
    a, b = m.stem(x), m.stem(torch.flip(x, [3]))
    return m.c4(a).mean((2, 3)) + m.head(b)


def layer_called_twice(m, x):
    return m.head(m.stem(x)) + m.head(m.stem(F.max_pool2d(x, 2)))


def layer_on_followed_and_not(m, x):
    b = F.relu(m.c1(torch.flip(x, [3])))
    return m.head(m.stem(x)) + b.mean((1, 2, 3)).unsqueeze(1)


def norm_shared_with_what_cannot_be_followed(m, x):
    return m.head(m.stem(x)) + m.c4(m.b1(torch.abs(m.cx(x)))).mean((2, 3))


def prelu_shared_with_what_cannot_be_followed(m, x):
    return m.head(m.prelu(m.b1(m.c1(x)))) + m.c4(m.prelu(torch.abs(m.cx(x)))).mean((2, 3))


def broadcast_add_small_first(m, x):
    a = m.stem(x)
    return m.head(m.one(a) + a)


def broadcast_add_small_last(m, x):
    a = m.stem(x)
    return m.head(m.dw(m.b_mix(a + m.one(a))))


def clamp_between_tensors(m, x):
    return m.head(m.b1(m.c1(x)).clamp(max=m.bx(m.cx(x))))


def clamp_between_parameters(m, x):
    return m.head(torch.clamp(m.b1(m.c1(x)), -m.hi, m.hi))


def weight_read_by_the_forward(m, x):
    return m.head(m.stem(x)) + m.c4(F.conv2d(x, m.c1.weight, padding=1)).mean((2, 3))


def scale_read_by_the_forward(m, x):
    return m.head(m.stem(x)) * m.b1.weight.sum()


def view_that_folds_the_batch(m, x):
    return m.fc_batch(m.stem(x).view(2, -1))


def view_from_the_size(m, x):
    return m.fc_view(m.stem(x).view(x.size(0), -1)) + m.fc_view(m.stem(x).reshape(x.shape[0], -1))


def cat_of_a_split(m, x):
    return m.head(torch.cat(m.stem(x).chunk(2, 1)[::-1], 1))


def cat_of_the_same_twice(m, x):
    a = F.adaptive_avg_pool2d(m.stem(x), 1)
    return m.fc_pooled(torch.cat([a, a], 1).flatten(1))


def normalised_by_the_forward(m, x):
    return m.head(m.stem((x.to(x.dtype) - 0.5) / 0.2))


def matrix_from_a_view(m, x):
    return m.fc2(F.relu(m.bn1d(m.fc1(x.view(-1, 192)))))


def gated_channels(m, x):
    a = m.stem(x)
    return m.head(a * torch.sigmoid(m.bx(m.cx(F.adaptive_avg_pool2d(x, 1)))))


def gated_linear_units(m, x):
    return m.head(torch.cat([F.glu(m.stem(x), 1), m.glu(m.bx(m.cx(x)))], dim=1))


def sliced(m, x):
    a = m.stem(x)
    return m.head(torch.cat([a[:, 4:], a[:, :4]], 1))


def permuted(m, x):
    return m.head(m.stem(x).permute(0, 1, 3, 2))


def averaged_over_channels(m, x):
    a = m.stem(x)
    return m.head(a) + a.mean(1, keepdim=True).mean((2, 3))


def transposed_convolution(m, x):
    return m.head(F.relu(m.up(m.stem(x))))


def residual(m, x):
    a = m.stem(x)
    return m.head(a + m.dw(a) + m.bx(m.cx(x)))


FORWARDS = [value for value in list(globals().values()) if getattr(value, "__code__", None) and value.__code__.co_varnames[:2] == ("m", "x")]  # fmt: skip  # noqa: E501
# A lone channel added to all of them goes on where its own was silent; what reads them is what is cut.
SPREADING = [broadcast_add_small_first, broadcast_add_small_last]
# Those whose channels can all be followed, and the layers that must have lost some.
CUT = {
    pooled_and_flattened: {"c1", "cx"}, layer_called_twice: {"c1", "c2"}, broadcast_add_small_last: {"c2"},
    cat_of_the_same_twice: {"c1"}, normalised_by_the_forward: {"c1", "c2"}, matrix_from_a_view: {"fc1"},
    residual: {"c1", "c2", "cx"}, view_from_the_size: {"c1"}, gated_channels: {"c1", "cx"}, permuted: {"c1", "c2"},
    cat_of_a_split: {"c1"}, gated_linear_units: {"c1", "cx"}, transposed_convolution: {"c1"},
    clamp_between_tensors: {"c1", "cx"},
}  # fmt: skip


@pytest.mark.parametrize("percent", [0, 0.3, 0.5, 0.8])
@pytest.mark.parametrize("forward", FORWARDS, ids=lambda forward: forward.__name__)
def test_what_is_cut_changes_nothing_else(forward, percent):
    model = Parts(forward).double().eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.weight)
            nn.init.uniform_(module.running_var, 0.5, 2)
    try:
        pruned, _, plan = prune_model(model, PruneConfig(percent, criterion="bn-scale"), IMAGES)
    except MicronetError as error:
        assert forward not in CUT, error
        assert "no channels in this network can be pruned" in str(error)
        assert not re.search(r"\b([\w.]+): \1\b", str(error))
        return
    whole = copy.deepcopy(model)
    for group in plan.groups.values():
        cut = [channel for channel in range(group.before) if channel not in group.keep]
        for layer in group.layers:
            whole.get_submodule(layer).weight.data[cut] = 0
        assert group.note or group.after == group.before or percent
    if forward not in SPREADING:
        torch.testing.assert_close(pruned(IMAGES), whole(IMAGES), rtol=1e-9, atol=1e-10)
    if percent == 0.8:
        lost = {layer for group in plan.groups.values() if group.after < group.before for layer in group.layers}
        assert lost >= CUT.get(forward, set())


@pytest.mark.parametrize("wrap", [nn.utils.weight_norm, nn.utils.spectral_norm, nn.utils.parametrizations.weight_norm])
def test_layers_whose_weights_are_made_anew_are_left_whole(wrap):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1),
    )  # fmt: skip
    model[3] = wrap(model[3])
    images = torch.randn(2, 3, 4, 4)
    model.train()(images)
    pruned, _, plan = prune_model(model.eval(), PruneConfig(0.5), images)
    assert pruned(images).shape == (2, 4, 4, 4)
    groups = list(plan.groups.values())
    assert [group.after < group.before for group in groups] == [False, False, True, False]
    assert f"3 {groups[1].note}".startswith(groups[0].note)  # who prints the second one's reason names it first


def test_batch_statistics_of_the_channels_that_stay_are_those_of_the_whole_network():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.0), nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12),
        nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5),
    ).double()  # fmt: skip
    pruned, _, plan = prune_model(model, PruneConfig(0.5, criterion="l2", scope="layer"), IMAGES)
    first, second, _ = plan.groups.values()
    masked = copy.deepcopy(model)
    for reader, group in ((masked[4], first), (masked[9], second)):
        reader.weight.data[:, [channel for channel in range(group.before) if channel not in group.keep]] = 0
    for _ in range(2):
        torch.testing.assert_close(pruned.train()(IMAGES), masked.train()(IMAGES), rtol=1e-9, atol=1e-12)
    assert (pruned[1].num_features, pruned[5].num_features) == (4, 6)
    torch.testing.assert_close(pruned[1].running_var, masked[1].running_var[first.keep], rtol=1e-9, atol=0)
    torch.testing.assert_close(pruned[5].running_mean, masked[5].running_mean[second.keep], rtol=1e-9, atol=1e-12)


class Scaled(nn.Module):
    """Parameters and buffers with one value per channel, in several places and shapes, that a forward reads."""

    def __init__(self):
        super().__init__()
        self.inner, self.fc = nn.Conv2d(3, 8, 3, bias=False), nn.Linear(16, 5, bias=False)
        self.mid = nn.Conv2d(8, 16, 1, bias=False)
        self.gamma = nn.Parameter(torch.rand(8) + 0.5)
        self.wide = nn.Parameter(torch.rand(1, 16, 1, 1) + 0.5)
        self.register_buffer("slope", torch.rand(2, 8) + 0.5)
        self.places = nn.Parameter(torch.rand(1, 6, 6, 8) + 0.5)

    def forward(self, x):
        x = self.inner(x) * self.gamma.view(1, -1, 1, 1)
        x = x.permute(0, 2, 3, 1) * self.places.sigmoid()
        x = (x * self.slope[0] * self.gamma).permute(0, 3, 1, 2)
        return self.fc((self.mid(x) * self.wide).mean((2, 3)))


def test_values_per_channel_that_the_forward_reads_are_cut_with_their_channels():
    torch.manual_seed(0)
    model = Scaled().double()
    pruned, record, plan = prune_model(model, PruneConfig(0.5, criterion="l2", scope="layer"), IMAGES)
    assert plan.cut / plan.total == 0.5
    shapes = {name: list(tensor.shape) for name, tensor in pruned.state_dict().items()}
    assert (shapes["gamma"], shapes["wide"], shapes["slope"], shapes["places"]) == (
        [4], [1, 8, 1, 1], [2, 4], [1, 6, 6, 4],
    )  # fmt: skip
    again = restore(copy.deepcopy(model), record)
    again.load_state_dict(pruned.state_dict())
    assert torch.equal(again(IMAGES), pruned(IMAGES))
    masked = copy.deepcopy(model)
    inner, mid, _ = plan.groups.values()
    with torch.no_grad():
        for layer, group in ((masked.inner, inner), (masked.mid, mid)):
            layer.weight[[channel for channel in range(group.before) if channel not in group.keep]] = 0
    torch.testing.assert_close(pruned(IMAGES), masked(IMAGES), rtol=1e-12, atol=1e-12)


class SummedScale(Scaled):
    """The same, but all channels read the scale's sum."""

    def forward(self, x):
        return super().forward(x) * self.gamma.sum()


class ScaleOfTwo(Scaled):
    """The same, but its values per channel meet two layers whose channels are otherwise independent."""

    def forward(self, x):
        return super().forward(x) + self.fc(self.mid(self.inner(x) * self.gamma.view(-1, 1, 1)).mean((2, 3)))


@pytest.mark.parametrize(
    ("network", "why"), [(SummedScale, "forward() also uses gamma in another way"), (ScaleOfTwo, "")]
)
def test_values_per_channel_with_other_readers_keep_their_channels(network, why):
    torch.manual_seed(0)
    model = network().double()
    pruned, _, plan = prune_model(model, PruneConfig(0.5, criterion="l2", scope="layer"), IMAGES)
    inner = next(group for group in plan.groups.values() if "inner" in group.layers)
    assert why in inner.note
    assert (len(pruned.gamma) == 8) == bool(why)


class Gated(nn.Module):
    """Parts of one layer's channels that meet each other, as in gated linear units and split attention."""

    def __init__(self, forward):
        super().__init__()
        self.c1, self.c2, self.c3 = (nn.Conv2d(i, o, 1, bias=False) for i, o in ((3, 24), (12, 8), (24, 24)))
        self.c4, self.fc = nn.Conv2d(8, 6, 1, bias=False), nn.Linear(8, 5, bias=False)
        self.glu = nn.GLU(dim=1)
        self._forward = [forward]

    def forward(self, x):
        return self.fc(self.c2(self._forward[0](self, x)).mean((2, 3)))


def gated_unit(m, x):
    values, gates = m.c1(x).chunk(2, 1)
    return values * gates.sigmoid()


def gate_that_halves_by_a_slice(m, x):
    x = m.c1(x)
    half = x.shape[1] // 2
    return F.silu(x[:, :half]) * x[:, half:]


def split_attention(m, x):
    x = m.c1(x)
    x = x.view(x.shape[0], 2, x.shape[1] // 2, *x.shape[2:])
    weights = m.c3(torch.cat([x.sum(1), x.amax(1)], 1).mean((2, 3), keepdim=True))
    weights = weights.view(x.shape[0], 2, -1, 1, 1).softmax(1)
    return (x * weights).sum(dim=1)


class SelectiveKernel(nn.Module):
    """Two layers whose channels are weighed by the halves of a third, and whose input is split by an attribute."""

    def __init__(self):
        super().__init__()
        self.stem, self.paths, self.width = nn.Conv2d(3, 8, 1, bias=False), 2, 8
        self.left, self.right = (nn.Conv2d(4, 12, 3, padding=1, bias=False) for _ in range(2))
        self.select, self.fc = nn.Conv2d(12, 24, 1, bias=False), nn.Linear(12, 5, bias=False)

    def forward(self, x):
        left, right = torch.split(self.stem(x), self.width // self.paths, 1)
        x = torch.stack([self.left(left), self.right(right)], 1)
        weights = self.select(x.sum(1).mean((2, 3), keepdim=True))
        weights = weights.view(len(x), self.paths, weights.shape[1] // self.paths, 1, 1).softmax(1)
        return self.fc((x * weights).sum(1).mean((2, 3)))


@pytest.mark.parametrize("criterion", ["l2", "random"])
def test_layers_that_the_parts_of_another_weigh_are_cut_with_it(criterion):
    torch.manual_seed(0)
    model = SelectiveKernel().double()
    pruned, record, plan = prune_model(model, PruneConfig(0.5, criterion=criterion, scope="layer"), IMAGES)
    shapes = [tuple(getattr(pruned, name).weight.shape[:2]) for name in ("stem", "left", "right", "select", "fc")]
    assert shapes == [(4, 3), (6, 2), (6, 2), (12, 6), (5, 6)]
    stem, branches, _ = plan.groups.values()
    assert [channel + 12 for channel in branches.keep[:6]] == branches.keep[6:]
    masked, silent = copy.deepcopy(model), [channel for channel in range(12) if channel not in branches.keep]
    with torch.no_grad():
        masked.stem.weight[[channel for channel in range(8) if channel not in stem.keep]] = 0
        masked.fc.weight[:, silent] = 0
        masked.select.weight[:, silent] = 0
    torch.testing.assert_close(pruned(IMAGES), masked(IMAGES), rtol=1e-12, atol=1e-12)
    again = restore(copy.deepcopy(model), StageRecord(**json.loads(json.dumps(asdict(record)))))
    again.load_state_dict(pruned.state_dict())
    assert torch.equal(again(IMAGES), pruned(IMAGES))


@pytest.mark.parametrize("forward", [gated_unit, gate_that_halves_by_a_slice, split_attention])
def test_channels_that_meet_others_of_their_layer_are_cut_together(forward):
    torch.manual_seed(0)
    model = Gated(forward).double()
    pruned, _, plan = prune_model(model, PruneConfig(0.5, criterion="l2", scope="layer"), IMAGES)
    assert len(pruned.c1.weight) == 12
    keep = next(group.keep for group in plan.groups.values() if "c1" in group.layers)
    assert [channel + 12 for channel in keep[:6]] == keep[6:]
    masked, silent = copy.deepcopy(model), [channel for channel in range(12) if channel not in keep]
    inner = next(group for group in plan.groups.values() if "c2" in group.layers)
    with torch.no_grad():
        masked.c2.weight[:, silent] = 0
        masked.c3.weight[:, silent + [channel + 12 for channel in silent]] = 0
        masked.fc.weight[:, [channel for channel in range(8) if channel not in inner.keep]] = 0
    torch.testing.assert_close(pruned(IMAGES), masked(IMAGES), rtol=1e-12, atol=1e-12)


class Split(nn.Module):
    """Parts of fixed, unequal sizes, which the module holds as attributes, each with a layer of its own."""

    def __init__(self):
        super().__init__()
        self.sizes, self.gated = [16, 8], (12, 4, 8)
        self.c1, self.c2 = nn.Conv2d(3, 24, 1, bias=False), nn.Conv2d(24, 24, 1, bias=False)
        self.layers = nn.ModuleList(nn.Conv2d(size, size, 3, 1, 1, 1, size, bias=False) for size in self.sizes)
        self.inner, self.fc = nn.Conv2d(8, 8, 3, 1, 1, 1, 8, bias=False), nn.Linear(12, 5, bias=False)

    def forward(self, x):
        parts = torch.split(self.c1(x), self.sizes, 1)
        x = torch.cat([layer(part) for layer, part in zip(self.layers, parts, strict=True)], 1)
        gate, left, right = self.c2(x).split(self.gated, dim=1)
        return self.fc((gate.sigmoid() * torch.cat([left, self.inner(right)], 1)).mean((2, 3)))


def test_sizes_that_a_module_holds_are_changed_with_its_layers():
    torch.manual_seed(0)
    model = Split().double()
    pruned, record, _ = prune_model(model, PruneConfig(0.5, criterion="l2", scope="layer"), IMAGES)
    assert (pruned.sizes, pruned.gated, model.sizes) == ([8, 4], (6, 2, 4), [16, 8])
    again = restore(copy.deepcopy(model), StageRecord(**json.loads(json.dumps(asdict(record)))))
    again.load_state_dict(pruned.state_dict())
    assert torch.equal(again(IMAGES), pruned(IMAGES))
    assert again.gated == (6, 2, 4)
    wrong = {"sizes": [8], "gated": (12, 4, 9), "training": 1, "_version": 1, "absent": 1, "dump_patches": 1}
    for name, value in {**wrong, "sizes ": [16, 8]}.items():
        with pytest.raises(ValueError, match=f"{name} of Split"):
            restore(copy.deepcopy(model), StageRecord("prune", {}, {"sizes": {}, "attributes": {"": {name: value}}}))


class Averaging(nn.Conv2d):
    """A convolution whose forward computes with its number of channels."""

    def forward(self, x):
        return F.conv2d(x, self.weight, self.bias) / self.out_channels


def test_an_attribute_that_the_forward_computes_with_keeps_its_value():
    model = nn.Sequential(Averaging(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    pruned, record, plan = prune_model(model, PruneConfig(0.5, criterion="l2"), torch.randn(2, 3, 4, 4))
    assert plan.cut == 4 and tuple(pruned[0].weight.shape) == (4, 3, 1, 1)
    again = restore(copy.deepcopy(model), record)
    assert again[0].out_channels == pruned[0].out_channels == 8


def drop_path(x, training, kind):
    if not training:
        return x
    shape = (x.shape[0], 1, 1, 1)
    if kind == "uniform":
        return x * (0.5 + torch.rand(shape, dtype=x.dtype)).floor() / 0.5
    mask = x.new_empty(shape).bernoulli_(0.5) if kind == "path" else torch.rand_like(x).round()
    return x * mask / 0.5


class Dropping(nn.Module):
    """Noise of training mode that is written with tensor operations."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.stem, self.body, self.fc = kind, nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        return self.fc((x + drop_path(self.body(x), self.training, self.kind)).mean((2, 3)))


@pytest.mark.parametrize("kind", ["path", "elements", "uniform"])
def test_noise_of_training_mode_keeps_no_channels(kind):
    model = Dropping(kind)
    pruned, _, _ = prune_model(model, PruneConfig(0.5, criterion="l2"), IMAGES.to(torch.float32))
    assert pruned.stem.out_channels == pruned.body.out_channels == pruned.fc.in_features == 4
    assert pruned.train()(IMAGES.to(torch.float32)).shape == (len(IMAGES), 5)


class Spectrum(nn.Module):
    """Mixes frequencies with complex weights, and has real layers behind that."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Parameter(torch.randn(8, 5, dtype=torch.cfloat))
        self.inner, self.first, self.last = nn.Linear(5, 6, dtype=torch.cfloat), nn.Linear(6, 12), nn.Linear(12, 2)

    def forward(self, x):
        return self.last(self.first(self.inner(torch.fft.rfft(x) * self.mix).abs()).relu())


def test_layers_of_complex_networks_are_pruned():
    pruned, _, plan = prune_model(Spectrum(), PruneConfig(criterion="l2", percent=0.5), torch.randn(2, 8, 8))
    assert {tuple(group.layers): len(group.keep) for group in plan.groups.values()} == {
        ("inner",): 3, ("first",): 6, ("last",): 2
    }  # fmt: skip
    assert pruned(torch.randn(2, 8, 8)).shape == (2, 8, 2)


class Lines(Silent):
    def __init__(self):
        self.lines = []

    def line(self, text):
        self.lines.append(text)


@pytest.mark.parametrize(("criterion", "said"), [("bn-scale", True), ("l2", False)])
def test_a_criterion_that_ranks_few_channels_says_how_many(criterion, said):
    layers = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 1), nn.ReLU(), nn.Conv2d(12, 4, 1)
    config, lines = PruneConfig(criterion=criterion, percent=0.5), Lines()
    prune_model(nn.Sequential(*layers), config, IMAGES.float(), progress=lines)
    assert any("only 8 of 20 channels have a batch norm" in line for line in lines.lines) == said


@pytest.mark.parametrize(("norm", "chosen"), [(nn.BatchNorm2d(8), "bn-scale"), (nn.Identity(), "l2")])
def test_by_default_scales_rank_channels_only_if_all_have_one(norm, chosen):
    lines = Lines()
    model = nn.Sequential(nn.Conv2d(3, 8, 1), norm, nn.ReLU(), nn.Conv2d(8, 4, 1))
    _, record, _ = prune_model(model, PruneConfig(), IMAGES.float(), progress=lines)
    assert record.result["criterion"] == chosen
    assert any("--criterion l2" in line for line in lines.lines) == (chosen == "l2")


def test_a_layer_that_is_excluded_needs_no_batch_norm():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1))
    _, record, _ = prune_model(model, PruneConfig(exclude="2"), IMAGES.float())
    assert record.result["criterion"] == "bn-scale"


def test_a_list_of_the_layers_parameters_holds_those_of_the_pruned_layers():
    class Listed(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))
            self.every = nn.ParameterList(self.parameters())

        def forward(self, x):
            return self[2](self[1](self[0](x)))

    model = Listed()
    pruned, record, _ = prune_model(model, PruneConfig(), IMAGES.float())
    again = restore(Listed(), record)
    for network in (pruned, again):
        assert network.every[0] is network[0].weight and sum(p.numel() for p in network.parameters()) == 16 + 20
    again.load_state_dict(pruned.state_dict())


class Routed(nn.Module):
    """A layer whose weight is computed from the input, alone or beside others."""

    def __init__(self, alone):
        super().__init__()
        self.first, self.kernel, self.last = nn.Conv2d(3, 8, 1), nn.Linear(3, 27), nn.Conv2d(8, 5, 1)
        self.alone = alone

    def forward(self, x):
        y = F.conv2d(x, self.kernel(x.mean((0, 2, 3))).view(3, 1, 3, 3), groups=3)
        return y if self.alone else self.last(self.first(y))


class Blurred(nn.Module):
    """A convolution and a fixed filter."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.register_buffer("blur", torch.ones(8, 1, 2, 2) / 4)

    def forward(self, x):
        x = self.first(x)
        return F.conv2d(x, self.blur, groups=x.shape[1]).relu().mean((2, 3))


def test_a_fixed_filter_is_not_called_computed():
    why = r"\(conv2d: no layer stores its weight; .* first: conv2d in forward\(\) has a weight that no layer stores"
    with pytest.raises(MicronetError, match=why):
        prune_model(Blurred(), PruneConfig(criterion="l2", percent=0.5), IMAGES.float())


def test_layers_that_cannot_be_pruned_are_named_beside_others_and_alone():
    config, lines = PruneConfig(criterion="l2", percent=0.5), Lines()
    prune_model(Routed(alone=False), config, IMAGES.float(), progress=lines)
    assert lines.lines == ["conv2d stays whole: forward() computes its weight; only layers that store theirs are cut"]
    why = r"\(conv2d: forward\(\) computes its weight; .* kernel: .*conv2d in forward\(\) has a weight that forward\(\)"
    with pytest.raises(MicronetError, match=why):
        prune_model(Routed(alone=True), config, IMAGES.float())
    with pytest.raises(MicronetError, match=r"^last\.weight, last\.bias of the network are float16, but pruning needs"):
        model = Routed(alone=False)
        model.last.half()
        prune_model(model, config, IMAGES.float())
