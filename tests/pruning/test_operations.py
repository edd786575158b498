"""Operations between two layers: those that compute each channel from itself alone keep none of them.

One network has a pair of layers around each operation, so that it is traced once. The oracle sets the columns of the
second layer to zero that belong to the channels cut from the first.
"""

import copy
from inspect import signature

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from micronet.errors import MicronetError
from micronet.pruning.config import PruneConfig
from micronet.pruning.prune import prune_model
from micronet.pruning.traced_network import trace_network

IMAGES = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
CONFIG = PruneConfig(0.5, criterion="l2", scope="layer")
MATRIX = torch.linspace(-1, 1, 64, dtype=torch.float64).view(8, 8)


@torch.fx.wrap
def limit(x):
    """Change only what is large, as gradient clipping does."""
    norm = x.norm(dim=1, keepdim=True)
    return torch.where(norm > 1000, x * 1000 / norm.clamp(min=1), x)


# With y, the first layer's output, z, another layer's, g, one channel of a third one's, and x, the input.
CHANNELWISE = {
    "max": lambda y: torch.max(y, 3)[0].unsqueeze(3) + y.min(dim=3, keepdim=True).values,
    "order": lambda y: y.median(3, keepdim=True)[0] + y.topk(3, dim=3)[0] + y.kthvalue(3, 3, True)[0],
    "sorted": lambda y: y.sort(3)[0] * y.argsort(3) + torch.sort(y, dim=3, descending=True).values,
    "places": lambda y: y * y.argmax(3, keepdim=True) + y.argmin(2, keepdim=True),
    "softmax": lambda y: F.log_softmax(y, 3) + y.softmax(2) + F.softmin(y, 3),
    "einsum": lambda y: torch.einsum("nchw,nc...->n c h w", y, y.mean((2, 3))),
    "einsum_of_two": lambda y, z: torch.einsum("nchw,nchv->nchv", [y, z]),
    "einsum_with_a_matrix": lambda y: torch.einsum("nchw,hv->ncvw", y, MATRIX),
    "norms": lambda y: torch.linalg.vector_norm(y, dim=(2, 3), keepdim=True) + y.norm(2, (2, 3), True),
    "normalized": lambda y: F.normalize(y.flatten(2), dim=2).unsqueeze(3) + F.layer_norm(y, (8, 8)).mean(
        (2, 3), keepdim=True)[..., :1],
    "running": lambda y: y.cumsum(3) + torch.cummax(y, 2)[0] + torch.logcumsumexp(y, 3),
    "statistics": lambda y: y.std((2, 3), keepdim=True) + torch.var_mean(y, (2, 3), keepdim=True)[0],
    "normalized_by_hand": lambda y: (y - y.mean((2, 3), True)) / (y.var((2, 3), keepdim=True) + 1).sqrt(),
    "similar": lambda y, z: F.cosine_similarity(y, z, dim=3).unsqueeze(3) + y.logsumexp((2, 3), keepdim=True),
    "windows": lambda y: F.fold(F.unfold(y, 2, stride=2), (8, 8), 2, stride=2) + y.unfold(2, 8, 1).sum(4),
    "sampled": lambda y, x: F.grid_sample(
        y, F.affine_grid(x.mean((2, 3))[:, :2, None].expand(2, 2, 3), y.size(), False), align_corners=False),
    "moved": lambda y: torch.roll(y, (1, 1), (2, 3)) + torch.rot90(y, 1, (2, 3)),
    "split": lambda y: y.tensor_split(2, 1)[0].tile(1, 2, 1, 1) + y,
    "shuffled": lambda y: F.channel_shuffle(F.channel_shuffle(y, 2), y.shape[1] // 2),
    "chosen": lambda y, z, g: torch.where(g > 0, y, -z) + y.masked_fill(y < 0, 0.5) + y.clamp(min=z).clamp_max(1),
    "gathered": lambda y, z: y.gather(3, z.argsort(3)) + torch.zeros_like(y).scatter(3, y.argsort(3), y),
    "indexed": lambda y: y[:, :, torch.tensor([3, 0, 2])].mean(2, True) + y.index_select(3, torch.tensor([1])),
    "functions": lambda y: torch.sin(y) + torch.log1p(y.exp()) + F.selu(y) % 1 + F.softsign(y) + y // 0.5,
    "several": lambda y, z: torch.addcmul(y, y, z) + torch.lerp(y, z, 0.3) + torch.atan2(y, z),
    "logic": lambda y, z: y * ((y > 0) & (y < 1)) * torch.logical_or(y > z, y != z) + torch.isnan(y),
    "unpooled": lambda y: F.max_unpool2d(*F.max_pool2d(y, 2, return_indices=True), 2),
    "pooled": lambda y: F.lp_pool2d(y, 2, 2) + F.max_pool2d(y, 2, return_indices=True)[0],
    "spectrum": lambda y: torch.fft.irfft2(torch.fft.rfft2(y) * 2, s=(8, 8)) + torch.fft.fft(y).real,
    "expanded": lambda y, z, g: y * g.expand_as(y) + z * g.expand(-1, y.shape[1], -1, -1),
    "context": lambda y, g: y + (y.flatten(2)[:, None] @ g.flatten(2).softmax(2)[..., None]).view(2, -1, 1, 1),
    "written": lambda y: F.leaky_relu_(y.clone().clamp_(-1, 1), 0.1),
    "repeated": lambda y: y.repeat_interleave(2, 1),
    "unfolded": lambda y: F.unfold(y, 3, padding=1).unsqueeze(3),
    "to_space": lambda y: F.pixel_shuffle(y, 2),
    "to_space_by_hand": lambda y: y.view(2, -1, 2, 2, 8, 8).permute(0, 1, 4, 2, 5, 3).reshape(2, -1, 16, 16),
}  # fmt: skip
READ = {"repeated": 16, "unfolded": 72, "to_space": 2, "to_space_by_hand": 2}  # channels of the second layer, if not 8


class Between(nn.Module):
    """A pair of layers around each of some operations, and the other layers that these read."""

    def __init__(self, operations):
        super().__init__()
        self._operations = [operations]
        self.first = nn.ModuleDict({name: nn.Conv2d(3, 8, 3, padding=1) for name in operations})
        self.other = nn.ModuleDict(
            {name: nn.Conv2d(3, 8, 3, padding=1) for name in operations if self._reads(name, "z")}
        )
        self.gate = nn.ModuleDict({name: nn.Conv2d(3, 1, 1) for name in operations if self._reads(name, "g")})
        self.last = nn.ModuleDict({name: nn.Conv2d(READ.get(name, 8), 4, 1) for name in operations})

    def _reads(self, name, tensor):
        return tensor in signature(self._operations[0][name]).parameters

    def forward(self, x):
        layers = {"y": self.first, "z": self.other, "g": self.gate}
        results = []
        for name, run in self._operations[0].items():
            given = {key: x if key == "x" else layers[key][name](x) for key in signature(run).parameters}
            results.append(self.last[name](run(**given)).mean((2, 3)))
        return sum(results)


def test_operations_that_keep_channels_apart_let_them_be_cut():
    model = Between(CHANNELWISE).double().eval()
    pruned, _, plan = prune_model(model, CONFIG, IMAGES)
    groups = {layer: group for group in plan.groups.values() for layer in group.layers}
    notes = {name: groups[f"first.{name}"].note for name in CHANNELWISE}
    assert {name: layer.out_channels for name, layer in pruned.first.items()} == dict.fromkeys(CHANNELWISE, 4), notes
    masked = copy.deepcopy(model)
    for name in CHANNELWISE:
        columns = torch.arange(READ.get(name, 8)) * 8 // READ.get(name, 8)
        kept = torch.isin(columns, torch.tensor(groups[f"first.{name}"].keep))
        masked.last[name].weight.data[:, ~kept] = 0
    torch.testing.assert_close(pruned(IMAGES), masked(IMAGES), rtol=1e-9, atol=1e-9)


MIXING = {
    "max": lambda y: y * torch.max(y, 1, keepdim=True)[0],
    "argmax": lambda y: y * y.argmax(1, keepdim=True),
    "log_softmax": lambda y: y.log_softmax(1),
    "cumsum": lambda y: y.cumsum(1),
    "sort": lambda y: y.sort(1)[0],
    "norm": lambda y: y / (y.flatten(1).norm(dim=1).view(-1, 1, 1, 1) + 1),
    "einsum": lambda y, z: y * torch.einsum("nchw,nchw->nhw", y, z).unsqueeze(1),
    "indexes": lambda y: y[:, torch.tensor([1, 0, 3, 2, 5, 4, 7, 6])],
    "fft": lambda y: torch.fft.fft(y, dim=1).real,
    "limit": lambda y: limit(y),
    "renorm": lambda y: y.renorm(2, 0, 1e7),
    "local_response_norm": lambda y: F.local_response_norm(y, 5, 1e-12),
}


@pytest.mark.parametrize("images", [IMAGES, torch.zeros_like(IMAGES)], ids=["images", "zeros"])
def test_operations_that_mix_channels_leave_them_whole_and_are_named(images):
    model = Between({**MIXING, "plain": lambda y: y.relu()}).double().eval()
    for layer in model.first.values():
        nn.init.zeros_(layer.bias)  # zeros do not tell channels apart
    _, _, plan = prune_model(model, CONFIG, images)
    groups = {layer: group for group in plan.groups.values() for layer in group.layers}
    assert all(groups[f"first.{name}"].after == 8 and name in groups[f"first.{name}"].note for name in MIXING)


@pytest.mark.parametrize("width", [16, 24])
def test_operations_that_count_channels_from_the_end_leave_them_whole(width):
    class Net(nn.Sequential):
        def forward(self, x):
            return self[1](self[0](x).index_fill(1, torch.tensor([-1]), 0)).mean((2, 3))

    model = Net(nn.Conv2d(3, width, 3), nn.Conv2d(width, 8, 1), nn.Conv2d(8, 4, 1)).double()
    with pytest.raises(MicronetError, match=r"0: index_fill in forward\(\)"):
        prune_model(model, CONFIG, IMAGES)


def test_tensors_that_forward_makes_need_no_second_graph_unless_modes_differ():
    class Net(nn.Module):
        def forward(self, x):
            return x[:, torch.tensor([2, 0] if self.training and self.differs else [0, 2])]

    for Net.differs in (False, True):
        assert len(trace_network(Net(), IMAGES).graphs) == 1 + Net.differs


class FlatSoftmax(nn.Module):
    def forward(self, x):
        return F.log_softmax(x, 1).permute(0, 2, 3, 1).flatten(1)


@pytest.mark.parametrize("last", [nn.LogSoftmax(1), nn.Softmax(1), nn.Softmin(1), FlatSoftmax()], ids=str)
def test_channels_that_a_network_returns_as_scores_are_outputs(last):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), last).double().eval()
    _, _, plan = prune_model(model, CONFIG, IMAGES)
    notes = {group.layers[0]: group.note for group in plan.groups.values()}
    assert notes == {"0": "", "1": "its channels are network outputs"}


class Experts(nn.Module):
    """A mixture of experts: each takes the rows that it is the first choice of, perhaps none."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(2)])

    def forward(self, x):
        y, choice = self.first(x), (x[:, 0] > 0).long()
        out = torch.zeros_like(y)
        for number, expert in enumerate(self.experts):
            rows = torch.where(choice == number)[0]
            found = expert(y[rows])
            out.index_add_(0, rows, found + found.sum(0))
        return self.last(out)


@pytest.mark.parametrize("low", [-1, 0.1], ids=["both_chosen", "one_never_chosen"])
def test_layers_of_the_rows_that_a_mask_selects_are_cut_even_if_there_are_none(low):
    whole = Experts().double().eval()
    rows = torch.linspace(low, 1, 16 * 4, dtype=torch.float64).view(16, 4)
    pruned = prune_model(copy.deepcopy(whole), CONFIG, rows)[0]
    hidden = {f"experts.{number}.0": [f"experts.{number}.2"] for number in range(2)}
    readers = {"first": [*hidden, "last"], **hidden}
    for name, others in readers.items():
        bias = whole.get_submodule(name).bias
        cut = torch.isin(bias, pruned.get_submodule(name).bias, invert=True)
        assert 0 < cut.sum() < len(bias)
        for other in others:
            whole.get_submodule(other).weight.data[:, cut] = 0
    both = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(pruned(both), whole(both))


@torch.fx.wrap
def with_size(x):
    return x + 1, x.shape[-1]


class Sized(nn.Module):
    """A function that stays one node returns a tensor and a number, as in torchvision's MViT."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x, size = with_size(self.first(x))
        return self.last(x)[..., :size]


def test_numbers_beside_tensors_in_what_a_function_returns_are_no_channels():
    assert prune_model(Sized().eval(), CONFIG, IMAGES.float())[0].first.out_channels == 4


class Selection(nn.Module):
    """Returns the scores above a threshold, as a detector does."""

    def __init__(self):
        super().__init__()
        self.first, self.scores = nn.Linear(4, 8), nn.Linear(8, 6)

    def forward(self, x):
        scores = self.scores(self.first(x).relu()).flatten()
        kept = torch.where(scores > -9)[0]
        return scores[kept]


def test_layers_before_a_selection_among_all_their_channels_are_whole_and_others_are_cut():
    pruned = prune_model(Selection().eval(), CONFIG, torch.rand(2, 4))[0]
    assert (pruned.first.out_features, pruned.scores.out_features) == (4, 6)


class Pairs(nn.Module):
    """Takes the rows that a mask selects in pairs; the example has none."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.other = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(4, 6)
        self.last = nn.Linear(6, 3)

    def forward(self, x):
        pairs = self.other(x)[x[:, 0] > 9].view(-1, 2, 6).sum(1)
        return self.last(torch.cat([self.second(self.first(x).relu()), pairs]))


def test_layers_beside_rows_that_are_taken_in_pairs_are_cut_if_the_example_has_none():
    pruned = prune_model(Pairs().eval(), CONFIG, torch.rand(3, 4))[0]
    assert (pruned.first.out_features, pruned.other.out_features) == (4, 6)
