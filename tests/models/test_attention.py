"""Our attention and transformers compute what torch's do, whatever is asked of them."""

import copy

import pytest
import torch
from torch import nn

from micronet.errors import MicronetError
from micronet.evaluation.cost import count_macs
from micronet.graph.trace import trace
from micronet.models.attention import Attention, is_splittable
from micronet.models.transformer import split_layers, splittable_attentions

TIGHT = {"rtol": 1e-10, "atol": 1e-12}
N, L, S, E, HEADS = 3, 5, 7, 12, 4


def masks(kind, batched):
    """Return attn_mask and key_padding_mask of a kind."""
    torch.manual_seed(2)
    allowed = torch.rand(L, S) < 0.3
    allowed[:, 0] = False
    padding = torch.zeros(*([N] if batched else []), S, dtype=torch.bool)
    padding[..., -2:] = True
    each = torch.randn((N if batched else 1) * HEADS, L, S, dtype=torch.float64)
    return {
        "none": (None, None),
        "bool": (allowed, None),
        "float": (torch.randn(L, S, dtype=torch.float64), None),
        "each head's": (each, None),
        "padding": (None, padding),
        "both": (allowed, padding),
        "both float": (each, padding.double()),
    }[kind]


@pytest.mark.parametrize("kind", ["none", "bool", "float", "each head's", "padding", "both", "both float"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("sizes", [{}, {"kdim": 6, "vdim": 10}, {"bias": False}])
@pytest.mark.parametrize("batched", [True, False])
def test_it_computes_what_torch_does(kind, batch_first, sizes, batched):
    torch.manual_seed(1)
    theirs = nn.MultiheadAttention(E, HEADS, batch_first=batch_first, **sizes).double().eval()
    if theirs.in_proj_bias is not None:
        nn.init.normal_(theirs.in_proj_bias)
    shapes = [(N, L, E), (N, S, sizes.get("kdim", E)), (N, S, sizes.get("vdim", E))]
    q, k, v = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    q, k, v = (x[0] if not batched else x if batch_first else x.transpose(0, 1) for x in (q, k, v))
    attn_mask, padding = masks(kind, batched)
    ours = Attention.from_torch(copy.deepcopy(theirs))
    for average in (True, False):
        options = {"attn_mask": attn_mask, "key_padding_mask": padding, "average_attn_weights": average}
        want, have = theirs(q, k, v, **options), ours(q, k, v, **options)
        torch.testing.assert_close(have, want, **TIGHT)
        alone, nothing = ours(q, k, v, need_weights=False, **options)
        torch.testing.assert_close(alone, want[0], **TIGHT)
        assert nothing is None


@pytest.mark.parametrize("need_weights", [True, False])
def test_training_drops_the_same_and_learns_the_same(need_weights):
    theirs = nn.MultiheadAttention(E, HEADS, dropout=0.3, batch_first=True).double()
    x = torch.randn(N, L, E, dtype=torch.float64)
    ours = Attention.from_torch(copy.deepcopy(theirs))
    outputs = []
    for attention in (theirs, ours):
        torch.manual_seed(5)
        outputs.append(attention(x, x, x, need_weights=need_weights))
        outputs[-1][0].square().sum().backward()
    torch.testing.assert_close(outputs[0], outputs[1], **TIGHT)
    grads = [getattr(ours, f"{name}_proj").weight.grad for name in "qkv"]
    torch.testing.assert_close(torch.cat(grads), theirs.in_proj_weight.grad, **TIGHT)
    again = Attention.from_torch(theirs)  # gradients go along
    assert torch.equal(
        torch.cat([getattr(again, f"{name}_proj").weight.grad for name in "qkv"]), theirs.in_proj_weight.grad
    )


def test_its_number_of_heads_is_free():
    ours = Attention.from_torch(nn.MultiheadAttention(E, HEADS, batch_first=True))
    for name in "qkv":
        setattr(ours, f"{name}_proj", nn.Linear(E, 2 * 3))
    ours.out_proj = nn.Linear(2 * 3, E)
    x = torch.randn(N, L, E)
    out, weights = ours(x, x, x, average_attn_weights=False)
    assert (ours.num_heads, out.shape, weights.shape) == (2, (N, L, E), (N, 2, L, L))
    with pytest.raises(MicronetError, match="pass attn_mask as well"):
        ours(x, x, x, is_causal=True)


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_what_it_cannot_stand_for_is_left(options):
    assert not is_splittable(nn.MultiheadAttention(E, HEADS, **options))
    hooked = nn.MultiheadAttention(E, HEADS)
    hooked.register_forward_hook(lambda *_: None)
    assert not is_splittable(hooked)


def networks():
    """Return torch's transformers and inputs for each."""
    layer = {"nhead": HEADS, "dim_feedforward": 16, "dropout": 0.0}
    encoder = nn.TransformerEncoderLayer(E, batch_first=True, **layer)
    decoder = nn.TransformerDecoderLayer(E, batch_first=True, **layer)
    x, y = torch.randn(N, L, E, dtype=torch.float64), torch.randn(N, S, E, dtype=torch.float64)
    causal = nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.float64)
    return {
        "layer": (encoder, (x,), {"src_mask": causal, "is_causal": True}),
        "norm first": (nn.TransformerEncoderLayer(E, norm_first=True, activation="gelu", **layer), (x,), {}),
        "encoder": (nn.TransformerEncoder(encoder, 2, nn.LayerNorm(E)), (x,), {"mask": causal}),
        "decoder": (nn.TransformerDecoder(decoder, 2), (x, y), {"tgt_mask": causal}),
        "decoder norm first": (nn.TransformerDecoderLayer(E, batch_first=True, norm_first=True, **layer), (x, y), {}),
        "transformer": (nn.Transformer(E, HEADS, 1, 1, 16, 0.0, batch_first=True), (y, x), {"tgt_mask": causal}),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["layer", "norm first", "encoder", "decoder", "decoder norm first", "transformer"])
def test_transformers_around_it_compute_what_torchs_do(name):
    torch.manual_seed(0)
    theirs, inputs, options = networks()[name]
    theirs = theirs.double()
    ours = split_layers(copy.deepcopy(theirs), splittable_attentions(theirs))
    assert not splittable_attentions(ours)
    for training in (True, False):
        outputs = []
        for model in (theirs, ours):
            torch.manual_seed(3)
            with torch.no_grad():
                outputs.append(model.train(training)(*inputs, **options))
        torch.testing.assert_close(outputs[1], outputs[0], **TIGHT)
    assert trace(ours) is not None


def test_an_encoder_with_padding_does_not_go_around_our_attention():
    torch.manual_seed(0)
    theirs = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, HEADS, 16, batch_first=True), 2).eval()
    ours = split_layers(copy.deepcopy(theirs), ["layers.1.self_attn"])  # a mixed one
    x, padding = torch.randn(N, L, E), torch.zeros(N, L, dtype=torch.bool)
    padding[1, 3:] = True
    with torch.no_grad():
        want, have = (model(x, src_key_padding_mask=padding) for model in (theirs, ours))
    torch.testing.assert_close(have[~padding], want[~padding])


def test_an_attention_used_twice_stays_one():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.MultiheadAttention(E, HEADS)
            self.b = self.a

    model = split_layers(Twice(), ["a"])
    assert model.a is model.b
    assert isinstance(model.a, Attention)
    with pytest.raises(ValueError, match="a is neither an attention"):
        split_layers(model, ["a"])


def test_the_work_of_torchs_attention_is_counted_as_ours_is():
    class Images(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.TransformerEncoderLayer(E, HEADS, 16, batch_first=True)
            self.cross = nn.MultiheadAttention(E, HEADS, kdim=4, vdim=4, batch_first=True)

        def forward(self, x):
            return self.cross(self.inner(x.flatten(2)), key=x[..., :4].flatten(2), value=x[..., :4].flatten(2))[0]

    theirs = Images()
    x = torch.zeros(1, 3, 1, E)
    work = count_macs(theirs, x)
    products = 2 * (2 * 3 * 3 * E)  # scores, and values by scores, of two attentions
    assert work == 3 * (4 * E * E + 2 * 16 * E) + 3 * (2 * E * E + 2 * 4 * E) + products
    assert count_macs(split_layers(theirs, splittable_attentions(theirs)), x) == work
