"""Cut == masked on networks drawn at random from all that pruning follows, and on forwards that could mislead it.

The oracle knows nothing of the pruner: without biases and with batch norms that only scale, a channel whose producing
rows are zero is zero wherever it goes, so the whole network with such rows must give what the cut one gives.
"""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import micronet
from micronet.errors import FailedError, MicronetError
from micronet.models.attention import Attention
from micronet.models.layers import Add, ChannelShuffle
from micronet.pruning.config import PruneConfig
from micronet.pruning.prune import prune_model

WIDTHS = [4, 8, 12]
KEEPING = ("depthwise", "residual", "split", "gate", "shuffle", "pool", "prelu", "attention")  # as many channels
BLOCKS = ["conv", "grouped", "concat", "up", *KEEPING]


class Block(nn.Module):
    """One step of a random network, ``channels`` -> ``width`` maps."""

    def __init__(self, kind, channels, width):
        super().__init__()
        self.kind = kind
        keeps = kind in KEEPING
        self.width = channels if keeps else 2 * width if kind == "concat" else width
        groups = {"grouped": 4, "depthwise": channels}.get(kind, 1)
        out = channels if keeps else width
        conv = nn.ConvTranspose2d(channels, out, 2, 2, bias=False) if kind == "up" else None
        self.conv = conv or nn.Conv2d(channels, out, 3, padding=1, groups=groups, bias=False)
        self.norm, self.act, self.add = nn.BatchNorm2d(out), nn.ReLU(), Add()
        self.other = nn.Conv2d(channels, out, 1, bias=False)
        self.part = nn.Conv2d(channels // 2, channels // 2, 1, bias=False)
        self.attention = Attention.from_torch(nn.MultiheadAttention(channels, channels // 2, bias=False))
        self.shuffle, self.prelu = ChannelShuffle(2), nn.PReLU(channels)
        self.squeeze, self.excite = nn.Conv2d(channels, 4, 1, bias=False), nn.Conv2d(4, channels, 1, bias=False)

    def forward(self, x):
        if self.kind == "pool":
            return F.max_pool2d(x, 2)
        if self.kind == "shuffle":
            return self.shuffle(x)
        if self.kind == "prelu":
            return self.prelu(x)
        if self.kind == "attention":
            pixels = x.flatten(2).permute(2, 0, 1)
            return x + self.attention(pixels, pixels, pixels)[0].permute(1, 2, 0).unflatten(2, x.shape[2:])
        if self.kind == "split":
            left, right = x.chunk(2, 1)
            return torch.cat([right, self.part(left)], 1)
        if self.kind == "gate":
            return x * torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        out = self.act(self.norm(self.conv(x)))
        if self.kind == "residual":
            return self.add(out, x)
        return torch.cat([out, F.relu(self.other(x))], 1) if self.kind == "concat" else out


@st.composite
def networks(draw):
    """A stem, a few blocks, and a head that pools or flattens."""
    blocks, channels = [nn.Conv2d(3, draw(st.sampled_from(WIDTHS)), 1, bias=False)], None
    channels, size = blocks[0].out_channels, 8
    for _ in range(draw(st.integers(1, 5))):
        block = Block(draw(st.sampled_from(BLOCKS)), channels, draw(st.sampled_from(WIDTHS)))
        if block.kind == "pool" and size == 1:
            continue
        size = size // 2 if block.kind == "pool" else size * 2 if block.kind == "up" else size
        channels = block.width
        blocks.append(block)
    blocks.append(nn.Conv2d(channels, 8, 1, bias=False))
    if draw(st.booleans()):
        blocks += [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 6, bias=False), nn.ReLU(), nn.Linear(6, 5)]
    else:
        blocks += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)]
    torch.manual_seed(draw(st.integers(0, 99)))
    model = nn.Sequential(*blocks).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model


@given(networks(), st.sampled_from([0.0, 0.3, 0.5, 0.9]), st.sampled_from([1, 4]), st.sampled_from(["l2", "random"]))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_cut_equals_masked(model, percent, regular, criterion):
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    pruned, _, plan = prune_model(model, PruneConfig(percent, regular, criterion=criterion), images)
    whole = copy.deepcopy(model)
    for group in plan.groups.values():
        assert group.after == group.before or group.after % regular == 0
        for layer in group.layers:
            weight = whole.get_submodule(layer).weight.data
            rows = weight.transpose(0, 1) if isinstance(whole.get_submodule(layer), nn.ConvTranspose2d) else weight
            rows[[channel for channel in range(len(rows)) if channel not in group.keep]] = (
                0  # of a part, if it is narrower
            )
    torch.testing.assert_close(pruned(images), whole(images), rtol=1e-10, atol=1e-10)


class Misleading(nn.Module):
    """Layers for the forwards below."""

    def __init__(self, forward):
        super().__init__()
        self.c1, self.b1, self.c2 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.pool = nn.InstanceNorm2d(8, affine=True), nn.MaxPool1d(2)
        self.fc, self.part, self.c4 = nn.Linear(8, 5), nn.Linear(4, 5), nn.Conv2d(4, 8, 3, padding=1)
        self.own, self.over = nn.Parameter(torch.randn(5, 8)), nn.Conv2d(1, 1, 1)
        self._forward = [forward]

    def forward(self, x):
        stem = F.relu(self.b1(self.c1(x)))
        return self._forward[0](self, stem)

    def head(self, x):
        return self.fc(F.relu(self.c2(x)).mean(axis=(2, 3)))


def divided_by_its_width(m, x):
    return m.head(x / x.size(1))


def part_written_in_place(m, x):
    x[:, :4].mul_(2)
    return m.head(x)


def pooled_over_channels(m, x):
    return m.head(x) + m.part(m.pool(x.mean((2, 3))))


def cast_to_float32(m, x):
    return m.head(x.float()) ** 2


def instance_norm(m, x):
    return m.head(m.norm(x))


def channels_as_an_image(m, x):
    return m.head(x) + m.over(x.flatten(2).unsqueeze(1)).mean((1, 2, 3)).unsqueeze(1)


def chosen_by_where(m, x):
    return m.head(torch.where(x > 0, x, x * 0.1))


def tiny_branch(m, x):
    return m.head(x) + 1e-13 * m.fc(x.mean((2, 3)))


def other_output_in_training(m, x):
    return (m.head(x), m.fc(x.mean((2, 3)))) if m.training else m.head(x)


def halves(m, x):
    left, _ = x.chunk(2, 1)
    return m.fc(F.relu(m.c4(left)).mean((2, 3)))


def rounded_in_a_recording(m, x):
    places = torch.tensor([i / 3 for i, _ in enumerate(x)], dtype=x.dtype)  # as a detector's anchors: not symbolic
    return m.head(x) + places.sum()


def rounded_beside_own_tensors(m, x):
    return rounded_in_a_recording(m, x) + F.linear(x.mean((2, 3)), m.own)


FORWARDS = {
    divided_by_its_width: False, part_written_in_place: False, pooled_over_channels: False, cast_to_float32: True,
    instance_norm: True, chosen_by_where: True, tiny_branch: True, other_output_in_training: True, halves: True,
    rounded_in_a_recording: True, rounded_beside_own_tensors: True, channels_as_an_image: False,
}  # fmt: skip


def width_required(m, x):
    if x.size(1) != 8:
        raise ValueError("8 channels, please")
    return m.head(x)


def wide_ones_doubled(m, x):
    return m.head(2 * x if x.size(1) == 8 else x)


def width_of_another(m, x):
    n, c, h, w = x.shape
    return m.head(x) + m.fc(x.cumsum(1).mT.reshape(n, c, h, w).mean((2, 3)))


def width_of_another_and_any(m, x):
    other = m.c2(x).cumsum(1).flatten(2)
    return m.head(x) + other.reshape(len(x), x.size(1), -1).amax(1).mean(1, keepdim=True)


COUNTED = {
    width_required: "with fewer channels the network does not run (8 channels, please)",
    wide_ones_doubled: "with fewer channels the network computes wrong values", width_of_another: "cumsum",
    width_of_another_and_any: "forward() uses fixed sizes",
}  # fmt: skip


@pytest.mark.parametrize(("forward", "why"), COUNTED.items(), ids=lambda item: getattr(item, "__name__", ""))
def test_only_channels_whose_number_matters_stay_whole(forward, why):
    model = Misleading(forward).eval()
    model.fc = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5))
    config = PruneConfig(0.5, criterion="l2", scope="layer")
    pruned, _, plan = prune_model(model, config, torch.randn(2, 3, 8, 8))
    stem = next(group for group in plan.groups.values() if "c1" in group.layers)
    assert why in stem.note and pruned.c1.out_channels == 8
    assert pruned.fc[0].out_features == 3
    if why.startswith("with"):
        with pytest.raises(FailedError, match=why.replace("fewer channels", "these widths").partition(" (")[0]):
            prune_model(model, PruneConfig(widths="4,4,3", criterion="l2"), torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize(("forward", "is_cut"), FORWARDS.items(), ids=lambda item: getattr(item, "__name__", str(item)))
def test_a_forward_that_could_mislead_is_cut_rightly_or_left_whole(forward, is_cut):
    model = Misleading(forward).eval()
    pruned = micronet.prune(model, torch.randn(2, 3, 8, 8), percent=0.5, criterion="l2", scope="layer").model
    assert (pruned.c1.out_channels < 8) == is_cut


def test_a_layer_with_a_hook_is_left_whole():
    model = Misleading(instance_norm)
    model.b1.register_forward_hook(lambda module, inputs, output: output.flip(1))
    pruned = micronet.prune(model, torch.randn(2, 3, 8, 8), percent=0.5, criterion="l2").model
    assert pruned.c1.out_channels == 8 > pruned.c2.out_channels


def test_a_share_too_large_for_a_split_takes_the_smallest_width_it_has():
    model = Misleading(halves).eval()
    pruned = micronet.prune(model, torch.randn(2, 3, 8, 8), percent=0.99, criterion="l2", scope="layer").model
    assert (pruned.c1.out_channels, pruned.c4.in_channels) == (2, 1)


def test_widths_that_are_no_numbers_are_named():
    with pytest.raises(MicronetError, match=r"widths contains '4\.5'; expected integers"):
        micronet.prune(Misleading(instance_norm), torch.randn(2, 3, 8, 8), widths="4.5,4", criterion="l2")
