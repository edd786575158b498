"""Attention loses whole heads, or stays as it is: the rest must compute what it did.

The oracle knows nothing of the pruner: torch's own attention, with the columns of its output projection that read the
cut heads at 0.
"""

import copy
import math

import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from micronet.artifact.artifact import Artifact, load, save
from micronet.artifact.header import StageRecord
from micronet.errors import MicronetError
from micronet.models.attention import Attention
from micronet.models.build import ModelSpec
from micronet.onnx.layer_agreement import compare_layers
from micronet.pruning.config import PruneConfig
from micronet.pruning.prune import prune_model, restore

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
E, HEADS, HIDDEN = 24, 4, 20
D = E // HEADS
CONFIG = PruneConfig(0.5, criterion="l2", scope="layer")


class Wrapped(nn.Module):
    """A network around one of torch's modules."""

    def __init__(self, inner, forward):
        super().__init__()
        self.inner, self.embed, self.other, self.head = inner, nn.Linear(5, E), nn.Linear(4, E), nn.Linear(E, 3)
        self._forward = [forward]

    def forward(self, x, y):
        x, y = self.embed(x), self.other(y)
        return self.head(self._forward[0](self.inner, x, y) + y.mean(1, keepdim=True))


def self_attention(inner, x, y):
    return x + inner(x, x, x, need_weights=False)[0]


def self_attention_that_weighs(inner, x, y):
    return x + inner(x, x, x)[0]


def cross_attention(inner, x, y):
    return x + inner(x, y, y)[0]


def causal_attention(inner, x, y):
    mask = nn.Transformer.generate_square_subsequent_mask(6, dtype=torch.float64)
    return x + inner(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]


def alone(inner, x, y):
    return inner(x)


def both(inner, x, y):
    return inner(y, x)


def cut_of(group):
    return [channel for channel in range(group.before) if channel not in group.keep]


def silence(model, groups):
    """Zero what reads the cut heads of torch's attentions, and what makes other channels that are cut."""
    for name, group in groups.items():
        attention, _, projection = name.rpartition(".")
        if projection == "q_proj":
            model.get_submodule(attention).out_proj.weight.data[:, cut_of(group)] = 0
        elif projection == "linear1":
            model.get_submodule(f"{attention}.linear2").weight.data[:, cut_of(group)] = 0
        elif projection not in ("k_proj", "v_proj"):
            layer = model.get_submodule(name)
            layer.weight.data[cut_of(group)] = 0
            if layer.bias is not None:
                layer.bias.data[cut_of(group)] = 0


def networks():
    layer = {"dim_feedforward": HIDDEN, "batch_first": True}
    encoder = nn.TransformerEncoderLayer(E, HEADS, **layer)
    decoder = nn.TransformerDecoderLayer(E, HEADS, **layer)
    first = nn.MultiheadAttention(E, HEADS)
    return {
        "self": (nn.MultiheadAttention(E, HEADS, batch_first=True), self_attention),
        "weighs": (nn.MultiheadAttention(E, HEADS, batch_first=True), self_attention_that_weighs),
        "no bias": (nn.MultiheadAttention(E, HEADS, bias=False, batch_first=True), self_attention),
        "sequence first": (first, self_attention),
        "cross": (nn.MultiheadAttention(E, HEADS, batch_first=True), cross_attention),
        "sizes": (nn.MultiheadAttention(E, HEADS, kdim=E, vdim=E, batch_first=True), cross_attention),
        "causal": (nn.MultiheadAttention(E, HEADS, batch_first=True), causal_attention),
        "encoder layer": (encoder, alone),
        "norm first": (nn.TransformerEncoderLayer(E, HEADS, norm_first=True, activation="gelu", **layer), alone),
        "encoder": (nn.TransformerEncoder(encoder, 2), alone),
        "decoder layer": (decoder, both),
        "decoder": (nn.TransformerDecoder(decoder, 2), both),
        "transformer": (nn.Transformer(E, HEADS, 1, 1, **layer), both),
    }


NAMES = list(networks())
INPUTS = torch.randn(2, 6, 5, dtype=torch.float64), torch.randn(2, 6, 4, dtype=torch.float64)


def network(name):
    torch.manual_seed(NAMES.index(name))
    model = Wrapped(*networks()[name]).double().eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, std=0.3)
    return model


# Criteria differ in their scores alone, and taylor's are of gradients: of joint, of separate and of repeated layers.
@pytest.mark.parametrize(
    ("name", "criterion"),
    [
        *((name, "l2") for name in NAMES),
        ("self", "random"),
        *((name, "taylor") for name in ("self", "sizes", "decoder")),
    ],
)
def test_cut_heads_equal_silenced_ones(name, criterion):
    model = network(name)
    if criterion == "taylor":
        model(*INPUTS).square().sum().backward()
    before = copy.deepcopy(model)
    pruned, record, plan = prune_model(model, PruneConfig(0.5, criterion=criterion, scope="layer"), INPUTS)
    torch.testing.assert_close(model(*INPUTS), before(*INPUTS), rtol=0, atol=0)
    groups = {layer: group for group in plan.groups.values() for layer in group.layers}
    attentions = [name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]
    for name in attentions:
        cut = pruned.get_submodule(name)
        assert isinstance(cut, Attention)
        assert (cut.num_heads, cut.head_dim) == (2, D)
        kept = groups[f"{name}.q_proj"].keep
        assert [channel % D for channel in kept] == 2 * list(range(D))
        assert groups[f"{name}.q_proj"] is groups[f"{name}.k_proj"] is groups[f"{name}.v_proj"]
    for name, module in pruned.named_modules():
        if name.endswith("linear1"):
            assert module.out_features == HIDDEN // 2
    silence(before, groups)
    torch.testing.assert_close(pruned(*INPUTS), before(*INPUTS), **CLOSE)
    again = restore(network_of(model), record)
    again.load_state_dict(pruned.state_dict())
    assert torch.equal(again.double().eval()(*INPUTS), pruned(*INPUTS))
    pruned.train()(*INPUTS).sum().backward()
    assert not [key for key, parameter in pruned.named_parameters() if parameter.grad is None]
    smaller, last, _ = prune_model(pruned.eval(), PruneConfig(0.5, criterion="l2", scope="layer"), INPUTS)
    assert smaller.get_submodule(attentions[0]).num_heads == 1
    again = restore(restore(network_of(model), record), last)
    again.load_state_dict(smaller.state_dict())
    assert torch.equal(again.eval()(*INPUTS), smaller(*INPUTS))


def network_of(model):
    """Return the same float network, with other weights."""
    fresh = copy.deepcopy(model)
    for parameter in fresh.parameters():
        parameter.data.zero_()
    return fresh


def test_the_head_with_the_smallest_weights_goes():
    model = network("self")
    model.inner.in_proj_weight.data.view(3, HEADS, D, E)[:, 1] *= 1e-3
    _, _, plan = prune_model(model, PruneConfig(D / E, criterion="l2", scope="layer"), INPUTS)
    kept = next(group.keep for group in plan.groups.values() if "inner.v_proj" in group.layers)
    assert sorted({channel // D for channel in kept}) == [0, 2, 3]


def test_an_attention_that_keeps_its_heads_stays_torchs():
    model = network("encoder")
    exclude = "inner.layers.0.self_attn.*"
    pruned, record, _ = prune_model(model, PruneConfig(0.5, criterion="l2", scope="layer", exclude=exclude), INPUTS)
    assert type(pruned.inner.layers[0]) is nn.TransformerEncoderLayer
    assert type(pruned.inner.layers[0].self_attn) is nn.MultiheadAttention
    assert isinstance(pruned.inner.layers[1].self_attn, Attention)
    assert record.result["attention"] == ["inner.layers.1.self_attn"]
    with torch.no_grad():  # where torch would go around the layers' modules
        assert pruned(*INPUTS).isfinite().all()


def test_widths_are_whole_heads_of_the_multiple_asked_for():
    pruned, _, _ = prune_model(network("self"), PruneConfig(0.5, regular=4, criterion="l2", scope="layer"), INPUTS)
    assert pruned.inner.q_proj.out_features == 12  # heads of 6 and multiples of 4
    with pytest.raises(MicronetError, match=r"q_proj.* cannot have 20 channels; .* a multiple of 6"):
        prune_model(network("self"), PruneConfig(widths="24,20", criterion="l2"), INPUTS)


def weights_are_given_out(inner, x, y):
    out, weights = inner(x, x, x)
    return out + weights.sum()


def mask_for_each_head(inner, x, y):
    return inner(x, x, x, attn_mask=torch.zeros(2 * HEADS, 6, 6, dtype=torch.float64), need_weights=False)[0]


def own_tensors_are_read(inner, x, y):
    return inner(x, x, x)[0] * inner.in_proj_weight.sum()


@pytest.mark.parametrize("forward", [weights_are_given_out, mask_for_each_head, own_tensors_are_read])
def test_heads_that_others_count_are_left_whole(forward):
    model = Wrapped(nn.MultiheadAttention(E, HEADS, batch_first=True), forward).double().eval()
    model.head = nn.Sequential(nn.Linear(E, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    pruned, _, _ = prune_model(model, CONFIG, INPUTS)
    assert pruned.inner.num_heads == HEADS
    assert pruned.head[0].out_features == 4


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_kinds_of_attention_that_are_not_supported_are_named(options):
    model = Wrapped(nn.MultiheadAttention(E, HEADS, batch_first=True, **options), self_attention).double()
    model.head = nn.Sequential(nn.Linear(E, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    pruned, _, plan = prune_model(model, CONFIG, INPUTS)
    assert type(pruned.inner) is nn.MultiheadAttention
    notes = {layer: group.note for group in plan.groups.values() for layer in group.layers}
    assert "inner (MultiheadAttention) is not supported" in notes["embed"]


class ByHand(nn.Module):
    """Attention as users write it."""

    def __init__(self, forward):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(5, E) for _ in range(3))
        self.qkv, self.proj = nn.Linear(5, 3 * E), nn.Linear(E, 3)
        self.first, self.second, self.kv = nn.Linear(5, 8), nn.Linear(8, 5), nn.Linear(5, 2 * E)
        self.num_heads, self.head_dim, self.width = HEADS, D, E
        self._forward = [forward]

    def forward(self, x, y):
        return self._forward[0](self, x + self.second(F.relu(self.first(x))))

    def heads(self, x):
        return (layer(x).unflatten(-1, (-1, D)).transpose(1, 2) for layer in (self.q, self.k, self.v))


def with_torchs_call(m, x):
    q, k, v = m.heads(x)
    return m.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def with_two_products(m, x):
    q, k, v = m.heads(x)
    scores = (q @ k.transpose(-2, -1)) * D**-0.5
    mask = torch.ones(6, 6, dtype=torch.bool).triu(1)
    scores = scores.masked_fill(mask, float("-inf")).softmax(dim=-1)
    return m.proj(torch.matmul(scores, v).transpose(1, 2).flatten(2))


def with_scores_of_the_width(m, x):
    q, k, v = m.heads(x)
    weights = torch.softmax(q.matmul(k.mT) / math.sqrt(q.size(-1)), -1)
    return m.proj((weights @ v).transpose(1, 2).reshape(x.size(0), 6, -1))


def with_heads_written_down(m, x):
    q, k, v = (layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (m.q, m.k, m.v))
    return m.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def with_one_layer(m, x):
    b, n, _ = x.shape
    q, k, v = m.qkv(x).reshape(b, n, 3, HEADS, D).permute(2, 0, 3, 1, 4).unbind(0)
    return m.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, E))


def with_one_layer_and_attributes(m, x):
    b, n, _ = x.shape
    q, k, v = m.qkv(x).reshape(b, n, 3, m.num_heads, m.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    return m.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, m.width))


def with_one_layer_and_any_width(m, x):
    b, n, _ = x.shape
    q, k, v = m.qkv(x).view(b, n, 3, m.num_heads, -1).permute(2, 0, 3, 1, 4)
    weights = (q * D**-0.5 @ k.transpose(-2, -1)).softmax(-1)
    return m.proj((weights @ v).transpose(1, 2).reshape(b, n, -1))


def with_one_layer_for_two(m, x):
    b, n, _ = x.shape
    q = m.q(x).reshape(b, n, m.num_heads, m.head_dim).transpose(1, 2)
    k, v = m.kv(x).reshape(b, n, 2, m.num_heads, m.head_dim).permute(2, 0, 3, 1, 4)
    return m.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def with_one_layer_head_by_head(m, x):
    b, n, _ = x.shape
    q, k, v = m.qkv(x).view(b, n, m.num_heads, -1).transpose(1, 2).split([D, D, D], 3)
    return m.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1))


def values_first(m, q, k, v):
    scores = (q @ k.transpose(-2, -1)).softmax(-1)
    return m.proj((v.transpose(-2, -1) @ scores.transpose(-2, -1)).flatten(1, 2).transpose(1, 2))


def with_values_first(m, x):
    return values_first(m, *m.heads(x))


def with_values_first_and_attributes(m, x):
    b, n, _ = x.shape
    return values_first(m, *m.qkv(x).reshape(b, n, 3, m.num_heads, m.head_dim).permute(2, 0, 3, 1, 4))


def with_values_first_and_heads_written_down(m, x):
    b, n, _ = x.shape
    return values_first(m, *(layer(x).view(b, n, HEADS, -1).transpose(1, 2) for layer in (m.q, m.k, m.v)))


def with_heads_read_before(m, x):
    size = m.width // m.num_heads
    assert x.sum() * (m.num_heads + x.size(0)) is not None
    b, n, _ = x.shape
    q, k, v = m.qkv(x).reshape(b, n, 3, m.num_heads, size).permute(2, 0, 3, 1, 4)
    return m.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, E))


def with_a_bias_for_each_head(m, x):
    q, k, v = m.heads(x)
    bias = torch.ones(HEADS, 6, 6, dtype=torch.float64)
    return m.proj(F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2))


def with_heads_that_talk(m, x):
    q, k, v = m.heads(x)
    weights = (q @ k.mT).softmax(1)
    return m.proj((weights @ v).transpose(1, 2).flatten(2))


def with_einsum(m, x):
    q, k, v = (layer(x).unflatten(-1, (-1, D)) for layer in (m.q, m.k, m.v))
    weights = torch.einsum("b l h d, b s h d -> b h l s", q, k).softmax(-1)
    return m.proj(torch.einsum("...hls,...shd->...lhd", weights, v).flatten(2))


def with_similar_channels(m, x):
    q, k, v = (y.mT for y in m.heads(x))
    weights = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT).softmax(-1)
    return m.proj((weights @ v).flatten(1, 2).transpose(1, 2))


def with_keys_times_values(m, x):
    q, k, v = m.heads(x)
    return m.proj((q.softmax(-1) @ (k.softmax(-2).mT @ v)).transpose(1, 2).flatten(2))


def rotated(x):
    angle = torch.linspace(0, 3, x.shape[-2], dtype=x.dtype)[:, None]
    return x * angle.cos() + torch.cat([-x[..., D // 2 :], x[..., : D // 2]], -1) * angle.sin()


def with_places_rotated_in(m, x):
    q, k, v = m.heads(x)
    return m.proj(F.scaled_dot_product_attention(rotated(q), rotated(k), v).transpose(1, 2).flatten(2))


def with_values_of_another_order(m, x):
    q, k, v = m.heads(x)
    return m.proj(F.scaled_dot_product_attention(q, k, v.flip(1)).transpose(1, 2).flatten(2))


BY_HAND = {
    with_torchs_call: True, with_two_products: True, with_scores_of_the_width: True, with_heads_written_down: False,
    with_one_layer_and_attributes: True, with_one_layer_and_any_width: True, with_one_layer_for_two: True,
    with_one_layer_head_by_head: True, with_heads_read_before: False, with_one_layer: False,
    with_a_bias_for_each_head: False, with_heads_that_talk: False,
    with_values_of_another_order: False, with_values_first: True, with_values_first_and_attributes: True,
    with_values_first_and_heads_written_down: False, with_einsum: True, with_similar_channels: True,
    with_keys_times_values: True, with_places_rotated_in: True,
}  # fmt: skip


@pytest.mark.parametrize(("forward", "is_cut"), BY_HAND.items(), ids=lambda item: getattr(item, "__name__", ""))
def test_attention_written_by_hand_loses_whole_heads_or_none(forward, is_cut):
    torch.manual_seed(0)
    model = ByHand(forward).double().eval()
    whole = copy.deepcopy(model)
    pruned, record, plan = prune_model(model, CONFIG, INPUTS)
    groups = {layer: group for group in plan.groups.values() for layer in group.layers}
    assert pruned.first.out_features == 4
    whole.second.weight.data[:, [c for c in range(8) if c not in groups["first"].keep]] = 0
    layer = "v" if "v" in groups else "qkv" if "qkv" in groups else "kv"
    assert bool(groups[layer].note) != is_cut
    if is_cut:
        assert layer == "qkv" or groups["q"] is groups["k" if layer == "v" else "kv"] is groups[layer]
        assert [pruned.get_submodule(layer).out_features, pruned.proj.in_features] == [
            whole.get_submodule(layer).out_features // 2, E // 2,
        ]  # fmt: skip
        parts = groups[layer].before // E
        heads = {c // D // (parts if forward is with_one_layer_head_by_head else 1) for c in groups[layer].keep}
        whole.proj.weight.data[:, [c for c in range(E) if c // D not in heads]] = 0
        again = restore(copy.deepcopy(model), record)
        again.load_state_dict(pruned.state_dict())
        assert torch.equal(again(*INPUTS), pruned(*INPUTS))
    torch.testing.assert_close(pruned(*INPUTS), whole(*INPUTS), **CLOSE)


class Shares(nn.Module):
    """Attention in which two heads of queries, or all, share one of keys and values."""

    def __init__(self, forward, heads):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(5, E), nn.Linear(5, heads * D), nn.Linear(5, heads * D)
        self.kv, self.proj = nn.Linear(5, 2 * heads * D), nn.Linear(E, 3)
        self.num_heads, self.num_key_value_heads, self.head_dim, self.times = HEADS, heads, D, HEADS // heads
        self._forward = [forward]

    def forward(self, x, y):
        return self._forward[0](self, x)


def by_the_option(m, x):
    q, k, v = (layer(x).unflatten(-1, (-1, D)).transpose(1, 2) for layer in (m.q, m.k, m.v))
    return m.proj(F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2))


def repeated(x, times):
    b, h, n, d = x.shape
    return x[:, :, None].expand(b, h, times, n, d).reshape(b, h * times, n, d)


def by_repeating(m, x):
    b, n, _ = x.shape
    q = m.q(x).view(b, n, m.num_heads, m.head_dim).transpose(1, 2)
    k, v = (y(x).view(b, n, m.num_key_value_heads, m.head_dim).transpose(1, 2) for y in (m.k, m.v))
    k, v = repeated(rotated(k), m.times), repeated(v, m.times)
    weights = (rotated(q) @ k.transpose(2, 3) * D**-0.5).softmax(-1)
    return m.proj((weights @ v).transpose(1, 2).reshape(b, n, -1))


def by_interleaving(m, x):
    q = m.q(x).view(*x.shape[:2], -1, m.head_dim).transpose(1, 2)
    k, v = (y.unflatten(-1, (-1, D)).transpose(1, 2).repeat_interleave(m.times, 1) for y in m.kv(x).chunk(2, -1))
    return m.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def by_broadcasting(m, x):
    q = m.q(x).unflatten(-1, (-1, m.times, D)).permute(0, 2, 3, 1, 4)
    k, v = (y(x).unflatten(-1, (-1, 1, D)).permute(0, 2, 3, 1, 4) for y in (m.k, m.v))
    return m.proj(((q @ k.mT).softmax(-1) @ v).permute(0, 3, 1, 2, 4).flatten(2))


@pytest.mark.parametrize(("forward", "few"), [
    (by_the_option, 1), (by_the_option, 2), (by_repeating, 2), (by_interleaving, 2), (by_broadcasting, 2),
])  # fmt: skip
def test_heads_are_cut_with_the_keys_and_values_that_they_share(forward, few):
    torch.manual_seed(0)
    model = Shares(forward, few).double().eval()
    whole = copy.deepcopy(model)
    pruned, _, plan = prune_model(model, CONFIG, INPUTS)
    groups = {layer: group for group in plan.groups.values() for layer in group.layers}
    layer = "kv" if forward is by_interleaving else "v"
    assert pruned.q.out_features == E // 2
    assert pruned.get_submodule(layer).out_features * few == whole.get_submodule(layer).out_features
    assert few > 1 or groups[layer].note == "all heads of the queries share it"
    whole.proj.weight.data[:, [c for c in range(E) if c not in groups["q"].keep]] = 0
    torch.testing.assert_close(pruned(*INPUTS), whole(*INPUTS), **CLOSE)


def test_a_pruned_vision_transformer_reloads(tmp_path):
    from torchvision.models import VisionTransformer

    factory = "torchvision.models:VisionTransformer"
    args = {
        "image_size": 16, "patch_size": 8, "num_layers": 2, "num_heads": 4, "hidden_dim": 16, "mlp_dim": 32,
        "num_classes": 3,
    }  # fmt: skip
    images = torch.randn(2, 3, 16, 16)
    pruned, record, plan = prune_model(VisionTransformer(**args).eval(), CONFIG, images)
    assert pruned.encoder.layers.encoder_layer_0.self_attention.num_heads == 2
    assert "normalizes across its channels" in plan.groups[0].note  # the class token and the places
    path = tmp_path / "pruned.safetensors"
    save(Artifact(pruned, ModelSpec(factory, args), [StageRecord("import"), record]), path)
    again = load(path, trust_code=True).model.eval()
    assert torch.equal(again(images), pruned(images))


CODE = """
import torch
from torch import nn


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch, self.norm, self.relu = nn.Conv2d(3, 24, 8, 8), nn.BatchNorm2d(24), nn.ReLU()
        self.places = nn.Parameter(torch.randn(1, 16, 24))
        self.blocks = nn.TransformerEncoder(nn.TransformerEncoderLayer(24, 4, 48, 0.1, batch_first=True), 1)
        self.head = nn.Linear(24, 10)

    def forward(self, x):
        x = self.relu(self.norm(self.patch(x))).flatten(2).transpose(1, 2) + self.places
        return self.head(self.blocks(x).mean(1))
"""


def test_a_pruned_transformer_goes_through_every_command(tmp_path, micronet):
    code = tmp_path / "tiny.py"
    code.write_text(CODE)
    path = {stage: tmp_path / f"{stage}.safetensors" for stage in ("float", "pruned", "tuned", "int8", "fused")}
    short, trust = ["--limit", 64, "--epochs", 1], "--trust-code"
    steps = [
        ["train", "--model", f"{code}:Tiny", *short, "-o", path["float"]],
        ["prune", path["float"], "--criterion", "l2", "--scope", "layer", trust, "-o", path["pruned"]],
        ["finetune", path["pruned"], *short, trust, "-o", path["tuned"]],
        ["quantize", path["tuned"], *short, trust, "-o", path["int8"]],
        ["bn-fuse", path["int8"], trust, "-o", path["fused"]],
        ["export-onnx", path["fused"], trust, "-o", tmp_path / "int8.onnx"],
    ]
    for step in steps:
        done = micronet(*step)
        assert done.code == 0, done.err
    quantized = load(path["int8"], trust_code=True)
    attention = quantized.model.get_submodule("blocks.layers.0.self_attn")
    assert attention.q_proj.out_features == 12
    assert all(getattr(attention, f"{name}_proj").weight_quantizer is not None for name in ("q", "k", "v", "out"))
    assert "attend()" in quantized.history[-1].result["left_float"]
    sizes = micronet("compare", path["float"], path["pruned"], path["fused"], tmp_path / "int8.onnx", trust, "--json")
    whole, pruned, *_ = sizes.json["rows"]
    assert pruned["macs"] < whole["macs"]
    assert pruned["params"] < whole["params"]
    fused = load(path["fused"], trust_code=True).model.eval()
    steps = compare_layers(fused, onnx.load(tmp_path / "int8.onnx"), torch.rand(4, 3, 32, 32))
    assert len(steps) > 5
    assert max(steps.values()) <= 1
    packed = micronet("pack", path["fused"], trust, "-o", tmp_path / "a.packed")
    assert packed.code == 2
    assert "LayerNormalization" in packed.err and "MatMul" in packed.err


class ValuesFirst(nn.Module):
    """Attention as values (d, S) times transposed scores, viewed as wide as the input, as in YOLO11."""

    def __init__(self):
        super().__init__()
        self.heads = 2
        self.stem, self.qkv, self.mid = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 1), nn.Conv2d(16, 12, 3)
        self.proj, self.head = nn.Conv2d(16, 16, 1), nn.Conv2d(12, 5, 1)

    def forward(self, x):
        x = self.stem(x)
        n, c, h, w = x.shape
        q, k, v = self.qkv(x).view(n, self.heads, 16, h * w).split([4, 4, 8], dim=2)
        scores = (q.transpose(-2, -1) @ k).softmax(-1)
        return self.head(self.mid(x + self.proj((v @ scores.transpose(-2, -1)).view(n, c, h, w))).relu())


@pytest.mark.parametrize(("percent", "cut"), [(0.5, {"mid": 6}), (0.3, {"mid": 9})])
def test_a_size_that_two_groups_share_keeps_only_them_whole(percent, cut):
    model = ValuesFirst().double().eval()
    config = PruneConfig(percent, criterion="l2", scope="layer")
    pruned, _, plan = prune_model(model, config, torch.randn(2, 3, 6, 6))
    widths = {layer: group.after for group in plan.groups.values() for layer in group.layers}
    assert {layer: widths[layer] for layer in cut} == cut
    assert pruned(torch.randn(2, 3, 6, 6).double()).shape == (2, 5, 2, 2)


class Propagates(nn.Module):
    """A graph network: an adjacency matrix times features, whose channels are columns or rows."""

    def __init__(self, rows):
        super().__init__()
        self.first, self.second, self.last, self.rows = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4), rows

    def forward(self, x, adjacency):
        for layer in (self.first, self.second):
            x = layer(x).relu()
            x = (x.transpose(1, 2) @ adjacency).transpose(1, 2) if self.rows else adjacency @ x
        return self.last(x)


@pytest.mark.parametrize("rows", [False, True])
def test_features_that_an_adjacency_matrix_multiplies_lose_channels(rows):
    inputs = torch.randn(2, 5, 8), torch.rand(2, 5, 5)
    pruned, _, _ = prune_model(Propagates(rows).eval(), PruneConfig(0.5, criterion="l2", scope="layer"), inputs)
    assert (pruned.first.out_features, pruned.second.out_features, pruned.last.in_features) == (8, 8, 8)
