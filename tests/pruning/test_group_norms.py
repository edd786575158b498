"""Group norms lose whole groups of channels. ``prune_model`` itself holds each network against the masked one."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import micronet
from micronet.pruning.config import PruneConfig
from micronet.pruning.prune import prune_model

IMAGES = torch.randn(2, 3, 8, 8)


class Cast(nn.GroupNorm):
    """As in networks of mixed precision: values and weights in float."""

    def forward(self, x):
        return F.group_norm(x.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps).type_as(x)


class ByHand(nn.Module):
    """The number of groups is an attribute, and the norm a function."""

    def __init__(self, *, affine=True):
        super().__init__()
        self.groups = 8
        self.scale, self.shift = (nn.Parameter(torch.randn(32)) for _ in range(2)) if affine else (None, None)

    def forward(self, x):
        return F.group_norm(num_groups=self.groups, bias=self.shift, weight=self.scale, input=x)


class Fixed(nn.GroupNorm):
    """A number of groups that the code names."""

    def forward(self, x):
        return F.group_norm(x, 8, self.weight, self.bias)


class Computed(nn.GroupNorm):
    """A scale that the forward computes."""

    def forward(self, x):
        return F.group_norm(x, self.num_groups, self.weight.sum() * torch.ones(32))


class Transposed(nn.GroupNorm):
    """A norm over groups of pixels, and all channels."""

    def forward(self, x):
        return super().forward(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)


class Recorded(nn.GroupNorm):
    """A forward that has to be recorded."""

    def forward(self, x):
        assert len(x) > 0
        return super().forward(x)


def network(norm, *after):
    after = after or (nn.Conv2d(32, 8, 3),)
    return nn.Sequential(nn.Conv2d(3, 32, 1), norm, nn.SiLU(), *after, nn.Conv2d(8, 2, 1))


def with_random_scales(model):
    for module in model.modules():
        if isinstance(module, nn.GroupNorm) and module.affine:
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model


def pruned_by_half(model, **settings):
    torch.manual_seed(0)
    pruned, _, plan = prune_model(with_random_scales(model), PruneConfig(0.5, criterion="l2", **settings), IMAGES)
    return pruned, {layer: group for group in plan.groups.values() for layer in group.layers}


@pytest.mark.parametrize(
    ("norm", "size"),
    [
        pytest.param(nn.GroupNorm(8, 32), 4, id="groups"),
        pytest.param(nn.GroupNorm(32, 32), 1, id="one channel a group"),
        pytest.param(nn.GroupNorm(8, 32, affine=False), 4, id="no weights"),
        pytest.param(Cast(8, 32), 4, id="weights cast"),
        pytest.param(Recorded(8, 32), 4, id="recorded"),
        pytest.param(ByHand(), 4, id="function with an attribute"),
        pytest.param(ByHand(affine=False), 4, id="function without weights"),
    ],
)
def test_a_group_norm_loses_whole_groups(norm, size):
    pruned, groups = pruned_by_half(network(norm))
    kept = np.array(groups["0"].keep).reshape(-1, size)
    assert 8 <= kept.size < 32
    assert (kept % size == np.arange(size)).all()
    assert (kept // size == kept[:, :1] // size).all()
    number = pruned[1].groups if isinstance(norm, ByHand) else pruned[1].num_groups
    assert (number, pruned[0].out_channels) == (len(kept), kept.size)
    again, _ = pruned_by_half(pruned)
    assert again[0].out_channels < pruned[0].out_channels


@pytest.mark.parametrize(
    ("convs", "groups"),
    [
        ((nn.Conv2d(32, 64, 3, groups=32), nn.Conv2d(64, 8, 1)), 16),
        ((nn.Conv2d(32, 8, 3, groups=4),), 4),
        ((nn.Conv2d(32, 32, 3, groups=16), nn.Conv2d(32, 8, 1)), 8),
    ],
    ids=["depthwise", "some channels of each group", "whole groups"],
)
def test_grouped_convolutions_follow_a_group_norm(convs, groups):
    pruned, _ = pruned_by_half(network(nn.GroupNorm(8, 32), *convs), scope="layer")
    assert (pruned[1].num_groups, pruned[1].num_channels) == (4, 16)
    assert (pruned[3].groups, pruned[3].in_channels) == (groups, 16)


class Residual(nn.Module):
    def __init__(self, width, *groups):
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, width, 1), nn.Conv2d(width, width, 1), nn.Conv2d(width, 2, 1)
        self.norms = nn.ModuleList(nn.GroupNorm(number, width) for number in groups)

    def forward(self, x):
        x = self.norms[0](self.first(x))
        return self.head(F.relu(x + self.norms[1](self.second(F.relu(x)))))


def test_norms_that_a_sum_ties_lose_what_is_whole_groups_of_both():
    pruned, _ = pruned_by_half(Residual(48, 16, 12))
    assert [(norm.num_groups, norm.num_channels) for norm in pruned.norms] == [(8, 24), (6, 24)]
    model = nn.Sequential(Residual(24, 3, 2), nn.Conv2d(2, 8, 1), nn.Conv2d(8, 2, 1))
    _, groups = pruned_by_half(model)
    assert groups["0.first"].note == "stays whole: no smaller width suits the parts it is taken in"


class Joined(nn.Module):
    def __init__(self, groups):
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(3, 32, 1), nn.Conv2d(3, 16, 1), nn.GroupNorm(groups, 48)
        self.next, self.head = nn.Conv2d(48, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.head(F.relu(self.next(F.silu(self.norm(torch.cat([self.a(x), self.b(x)], 1))))))


def test_joined_tensors_are_cut_unless_a_group_spans_several():
    pruned, _ = pruned_by_half(Joined(6), scope="layer")
    assert (pruned.a.out_channels, pruned.b.out_channels) == (16, 8)
    assert (pruned.norm.num_groups, pruned.norm.num_channels) == (3, 24)
    pruned, groups = pruned_by_half(Joined(8))
    why = "norm (GroupNorm) normalizes groups of 6 channels, some of which span several joined tensors"
    assert (groups["a"].note, groups["b"].note) == (why, why)
    assert pruned.next.out_channels < 8


def test_the_smallest_width_and_the_multiple_are_in_whole_groups():
    pruned, _ = pruned_by_half(network(nn.GroupNorm(8, 32)), min_channels=22)
    assert (pruned[1].num_groups, pruned[1].num_channels) == (6, 24)
    pruned, _ = pruned_by_half(network(nn.GroupNorm(8, 32)), regular=3)
    assert pruned[1].num_channels in (12, 24)
    with pytest.raises(micronet.MicronetError, match="cannot have 6 channels; allowed: 1 to 32, a multiple of 4"):
        micronet.prune(network(nn.GroupNorm(8, 32)), IMAGES, criterion="l2", widths="6,8")


@pytest.mark.parametrize(
    ("norm", "why"),
    [
        (Fixed(8, 32), "normalizes groups of 4 channels, and forward() uses a fixed number of them"),
        (Computed(8, 32), "group_norm in forward() has a weight that is shared or computed"),
        (Transposed(8, 64), "normalizes across its channels, so none can be cut without changing others"),
    ],
    ids=["fixed number", "computed weight", "another axis"],
)
def test_channels_of_other_group_norms_stay_and_the_plan_says_why(norm, why):
    pruned, groups = pruned_by_half(network(norm))
    assert groups["0"].note.endswith(why)
    assert pruned[3].out_channels < 8


def module():
    return network(nn.GroupNorm(8, 32))


def subclass():
    return network(Recorded(8, 32))


def function():
    return network(ByHand())


@pytest.mark.parametrize("build", [module, subclass, function])
def test_a_network_with_fewer_groups_reloads_and_is_quantized(tmp_path, build):
    pruned = micronet.prune(build(), IMAGES, criterion="l2")
    micronet.save(pruned, tmp_path / "a.safetensors", build=f"tests.pruning.test_group_norms:{build.__name__}")
    again = micronet.load(tmp_path / "a.safetensors", build())
    assert torch.equal(again.model.eval()(IMAGES), pruned.model.eval()(IMAGES))
    int8 = micronet.quantize(again, data=[IMAGES], mode="ptq").model
    assert torch.isfinite(int8.eval()(IMAGES)).all()
