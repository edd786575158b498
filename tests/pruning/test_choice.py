"""What is cut: criteria, scopes, targets, widths; each by its law."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import micronet
from micronet import registry
from micronet.errors import FailedError, MicronetError
from micronet.evaluation.cost import count_macs
from micronet.models.build import ModelSpec, build_model
from micronet.pruning.config import PruneConfig
from micronet.pruning.criteria import bn_scale, l2
from micronet.pruning.groups import find_groups
from micronet.pruning.prune import prune_model

IMAGES = torch.randn(2, 3, 32, 32)


def pair():
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3))


def scores(criterion, model, images=IMAGES):
    return registry.resolve(registry.CRITERIA, criterion, "criterion").scores(model, find_groups(model, images))[0]


@pytest.mark.parametrize("criterion", [name for name in registry.CRITERIA if name != "taylor"])
def test_every_criterion_prunes_and_says_the_same_twice(criterion):
    model = build_model(ModelSpec("nin", {"width": 0.25})).eval()
    one, _, plan = prune_model(model, PruneConfig(0.4, criterion=criterion), IMAGES)
    two, _, _ = prune_model(model, PruneConfig(0.4, criterion=criterion), IMAGES)
    assert plan.cut == plan.requested > 0
    assert torch.equal(one(IMAGES), two(IMAGES))


def test_filters_are_judged_by_their_papers_formulas():
    model = pair()
    rows = model[0].weight.detach().double().flatten(1).numpy()
    expected = {
        "l1": np.abs(rows).sum(1),
        "l2": np.sqrt((rows**2).sum(1)),
        "fpgm": np.array([sum(np.sqrt(((a - b) ** 2).sum()) for b in rows) for a in rows]),
        "bn-scale": model[1].weight.detach().abs().numpy(),
    }
    for criterion, worth in expected.items():
        np.testing.assert_allclose(scores(criterion, model), worth / worth.mean(), rtol=1e-6)


def test_taylor_scores_are_the_square_of_weight_times_gradient_and_need_gradients():
    model = pair()
    with pytest.raises(MicronetError, match="no gradient"):
        scores("taylor", model)
    model(IMAGES).square().mean().backward()
    product = (model[0].weight.double() * model[0].weight.grad.double()).detach().flatten(1).sum(1).square().numpy()
    np.testing.assert_allclose(scores("taylor", model), product / product.mean(), rtol=1e-6)


@pytest.mark.parametrize(("criterion", "slope"), [
    ("l1", lambda rows: rows.sign()), ("l2", lambda rows: rows / rows.norm(dim=1, keepdim=True) * 27**0.5),
])  # fmt: skip
def test_a_penalty_adds_its_subgradient_to_what_may_be_cut_alone(criterion, slope):
    model = pair()
    penalty = registry.resolve(registry.CRITERIA, criterion, "criterion").penalty
    model(IMAGES).square().mean().backward()
    before = [model[0].weight.grad.clone(), model[3].weight.grad.clone()]
    penalty(model, find_groups(model, IMAGES), 0.01)()
    pushed = 0.01 * slope(model[0].weight.detach().flatten(1)).view_as(model[0].weight)
    torch.testing.assert_close(model[0].weight.grad, before[0] + pushed)
    assert torch.equal(model[3].weight.grad, before[1])  # its channels are the output


def test_layers_without_batch_norms_are_judged_by_their_weights():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))
    with pytest.raises(MicronetError, match=r"no batch norm with a scale follows it; .*criterion=\"l2\""):
        micronet.prune(model, IMAGES, criterion="bn-scale")
    assert micronet.prune(model, IMAGES, scope="layer").model[2].out_channels == 4


def test_the_layer_scope_cuts_the_same_share_of_every_layer():
    model = build_model(ModelSpec("nin", {"width": 0.5})).eval()
    _, _, plan = prune_model(model, PruneConfig(0.25, criterion="l2", scope="layer"), IMAGES)
    shares = [group.after / group.before for group in plan.groups.values()][:-1]
    assert all(0.75 <= share <= 0.78 for share in shares)


@pytest.mark.parametrize("target", ["target_macs", "target_params"])
def test_a_target_is_met_and_hardly_more(target):
    model = build_model(ModelSpec("nin", {"width": 0.25})).eval()
    pruned, _, _ = prune_model(model, PruneConfig(criterion="l2", **{target: 0.5}), IMAGES)

    def cost(network):
        if target == "target_macs":
            return count_macs(network, IMAGES[:1])
        return sum(p.numel() for p in network.parameters())

    assert 0.48 < cost(pruned) / cost(model) <= 0.5
    with pytest.raises(FailedError, match="cannot be met"):
        prune_model(model, PruneConfig(criterion="l2", min_channels=16, **{target: 0.01}), IMAGES)


def test_a_cost_of_ones_own_is_met():
    model = build_model(ModelSpec("nin", {"width": 0.25})).eval()
    seen = []

    def widest(network):
        seen.append(max(m.out_channels for m in network.modules() if isinstance(m, nn.Conv2d)))
        return seen[-1]

    prune_model(model, PruneConfig(criterion="l2", scope="layer", target_latency=0.5), IMAGES, widest)
    assert len(seen) > 3
    with pytest.raises(MicronetError, match="requires cost; pass a function"):
        prune_model(model, PruneConfig(target_latency=0.5), IMAGES)


def test_widths_are_taken_as_they_are_or_refused_with_the_reason():
    model = build_model(ModelSpec("nin_gc", {})).eval()
    # What the micronet of 2021 printed for its pruned nin_gc, brought to what its groups allow.
    pruned, _, plan = prune_model(model, PruneConfig(widths="154 162 144 304 320 320 608 584"), IMAGES)
    assert [group.after for group in plan.groups.values()][:8] == [154, 162, 144, 304, 320, 320, 608, 584]
    assert pruned(IMAGES).shape == (2, 10)
    with pytest.raises(MicronetError, match=r"needs 8 \(current widths: 256"):
        prune_model(model, PruneConfig(widths="154,162"), IMAGES)
    with pytest.raises(MicronetError, match="cannot have 155 channels; allowed: 1 to 256, a multiple of 2"):
        prune_model(model, PruneConfig(widths="155 162 144 304 320 320 608 584"), IMAGES)


def test_excluded_layers_and_small_ones_stay_whole():
    model = build_model(ModelSpec("nin", {"width": 0.25})).eval()
    _, _, plan = prune_model(model, PruneConfig(0.5, exclude="features.[12].*", min_channels=30), IMAGES)
    by_layer = {group.layers[0]: group for group in plan.groups.values()}
    assert by_layer["features.1.conv"].note == "excluded"
    assert by_layer["features.1.conv"].after == by_layer["features.1.conv"].before
    assert all(group.after >= min(30, group.before) for group in plan.groups.values())
    with pytest.raises(MicronetError, match="exclude"):
        prune_model(model, PruneConfig(0.5, exclude="nothing*"), IMAGES)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target_macs": 1.5}, "between 0 and 1|more than 0 and less than 1"),
        ({"target_macs": 0.5, "target_params": 0.5}, "use only one"),
        ({"percent": 0.3, "target_params": 0.5}, "use only one"),
        ({"criterion": "magic"}, "criterion"),
        ({"min_channels": 0}, "min-channels"),
    ],
)
def test_impossible_choices_are_refused(config, message):
    with pytest.raises(MicronetError, match=message):
        PruneConfig(**config)


def test_steps_cut_together_what_one_step_would():
    parts = PruneConfig(0.5).share_per_step(3)
    assert (1 - parts.percent) ** 3 == pytest.approx(0.5)
    assert PruneConfig(target_macs=0.25).share_per_step(2).target_macs == 0.5
    with pytest.raises(MicronetError, match="single step"):
        PruneConfig(widths="1,2").share_per_step(2)


class Gated(nn.Module):
    """Several inputs and outputs; squeeze-and-excitation; a split, each half on its own way; attention aside."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.left, self.right = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1)
        self.head, self.mask = nn.Linear(24, 5), nn.Conv2d(24, 1, 1)
        self.of_other = nn.Linear(7, 24)

    def forward(self, x, other, scale=2.0):
        x = F.relu(self.bn(self.stem(x)))
        x = x * torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        a, b = x.chunk(2, dim=1)
        y = torch.cat([F.relu(self.left(a)), F.relu(self.right(b))], 1) * scale
        return {"classes": self.head(y.mean((2, 3)) + self.of_other(other).relu()), "mask": self.mask(y)}


def test_several_inputs_and_outputs_gates_and_splits():
    model = Gated().eval()
    example = torch.randn(2, 3, 8, 8), torch.randn(2, 7)
    pruned = micronet.prune(model, example, percent=0.5, criterion="l2", scope="layer").model
    assert pruned.stem.out_channels == 8
    assert pruned.squeeze.out_channels == 2
    assert pruned.left.in_channels + pruned.right.in_channels == 8
    assert pruned(*example)["mask"].shape == (2, 1, 8, 8)


class Attention(nn.Module):
    """A block of a transformer: what attention and norms read stays, the hidden layer goes."""

    def __init__(self):
        super().__init__()
        self.patches, self.norm = nn.Conv2d(3, 16, 4, 4), nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.up, self.down, self.head = nn.Linear(16, 64), nn.Linear(64, 16), nn.Linear(16, 3)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + self.attention(self.norm(x), self.norm(x), self.norm(x), need_weights=False)[0]
        return self.head((x + self.down(F.gelu(self.up(x)))).mean(1))


def test_a_transformers_hidden_layers_are_cut_and_the_rest_is_named():
    model = Attention().eval()
    pruned, _, plan = prune_model(model, PruneConfig(0.5, scope="layer", criterion="l2"), torch.randn(2, 3, 16, 16))
    assert (pruned.up.out_features, pruned.down.in_features) == (32, 32)
    whole = next(group for group in plan.groups.values() if "patches" in group.layers)
    assert "norm" in whole.note


def test_the_line_that_cannot_be_traced_is_named():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 1)

        def forward(self, x):
            return self.conv(x) if x.sum() > 0 else x

    with pytest.raises(MicronetError, match=r"test_choice\.py:\d+ \(return self\.conv"):
        micronet.prune(Branches(), IMAGES)
    with pytest.raises(MicronetError, match="cannot run on the example"):
        micronet.prune(pair(), torch.randn(2, 4, 8, 8))


@pytest.mark.parametrize("regular", [1, 8])
def test_convolutions_of_many_groups_lose_whole_groups(regular):
    model = nn.Sequential(
        nn.Conv2d(3, 104, 1), nn.BatchNorm2d(104), nn.ReLU(), nn.Conv2d(104, 104, 3, padding=1, groups=13),
        nn.BatchNorm2d(104), nn.ReLU(), nn.Conv2d(104, 5, 1),
    ).eval()  # fmt: skip
    nn.init.uniform_(model[1].weight)
    pruned, _, plan = prune_model(model, PruneConfig(0.5, regular=regular), IMAGES)
    assert (pruned[0].out_channels, pruned[3].groups, pruned[3].out_channels) == (56, 7, 56)
    assert [len(group.layers) for group in plan.groups.values()] == [2, 1]
    kept = np.array(plan.groups[0].keep).reshape(7, 8)
    assert (kept == kept[:, :1] + np.arange(8)).all()
    assert torch.equal(pruned[3].weight, model[3].weight[plan.groups[0].keep])
    again, _, _ = prune_model(pruned, PruneConfig(0.5, regular=8), IMAGES)
    assert again[3].groups == 4


def test_equal_scores_cost_every_layer_the_same_share():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 2, 1),
    )  # fmt: skip
    pruned = micronet.prune(model, IMAGES).model  # untrained: every scale is 1
    assert (pruned[0].out_channels, pruned[3].out_channels) == (4, 8)


def test_a_note_is_made_once_and_a_width_names_the_layer_that_forbids_it():
    model = nn.Sequential(
        nn.Conv2d(3, 24, 1), nn.Conv2d(24, 24, 1, groups=4), nn.Conv2d(24, 24, 1, groups=6), nn.Conv2d(24, 2, 1)
    )
    _, _, plan = prune_model(model, PruneConfig(criterion="l2"), IMAGES)
    for group in plan.groups.values():
        notes = group.note.split("; ")
        assert len(notes) == len(set(notes))
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, groups=2), nn.Conv2d(8, 2, 1))
    with pytest.raises(MicronetError, match="a multiple of 2 for the groups of 1"):
        micronet.prune(model, IMAGES, criterion="l2", widths="3,4")


@pytest.mark.parametrize("other", [{"target_params": 0.5}, {"widths": "3"}])
def test_the_usual_share_given_beside_another_way_is_refused(other):
    with pytest.raises(MicronetError, match=r"--percent and --.* both set how much to prune"):
        PruneConfig(percent=0.5, **other)


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(8), nn.GroupNorm(1, 8), nn.RMSNorm(8)], ids=lambda norm: type(norm).__name__
)
def test_what_a_norm_reads_stays_whole_and_the_plan_says_why(norm):
    class Normalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.norm, self.wide, self.head = nn.Linear(4, 8), norm, nn.Linear(8, 16), nn.Linear(16, 2)

        def forward(self, x):
            return self.head(F.relu(self.wide(self.norm(self.embed(x)))))

    _, _, plan = prune_model(Normalised(), PruneConfig(criterion="l2"), torch.randn(3, 4))
    kept = next(group for group in plan.groups.values() if group.layers == ["embed"])
    note = "normalizes across its channels, so none can be cut without changing others"
    assert kept.note == f"norm ({type(norm).__name__}) {note}"


@pytest.mark.parametrize("way", [{"percent": 0.97}, {"target_params": 0.5}], ids=str)
def test_a_layer_gated_by_one_channel_never_gets_as_narrow_as_the_gate(way):
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.gate = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 1, 1)
            self.next, self.head = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 2, 1)

        def forward(self, x):
            x = self.conv(x)
            return self.head(F.relu(self.next(x * self.gate(x).sigmoid())))

    pruned = micronet.prune(Gated(), IMAGES, criterion="l2", **way).model  # held against the whole one in there
    assert pruned.gate.out_channels == 1 < pruned.conv.out_channels < 16
    assert pruned(IMAGES).shape == (2, 2, 32, 32)


def test_a_target_of_macs_counts_functional_calls_and_takes_any_input():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.up, self.down = nn.Embedding(10, 8), nn.Linear(8, 64), nn.Linear(64, 4)

        def forward(self, tokens):
            return self.down(F.relu(self.up(self.table(tokens)))).mean(1)

    tokens = torch.zeros(2, 5, dtype=torch.int64)
    pruned = micronet.prune(Words(), tokens, criterion="l2", target_macs=0.5).model
    assert pruned.up.out_features == 32


@pytest.mark.parametrize("gate", [lambda x: F.glu(x, 1), lambda x: torch.mul(*x.chunk(2, 1))])
def test_the_scores_of_a_gate_are_those_of_both_halves_and_of_what_follows(gate):
    class Gates(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.bn = nn.Conv2d(3, 32, 1, bias=False), nn.BatchNorm2d(32)
            self.dw, self.after, self.head = nn.Conv2d(16, 16, 3, groups=16), nn.BatchNorm2d(16), nn.Linear(16, 5)

        def forward(self, x):
            return self.head(self.after(self.dw(gate(self.bn(self.stem(x))))).mean((2, 3)))

    net = Gates().eval()
    for norm in (net.bn, net.after):
        nn.init.normal_(norm.weight)
    channels = find_groups(net, torch.randn(2, 3, 8, 8))
    both = [net.bn.weight.abs(), net.after.weight.abs().repeat(2)]
    rows = [layer.weight.flatten(1).norm(dim=1) for layer in (net.stem, net.dw)]
    rows = [each / each.mean() for each in rows]
    for criterion, parts in ((bn_scale, both), (l2, [rows[0], rows[1].repeat(2)])):
        found = criterion.scores(channels.network.model, channels)
        scores = next(values for group, values in found.items() if channels.groups[group].layers == ["stem"])
        np.testing.assert_allclose(scores, sum(parts).detach() / 2, rtol=1e-6)


class Transforms(nn.Module):
    """Multiplies points by a matrix of some rows that it predicts."""

    def __init__(self, rows):
        super().__init__()
        self.rows, self.hidden, self.matrix = rows, nn.Linear(3, 8), nn.Linear(8, 3 * rows)
        self.last = nn.Conv1d(rows, 4, 1)

    def forward(self, x):
        y = self.matrix(self.hidden(x.mean(2)).relu())
        return self.last(torch.bmm(y.view(x.size(0), self.rows, 3), x)).mean(2)


@pytest.mark.parametrize(
    ("rows", "after", "note"), [(3, 6, "suits the parts"), (2, 6, "stays whole: no smaller width")]
)
def test_a_width_that_does_not_suit_goes_to_the_next_or_stays_whole_and_the_note_says_so(rows, after, note):
    torch.manual_seed(0)
    config = PruneConfig(percent=0.6, criterion="l2", scope="layer")
    _, _, plan = prune_model(Transforms(rows).eval(), config, torch.randn(2, 3, 5))
    [group] = [group for group in plan.groups.values() if group.layers == ["matrix"]]
    assert group.after == after and note in group.note and ("whole" in group.note) == (after == group.before)
