"""Sizes that a forward calls its reshapes with as plain numbers change with the channels that are cut."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from micronet import prune
from micronet.errors import MicronetError
from micronet.graph.plain_weights import SIZES, restore_plain_weights, with_plain_weights


class Tutorial(nn.Module):
    """A network as in torch's tutorials; ``flatten``: how it flattens 16 maps of 5x5."""

    def __init__(self, flatten):
        super().__init__()
        self.conv1, self.conv2, self.drop = nn.Conv2d(1, 6, 5), nn.Conv2d(6, 16, 5), nn.Dropout()
        self.fc1, self.fc2 = nn.Linear(16 * 5 * 5, 40), nn.Linear(40, 10)
        self.flatten = [flatten]

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = self.drop(F.relu(self.fc1(self.flatten[0](x))))
        return self.fc2(F.dropout(x, training=self.training))


FLATTENS = {
    "view": lambda x: x.view(-1, 16 * 5 * 5),
    "reshape": lambda x: torch.reshape(x, (x.shape[0], 400)),
    "view of maps": lambda x: x.view(-1, 16, 25).flatten(1),
}


@pytest.mark.parametrize("flatten", FLATTENS.values(), ids=FLATTENS)
def test_a_convolution_before_a_reshape_to_numbers_is_pruned(flatten):
    net, x = Tutorial(flatten).eval(), torch.randn(3, 1, 32, 32)
    pruned = prune(net, x, percent=0.5, criterion="l2")
    assert pruned.model.conv2.out_channels < 16  # prune itself checks that it computes what the masked network does
    assert pruned.model(torch.randn(5, 1, 32, 32)).shape == (5, 10)
    assert net.conv2.out_channels == 16
    assert not torch.equal(pruned.model.train()(x), pruned.model(x))  # dropout


def test_a_network_that_reads_its_sizes_is_restored_and_not_made_again():
    net, x = Tutorial(FLATTENS["view"]).eval(), torch.randn(3, 1, 32, 32)
    plain, result = with_plain_weights(net, x, "pruning")
    assert result[SIZES] == {} and torch.equal(plain(x), net(x))
    restored = restore_plain_weights(copy.deepcopy(net), result)
    restored.load_state_dict(net.state_dict())
    assert torch.equal(restored(x), net(x)) and restored.size_1 == 400
    assert with_plain_weights(plain, x, "pruning") == (plain, {})
    for purpose in ("running", "training"):
        assert with_plain_weights(net, x, purpose) == (net, {})


@pytest.mark.parametrize(
    "unflatten",
    [lambda z: z.view(-1, 8, 4, 4), lambda z: z.unflatten(1, (8, 4, 4)), nn.Unflatten(1, (8, 4, 4))],
    ids=["view", "unflatten", "module"],
)
def test_maps_that_a_linear_layer_makes_lose_channels_and_keep_their_sides(unflatten):
    class Generator(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.up = nn.Linear(6, 8 * 4 * 4), nn.ConvTranspose2d(8, 3, 4, 2, 1)
            self.unflatten = unflatten if isinstance(unflatten, nn.Module) else None

        def forward(self, z):
            z = F.relu(self.fc(z))
            return self.up(self.unflatten(z) if self.unflatten else unflatten(z))

    pruned = prune(Generator().eval(), torch.randn(2, 6), percent=0.5, criterion="l2").model
    assert pruned.fc.out_features == 16 * pruned.up.in_channels < 128
    assert pruned(torch.randn(3, 6)).shape == (3, 3, 8, 8)


def test_heads_whose_number_the_forward_names_are_cut():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = nn.Linear(12, 96), nn.Linear(32, 5)

        def forward(self, x):
            q, k, v = self.qkv(x).reshape(x.shape[0], x.shape[1], 3, 4, 8).permute(2, 0, 3, 1, 4)
            attended = (q @ k.transpose(-2, -1) * 8**-0.5).softmax(-1) @ v
            return self.out(attended.transpose(1, 2).reshape(x.shape[0], x.shape[1], 32))

    pruned = prune(Attention().eval(), torch.randn(2, 6, 12), percent=0.5, criterion="l2").model
    assert (pruned.qkv.out_features, pruned.out.in_features) == (48, 16)


def fused(net, x):
    n, length, width = x.shape
    qkv = net.qkv(x).reshape(n, length, 3, net.heads, width // net.heads).permute(2, 0, 3, 1, 4)
    attended = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
    return attended.transpose(1, 2).reshape(n, length, width)


def split(net, x):
    n, length, width = x.size()
    q, k, v = net.qkv(x).split(width, dim=2)
    q, k, v = (part.view(n, length, net.heads, width // net.heads).transpose(1, 2) for part in (q, k, v))
    scores = q @ k.transpose(-2, -1) / (width // net.heads) ** 0.5
    return (scores.softmax(-1) @ v).transpose(1, 2).reshape(n, length, x.size(-1))


@pytest.mark.parametrize("attend", [fused, split], ids=lambda attend: attend.__name__)
def test_heads_whose_width_is_computed_from_that_of_the_input_are_cut(attend):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = 4
            self.norm, self.qkv, self.out = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 5)

        def forward(self, x):
            return self.out(attend(self, self.norm(x)))

    net = Attention().eval()
    pruned = prune(net, torch.randn(2, 6, 32), percent=0.5).model
    assert (pruned.qkv.out_features, pruned.out.in_features) == (48, 16)
    assert pruned(torch.randn(3, 7, 32)).shape == (3, 7, 5)  # other numbers of samples and positions


def test_forwards_that_make_tensors_are_pruned_too():
    class Localization(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc1, self.fc2 = nn.Conv2d(1, 8, 5), nn.Linear(8 * 4 * 4, 12), nn.Linear(12, 9)

        def forward(self, x):
            y = F.relu(self.conv(x))
            n, c, h, w = y.data.size()
            y = self.fc2(F.relu(self.fc1(y.view(n, 2, c // 2, h, w).view(-1, 8 * 4 * 4))))
            same = torch.eye(3).view(1, 9).repeat(n, 1)
            if y.is_cuda:
                same = same.cuda()
            return (y + same + torch.ones(x.size(0), 9)).view(-1, 3, 3)

    net, x = Localization().eval(), torch.randn(2, 1, 8, 8)
    for _ in range(2):  # each trace would name the tensors anew
        plain, result = with_plain_weights(net, x, "pruning")
        restored = restore_plain_weights(Localization().eval(), result)
        restored.load_state_dict(plain.state_dict())
        assert torch.equal(restored(x), net(x))
    assert prune(net, x, percent=0.5).model.conv.out_channels < 8


class Causal(nn.Module):
    """Attention as GPT's, whose forward branches on a size, and whose dropout is a number that depends on the mode."""

    def __init__(self):
        super().__init__()
        self.heads, self.longest = 4, 8
        self.norm, self.qkv, self.out = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 5)

    def forward(self, x):
        n, length, width = x.size()
        assert length <= self.longest
        q, k, v = self.qkv(self.norm(x)).split(width, dim=2)
        q, k, v = (part.view(n, length, self.heads, width // self.heads).transpose(1, 2) for part in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.1 if self.training else 0, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(n, length, width))


class Tiled(Causal):
    """The same, with a size that a record fixes."""

    def forward(self, x):
        return super().forward(x) / round(x.size(1) ** 0.25, 9)


def test_heads_in_a_recorded_forward_are_cut():
    pruned = prune(Causal().eval(), torch.randn(2, 8, 32), percent=0.5).model
    assert pruned.qkv.out_features == 48
    assert pruned(torch.randn(3, 5, 32)).shape == (3, 5, 5)


def test_heads_in_a_recorded_forward_that_fixes_other_sizes_stay():
    with pytest.raises(MicronetError, match="qkv: forward"):
        prune(Tiled().eval(), torch.randn(2, 8, 32), percent=0.5)
