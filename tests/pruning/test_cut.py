"""Cut == masked: the pruned network computes what the whole one does with the cut channels' readers' weights at 0."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from micronet.artifact.artifact import load, save
from micronet.models.build import ModelSpec, build_model
from micronet.models.layers import Add, ChannelShuffle
from micronet.pruning.config import PruneConfig
from micronet.pruning.groups import find_groups
from micronet.pruning.prune import prune_model, restore

ACTIVATIONS = (nn.ReLU, nn.Sigmoid, nn.SiLU)  # a sigmoid of a silenced channel is 0.5, so it is readers that count


def randomise(model):
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.double().eval()


def random_network(seed):
    """A sequential network of plain, grouped and depthwise convolutions, shuffles, pools; or with linear layers."""
    draw = random.Random(seed)
    layers, channels, groups = [], 3, 1
    for index in range(draw.randint(2, 5)):
        if draw.random() < 0.25 and index:
            layers += [nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=draw.random() < 0.5)]
            layers += [nn.BatchNorm2d(channels)]
        if groups > 1 and draw.random() < 0.7:
            layers.append(ChannelShuffle(groups))
        after = draw.choice([g for g in (1, 1, 2, 4) if channels % g == 0])
        width = draw.choice([12, 16, 24, 32])
        layers += [nn.Conv2d(channels, width, draw.choice([1, 3]), padding=1, groups=after, bias=draw.random() < 0.5)]
        layers += [nn.BatchNorm2d(width), draw.choice(ACTIVATIONS)()]
        if draw.random() < 0.3:
            layers.append(draw.choice([nn.MaxPool2d(2, 1), nn.AvgPool2d(2, 1), nn.PReLU(width)]))
        channels, groups = width, after
    if draw.random() < 0.5:
        layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, 20), nn.BatchNorm1d(20), nn.ReLU()]
        layers += [nn.Dropout(), nn.Linear(20, 5)]
    else:
        layers += [nn.Conv2d(channels, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers)


def silence(model, plan):
    """Return the whole network with zeros where layers read cut channels, found by sending masks through it.

    The oracle knows nothing of channel numbers: shuffles, flattening and the like are run on the mask as data.
    """
    masked = copy.deepcopy(model)
    kept = {layer: group.keep for group in plan.groups.values() for layer in group.layers}
    mask = None
    for name, module in model.named_children():
        reader = masked.get_submodule(name)
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            depthwise = isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1
            if depthwise:
                continue
            if mask is not None:
                _zero_columns(reader, mask)
            mask = torch.zeros(1, module.weight.shape[0], *([3, 3] if isinstance(module, nn.Conv2d) else []))
            mask[:, kept[name]] = 1
        elif isinstance(module, (ChannelShuffle, nn.Flatten, nn.AdaptiveAvgPool2d)):
            mask = module(mask)
    return masked


def _zero_columns(layer, mask):
    keep = mask.flatten(2).amax(2)[0] if mask.dim() == 4 else mask[0]
    groups = getattr(layer, "groups", 1)
    width = layer.weight.shape[1]
    rows = layer.weight.shape[0] // groups
    for group in range(groups):
        columns = keep[group * width : (group + 1) * width].view(1, -1, *[1] * (layer.weight.dim() - 2))
        layer.weight.data[group * rows : (group + 1) * rows] *= columns


@pytest.mark.parametrize("seed", range(60))
def test_cut_equals_masked_on_random_networks(seed):
    torch.manual_seed(seed)
    model = randomise(random_network(seed))
    draw = random.Random(seed)
    config = PruneConfig(draw.choice([0.0, 0.2, 0.5, 0.8, 0.97]), draw.choice([1, 1, 2, 4, 8]))
    pruned, record, plan = prune_model(model, config, torch.randn(2, 3, 9, 9))
    images = torch.randn(3, 3, 9, 9, dtype=torch.float64)
    expected = silence(model, plan)(images)
    torch.testing.assert_close(pruned(images), expected, rtol=1e-10, atol=1e-12)
    again = restore(random_network(seed).double().eval(), record)
    again.load_state_dict(pruned.state_dict())
    assert torch.equal(again(images), pruned(images))
    for group in plan.groups.values():
        assert len(set(group.keep)) == group.after <= group.before
    if config.percent == 0:
        assert plan.requested == 0
    pruned.train()(images).sum().backward()  # and it goes on training
    for module in pruned.modules():
        if isinstance(module, nn.Conv2d) and module.weight.shape[0] > 5 and module.groups != module.in_channels:
            assert module.out_channels % config.regular == 0 or module.out_channels in (12, 20)


@pytest.mark.parametrize(
    ("name", "width", "regular"),
    [("nin", 0.5, 1), ("nin", 0.5, 8), ("nin_gc", 0.5, 8), ("nin_gc", 0.5, 16), ("nin_gc", 1.0, 1), ("nin_gc", 0.1, 1),
     ("nin_gc", 0.1, 16)],
)  # fmt: skip
def test_cut_equals_masked_on_nin(name, width, regular):
    model = randomise(build_model(ModelSpec(name, {"width": width})))
    flat = nn.Sequential()
    for layer in model.features:
        if isinstance(layer, (ChannelShuffle, nn.MaxPool2d)):
            flat.append(layer)
        else:
            flat.extend([layer.conv, layer.bn, layer.relu])
    flat.extend([model.pool, nn.Flatten()])
    pruned, _, plan = prune_model(flat, PruneConfig(0.4, regular), torch.randn(2, 3, 32, 32))
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(pruned(images), silence(flat, plan)(images), rtol=1e-10, atol=1e-12)
    own, _, same = prune_model(model, PruneConfig(0.4, regular), torch.randn(2, 3, 32, 32))
    assert [group.keep for group in same.groups.values()] == [group.keep for group in plan.groups.values()]
    torch.testing.assert_close(own(images), pruned(images), rtol=1e-10, atol=1e-12)
    if width == 1.0 and regular == 1:
        units = [2, 2, 16, 16, 4, 32, 32, 8]
        widths = [group.after for group in plan.groups.values()][:-1]
        assert all(after % unit == 0 for after, unit in zip(widths, units, strict=True))
        assert widths != [group.before for group in plan.groups.values()][:-1]


class Residual(nn.Module):
    """Channels added to one another, strung together, flattened by a view: what functional code does."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)
        self.left, self.bn_left = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.add = Add()
        self.wide, self.bn_wide = nn.Conv2d(16, 24, 1), nn.BatchNorm2d(24)
        self.after, self.bn_after = nn.Conv2d(40, 16, 1), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16 * 4, 5)

    def forward(self, x):
        x = F.relu(self.bn(self.stem(x)))
        x = F.relu(self.add(self.bn_left(self.left(x)), x))
        x = torch.cat([x, torch.relu(self.bn_wide(self.wide(x)))], 1)
        x = F.adaptive_avg_pool2d(F.relu(self.bn_after(self.after(x))), 2)
        return self.fc(x.view(x.size(0), -1))


def test_cut_equals_masked_through_adds_and_concatenations():
    model = randomise(Residual())
    pruned, _, plan = prune_model(model, PruneConfig(0.5), torch.randn(2, 3, 8, 8))
    groups = {tuple(group.layers): group for group in plan.groups.values()}
    joint, wide, after = (groups[key].keep for key in (("stem", "left"), ("wide",), ("after",)))
    assert min(16 - len(joint), 24 - len(wide), 16 - len(after)) > 0
    masked = copy.deepcopy(model)

    def only(kept, total):
        return torch.tensor([float(index in kept) for index in range(total)]).double()

    masked.left.weight.data *= only(joint, 16).view(1, -1, 1, 1)
    masked.wide.weight.data *= only(joint, 16).view(1, -1, 1, 1)
    masked.after.weight.data *= torch.cat([only(joint, 16), only(wide, 24)]).view(1, -1, 1, 1)
    masked.fc.weight.data *= only(after, 16).repeat_interleave(4)
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(pruned(images), masked(images), rtol=1e-10, atol=1e-12)


class Written(nn.Module):
    """A network whose forward writes a size down, which cutting would break."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8 * 36, 5)
        self.other, self.bn_other = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 5, 1)

    def forward(self, x):
        other = self.last(F.relu(self.bn_other(self.other(x)))).mean((2, 3))
        return self.fc(F.relu(self.bn(self.conv(x))).view(-1, 8 * 36)) + other


def test_unsupported_operations_leave_channels_whole_and_are_named():
    model = randomise(Written())
    pruned, _, plan = prune_model(model, PruneConfig(0.5), torch.randn(2, 3, 8, 8))
    notes = {tuple(group.layers): (group.before, group.after, group.note) for group in plan.groups.values()}
    assert notes["conv",] == (8, 8, "fc uses it after a reshape to a fixed shape")
    assert notes["other",][:2] == (8, 4)
    assert pruned(torch.randn(2, 3, 8, 8).double()).shape == (2, 5)


def test_tied_scales_and_every_share_give_the_exact_count():
    model = randomise(build_model(ModelSpec("nin", {"widths": [16, 12, 8, 16, 16, 16, 16, 16]})))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    total = 116
    for hundredths in range(0, 100, 7):
        pruned, _, plan = prune_model(model, PruneConfig(hundredths / 100), torch.randn(2, 3, 32, 32))
        asked = hundredths * total // 100
        assert plan.total == total
        assert plan.requested == asked
        assert plan.cut == min(asked, total - 8)
        widths = [block.conv.out_channels for block in pruned.features if hasattr(block, "conv")]
        assert widths[:-1] == [group.after for group in plan.groups.values()][:-1]
        assert min(widths) >= 1
    assert any("limited by the minimum" in group.note for group in plan.groups.values())


def test_the_weakest_channels_go_by_magnitude():
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)))
    model[1].weight.data = torch.tensor([-3.0, 0.5, -0.1, 2.0]).double()
    _, _, plan = prune_model(model, PruneConfig(0.5), torch.randn(2, 3, 8, 8))
    assert plan.groups[0].keep == [0, 3]


def test_regular_widths_round_to_the_nearest_multiple_ties_up_within_what_there_is():
    model = randomise(
        nn.Sequential(
            nn.Conv2d(3, 24, 1), nn.BatchNorm2d(24), nn.ReLU(),
            nn.Conv2d(24, 24, 1), nn.BatchNorm2d(24), nn.ReLU(),
            nn.Conv2d(24, 20, 1), nn.BatchNorm2d(20), nn.ReLU(),
            nn.Conv2d(20, 5, 1), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 2, 1),
        )
    )  # fmt: skip
    for index, weak in ((1, 12), (4, 13), (7, 1), (10, 4)):
        scale = torch.full((model[index].num_features,), 2.0).double()
        scale[:weak] = 0.01
        model[index].weight.data = scale
    _, _, plan = prune_model(model, PruneConfig(26.5 / 68, regular=8), torch.randn(2, 3, 4, 4))
    widths = {group.before: group for group in plan.groups.values()}
    assert [group.after for group in plan.groups.values()] == [16, 8, 16, 5, 2]
    assert "too few for a multiple of 8" in widths[5].note


def test_pruning_a_pruned_artifact_again_reloads(tmp_path, micronet, chain):
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    assert micronet("prune", chain / "float.safetensors", "--percent", 0.3, "-o", first).code == 0
    assert micronet("prune", first, "--percent", 0.3, "-o", second).code == 0
    images = torch.randn(2, 3, 32, 32)
    for path in (first, second):
        artifact = load(path)
        again = tmp_path / f"again-{path.name}"
        save(artifact, again)
        assert torch.equal(load(again).model.eval()(images), artifact.model.eval()(images))
    assert first.stat().st_size > second.stat().st_size


def test_a_flow_run_again_with_the_same_widths_is_the_same():
    channels = find_groups(build_model(ModelSpec("nin_gc", {"width": 0.25})), torch.randn(2, 3, 32, 32))
    again = channels.with_widths({number: group.width for number, group in channels.groups.items()})
    for name, layer in channels.layers.items():
        assert np.array_equal(layer.outputs, again.layers[name].outputs)


@pytest.mark.parametrize("sizes", [{"conv9": {"in_channels": 3}}, {"features.0.conv": {"stride": 2}}])
def test_a_record_that_does_not_fit_is_refused(tmp_path, micronet, chain, sizes):
    from micronet.artifact.header import StageRecord

    artifact = load(chain / "float.safetensors")
    save(artifact.after(StageRecord("prune", {}, {"sizes": sizes})), tmp_path / "a.safetensors")
    done = micronet("evaluate", tmp_path / "a.safetensors")
    assert done.code == 2
    assert "prune record does not match" in done.err
