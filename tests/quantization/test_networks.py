"""Placement and folding on whole networks."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.ops import DeformConv2d

import micronet
from micronet.errors import MicronetError
from micronet.models import transformer
from micronet.models.build import ModelSpec, build_model
from micronet.onnx.integers import count_integer_layers
from micronet.quantization.calibrate import calibrate, each_quantizer
from micronet.quantization.config import (
    FIXED_WEIGHT,
    NO_DEFORMABLE,
    PRODUCT_OF_TWO,
    RUN_TIME_WEIGHTS,
    STORED_FACTOR,
    QuantConfig,
)
from micronet.quantization.fold import fold_model
from micronet.quantization.functional import broadcast
from micronet.quantization.graph_placer import CONSTANT
from micronet.quantization.quantize import quantize_model, restore
from micronet.quantization.reconstruct import reconstruct
from micronet.quantization.recovery import correct_biases
from tests.graph.test_plain import JoinedBias

IMAGES = torch.randn(8, 3, 32, 32)


class Functional(nn.Module):
    """Functional calls, a shared ReLU, an in-place add and dropout, as users write them."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8 * 16, 4)
        self.relu = nn.ReLU()

    def forward(self, x):
        x = self.relu(self.conv1(x))
        y = self.relu(self.conv2(x))
        y += x
        y = F.max_pool2d(F.relu(y), 8)
        y = F.dropout(y.view(y.size(0), -1), training=self.training)
        return self.fc(y)


class Untraceable(Functional):
    def forward(self, x):
        if x.sum() > 1e9:
            return x
        return super().forward(x)


def randomised(model):
    """Give batch norms statistics, gains (some negative, some zero) and shifts of every kind."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            with torch.no_grad():
                module.weight[0] = 0
    return model.eval()


def test_one_quantizer_a_tensor_on_nin():
    model, record = quantize_model(build_model(ModelSpec("nin", {"width": 0.1})), QuantConfig())
    calibrate(model, [IMAGES])
    slots = [slot for _, slot, _ in each_quantizer(model)]
    assert slots.count("weight_quantizer") == 9
    assert slots.count("input_quantizer") == 1
    assert slots.count("output_quantizer") == 9
    assert not record.result["taps"]
    assert not record.result["left_float"]


def test_both_branches_of_an_add_are_on_grids():
    model, _ = quantize_model(build_model(ModelSpec("resnet18", {"width": 0.1})), QuantConfig())
    calibrate(model, [IMAGES])
    block = model.layers[1][0]
    assert block.bn2.output_quantizer is not None
    assert block.shortcut[1].output_quantizer is not None


@pytest.mark.parametrize("kind", [Functional, Untraceable])
def test_functional_code_is_quantized_and_keeps_its_float_keys(kind):
    model = kind()
    quantized, record = quantize_model(model, QuantConfig())
    calibrate(quantized, [IMAGES])
    assert set(model.state_dict()) <= set(quantized.state_dict())
    assert set(record.result["inputs"]) == {"conv1", "conv2", "fc"}
    assert bool(record.result["taps"]) == (kind is Functional)
    scores = quantized.eval()(IMAGES)
    assert torch.equal(scores, quantized(IMAGES)), "dropout must be off in eval"
    assert F.mse_loss(scores, model.eval()(IMAGES)) < 0.01 * model(IMAGES).var()


def test_a_computed_bias_is_added_behind_an_integer_layer_and_layers_of_constants_stay_float():
    x = torch.randn(4, 4, 6, 6)
    quantized = micronet.quantize(nn.Sequential(nn.Conv2d(4, 4, 1), JoinedBias()).eval(), data=[x], mode="ptq")
    places = quantized.history[-1].result
    assert set(places["inputs"]) == {"0", "1.qkv"}
    assert set(map(places["left_float"].get, ("1.table.0", "1.table.2"))) == {CONSTANT}
    found = count_integer_layers(micronet.export_onnx(quantized, x))
    assert found["linear"]["integer"] == 1 and "1.qkv" not in found["float"]


class Products(nn.Module):
    """A product with a part of a parameter that is no layer's, and two of two activations, one with a stored mask."""

    def __init__(self):
        super().__init__()
        self.layer, self.position = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 6))

    def forward(self, x):
        x = self.layer(x)
        y = (x.relu() @ self.position[: x.shape[-1]]) @ x.mT
        return y, F.scaled_dot_product_attention(x, x, x, attn_mask=self.position[:3, :3])


def test_products_are_named_as_what_they_are():
    record = quantize_model(Products(), QuantConfig())[1]
    assert record.result["left_float"] == {
        "matmul()": STORED_FACTOR, "matmul_1()": PRODUCT_OF_TWO,
        "scaled_dot_product_attention()": PRODUCT_OF_TWO,
    }  # fmt: skip


class Convolutions(nn.Module):
    """Convolutions that have no integers: with kernels that depend on the input, and a deformable one."""

    def __init__(self):
        super().__init__()
        self.layer, self.kernels, self.deep = nn.Conv2d(3, 4, 1), nn.Linear(4, 16), DeformConv2d(4, 4, 1)

    def forward(self, x):
        x = self.layer(x)
        x = F.conv2d(x, self.kernels(x.mean((0, 2, 3))).view(4, 4, 1, 1))
        return self.deep(x, x[:, :2])


@pytest.mark.parametrize("traced", [True, False])
def test_convolutions_without_integers_are_named(traced):
    example = torch.randn(2, 3, 6, 6) if traced else None
    left = quantize_model(Convolutions(), QuantConfig(), example)[1].result["left_float"]
    assert left == {"deep": NO_DEFORMABLE} | ({"conv2d()": RUN_TIME_WEIGHTS} if traced else {})


class Fixed(nn.Module):
    """A blur with a fixed filter, and two convolutions that are merged into an attribute in eval mode."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.first, self.second, self.fc = kind, nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Linear(4, 2)
        self.register_buffer("blur", torch.ones(4, 1, 2, 2) / 4)

    def train(self, mode=True):
        super().train(mode)
        if not mode:
            self.merged = (self.first.weight + self.second.weight).detach()
        return self

    def forward(self, x):
        if self.kind == "blur":
            x = self.first(x) + self.second(x)
            x = F.conv2d(x, self.blur, groups=x.shape[1])
        else:
            x = self.first(x) + self.second(x) if self.training else F.conv2d(x, self.merged)
        return self.fc(x.relu().mean((2, 3)))


@pytest.mark.parametrize(("kind", "more"), [("blur", set()), ("merged", {"first", "second"})])
def test_convolutions_with_fixed_weights_are_named(kind, more):
    left = quantize_model(Fixed(kind).eval(), QuantConfig(), torch.randn(2, 3, 6, 6))[1].result["left_float"]
    assert left.pop("conv2d()") == FIXED_WEIGHT
    assert left.keys() == more


class Modes(nn.Module):
    """Randomness told by an argument, a layer called twice, a tensor read by an add."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.fc = nn.Linear(3, 4)

    def forward(self, x):
        x = F.relu(self.conv(F.relu(self.conv(x) + x)))
        x = F.dropout2d(x, 0.5, training=self.training)
        return self.fc(F.dropout(x, 0.1, False).mean((2, 3)))


def test_randomness_follows_the_mode_after_quantization():
    model = Modes().eval()
    quantized = micronet.quantize(model).model
    calibrate(quantized, [IMAGES])
    assert torch.equal(quantized.eval()(IMAGES), quantized(IMAGES))
    assert (quantized(IMAGES) - model(IMAGES)).norm() < 0.05 * model(IMAGES).norm()
    assert not torch.equal(quantized.train()(IMAGES), quantized(IMAGES))


def test_a_forward_that_differs_by_mode_is_not_frozen_in_one():
    class Auxiliary(Functional):
        def forward(self, x):
            scores = super().forward(x)
            return (scores, scores) if self.training else scores

    quantized = micronet.quantize(Auxiliary()).model
    calibrate(quantized, [IMAGES])
    assert isinstance(quantized.train()(IMAGES), tuple)
    assert isinstance(quantized.eval()(IMAGES), torch.Tensor)


def test_nan_weights_are_found():
    model = Functional()
    with torch.no_grad():
        model.conv1.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(MicronetError, match="NaN"):
        calibrate(micronet.quantize(model).model, [IMAGES])


def _tied():
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3))
    model[2].weight = model[0].weight
    return model


def _parametrized():
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4))


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (_tied, (2, 3, 9, 9)),
        (_parametrized, (2, 3, 9, 9)),
        (lambda: nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6)), (2, 6, 5)),
    ],
    ids=["tied", "parametrized", "three-dimensional"],
)
def test_what_cannot_be_folded_is_left_alone(make, shape):
    with pytest.raises(MicronetError, match="nothing to fold"):
        fold_model(make().eval())


def test_a_linear_layers_batch_norm_folds_behind_a_flatten():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4)).double()
    nn.init.normal_(model[2].running_mean)
    x = torch.randn(5, 3, 2, 2).double()
    torch.testing.assert_close(fold_model(model.eval())[0](x), model(x), rtol=1e-10, atol=1e-10)


def test_first_and_last_layers_keep_eight_bits():
    model, _ = quantize_model(build_model(ModelSpec("nin", {"width": 0.1})), QuantConfig(w_bits=4, a_bits=4))
    bits = [quantizer.bits for _, slot, quantizer in each_quantizer(model) if slot == "weight_quantizer"]
    assert bits == [8, *[4] * 7, 8]
    same, _ = quantize_model(build_model(ModelSpec("nin", {"width": 0.1})), QuantConfig(w_bits=4, first_last="same"))
    assert {quantizer.bits for _, slot, quantizer in each_quantizer(same) if slot == "weight_quantizer"} == {4}


def test_a_network_whose_layers_all_stay_float_is_refused_with_the_reasons():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(MicronetError, match=r"0, 2 \(first or last layer\); to .* add --first-last 8bit"):
        quantize_model(model, QuantConfig(w_bits="binary", a_bits="binary"))
    assert (
        len(quantize_model(model, QuantConfig(w_bits="binary", a_bits="binary", first_last="8bit"))[1].result["inputs"])
        == 2
    )
    with pytest.raises(MicronetError, match="has no convolution or linear layers to quantize; define them as modules"):
        quantize_model(nn.ReLU(), QuantConfig())


def test_the_model_given_is_not_changed():
    model = Functional()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calibrate(quantize_model(model, QuantConfig())[0], [IMAGES])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert type(model.conv1) is nn.Conv2d


def test_calibration_changes_neither_weights_nor_batch_norms():
    model, _ = quantize_model(build_model(ModelSpec("nin", {"width": 0.1})), QuantConfig())
    names = [name for name in model.state_dict() if "quantizer" not in name]
    before = {name: model.state_dict()[name].clone() for name in names}
    calibrate(model.train(), [IMAGES, 3 * IMAGES])
    assert all(torch.equal(before[name], model.state_dict()[name]) for name in names)
    assert model.training


def test_a_layer_that_is_never_called_is_reported_and_an_uncalled_one_found():
    attention = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    attention.unused = nn.Linear(3, 3)
    attention.forward = lambda x: attention[1](attention[0](x))
    with pytest.raises(MicronetError, match="at least one batch"):
        calibrate(micronet.quantize(Functional()).model, [])


@pytest.mark.parametrize("name", ["nin", "nin_gc", "resnet18", "torchvision:resnet18"])
def test_folding_float_is_exact(name):
    args = {} if ":" in name else {"width": 0.1}
    model = randomised(build_model(ModelSpec(name, args))).double()
    folded, _ = fold_model(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    x = IMAGES.double()
    torch.testing.assert_close(folded(x), model(x), rtol=1e-9, atol=1e-9)


def test_folding_a_transposed_convolution_is_exact():
    for groups in (1, 2):
        model = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, 2, groups=groups), nn.BatchNorm2d(6))
        randomised(model).double()
        x = torch.randn(2, 4, 5, 5).double()
        torch.testing.assert_close(fold_model(model)[0](x), model(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("q_type", ["sym", "asym"])
@pytest.mark.parametrize("q_level", ["channel", "layer"])
def test_folding_a_quantized_network_keeps_its_integers(q_level, q_type):
    model = randomised(build_model(ModelSpec("nin", {"width": 0.2})))
    quantized, _ = quantize_model(model, QuantConfig(q_level=q_level, q_type=q_type))
    calibrate(quantized, [IMAGES])
    folded, _ = fold_model(quantized)
    for name in ("features.0", "features.1", "features.8"):
        before, after = quantized.get_submodule(name), folded.get_submodule(name)
        gain = before.bn.weight
        sign = broadcast(gain.sign(), before.conv.weight, 0)
        old = before.conv.weight_quantizer
        levels = old.integers(before.conv.weight) - broadcast(old.zero_point, before.conv.weight, old.axis)
        new = after.conv.weight_quantizer
        found = new.integers(after.conv.weight) - broadcast(new.zero_point, after.conv.weight, new.axis)
        assert torch.equal(found, levels * sign)
        assert float(new.scale[0]) == 1
    difference = (folded.eval()(IMAGES) - quantized.eval()(IMAGES)).norm() / quantized(IMAGES).norm()
    assert difference < 0.02  # values that lie on a rounding boundary may fall to the other side


class Attending(nn.Module):
    """Self-attention between linear layers, as torch has it; ``reads``: its forward reads the attention's tensors."""

    def __init__(self, reads=False):
        super().__init__()
        self.reads = reads
        self.embed = nn.Linear(6, 8)
        self.inner = nn.TransformerEncoderLayer(8, 2, dim_feedforward=12, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.embed(x)
        if self.reads:
            x = x * self.inner.self_attn.in_proj_weight.sum()
        return self.head(self.inner(x).mean(1))


TOKENS = torch.randn(32, 5, 6, generator=torch.Generator().manual_seed(1))
PROJECTIONS = [f"inner.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")]


def test_attention_is_quantized_layer_by_layer():
    model = Attending()
    quantized, record = quantize_model(model, QuantConfig(w_bits=16, a_bits=16))
    calibrate(quantized, [TOKENS])
    assert set(PROJECTIONS) < set(record.result["inputs"])
    assert len({record.result["inputs"][name] for name in PROJECTIONS[:3]}) == 1  # one tensor, one grid
    assert list(record.result["left_float"]) == ["attend()"]  # the products of activations
    torch.testing.assert_close(quantized.eval()(TOKENS), model.eval()(TOKENS), rtol=0, atol=1e-2)
    again = restore(Attending(), record)
    again.load_state_dict(quantized.state_dict())
    assert torch.equal(again.eval()(TOKENS), quantized(TOKENS))
    assert type(model.inner.self_attn) is nn.MultiheadAttention


def test_attention_whose_tensors_a_forward_reads_stays_as_it_is():
    quantized, record = quantize_model(Attending(reads=True), QuantConfig())
    assert type(quantized.inner.self_attn) is nn.MultiheadAttention
    assert "inner.self_attn" in record.result["left_float"]


def test_recovery_reaches_the_layers_of_attention(monkeypatch):
    monkeypatch.setattr("micronet.quantization.adaround.STEPS", 20)
    model = Attending().eval()
    quantized, _ = quantize_model(model, QuantConfig(w_bits=3, a_bits=32, first_last="same"))
    calibrate(quantized, [TOKENS])
    reference = transformer.with_split_layers(model, transformer.splittable_attentions(model))
    assert reconstruct(reference, quantized, [TOKENS], "layer").layers == len(PROJECTIONS) + 4
    assert correct_biases(reference, quantized, [TOKENS]) == len(PROJECTIONS) + 4
    means = [{name: mean_of(network, name) for name in PROJECTIONS} for network in (reference, quantized)]
    for name in PROJECTIONS:
        torch.testing.assert_close(means[1][name], means[0][name], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def mean_of(network, name):
    """Return what a layer gives on average, channel by channel."""
    given = []
    handle = network.get_submodule(name).register_forward_hook(lambda module, inputs, out: given.append(out))
    network.eval()(TOKENS)
    handle.remove()
    return given[0].mean((0, 1))


def test_layers_inside_a_module_that_is_a_leaf_are_said_to_be():
    inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    inner.is_leaf = True
    left = quantize_model(nn.Sequential(nn.Linear(4, 4), inner, nn.Linear(4, 2)), QuantConfig())[1].result["left_float"]
    assert left == {"1.0": "is_leaf leaves 1 as it is"}


class Spectral(nn.Module):
    """A complex layer first, a scripted one last, and one of real numbers between them."""

    def __init__(self):
        super().__init__()
        self.first, self.middle = nn.Linear(4, 8, dtype=torch.cfloat), nn.Linear(8, 6)
        self.head = torch.jit.script(nn.Sequential(nn.ReLU(), nn.Linear(6, 3)))

    def forward(self, x):
        return self.head(self.middle(self.first(x.to(torch.cfloat)).abs()))


def test_layers_of_complex_numbers_and_scripted_ones_stay_in_float_with_that_reason():
    inputs = torch.randn(16, 4)
    small = micronet.quantize(Spectral().eval(), data=[inputs], mode="ptq")
    assert small.history[-1].result["inputs"].keys() == {"middle"}
    assert small.left_float == {
        "first": "its weights are complex numbers",
        "head.1": "it is part of a TorchScript network (torch.jit.script or trace)",
    }
    with pytest.raises(MicronetError, match=r"to ONNX: head is a TorchScript network \(.*\); use"):
        micronet.export_onnx(small, inputs)
    traced = nn.Sequential(torch.jit.trace(nn.Linear(4, 6), inputs), nn.Linear(6, 3))
    assert "TorchScript" in micronet.quantize(traced, data=[inputs], mode="ptq").left_float["0"]


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (torch.jit.trace(nn.Linear(4, 6), torch.ones(1, 4)), "the network is a TorchScript network"),
        (nn.Sequential(nn.Linear(4, 6), nn.LazyLinear(3)), "the network has lazy layers"),
        (
            nn.Linear(4, 6).double(),
            r"does not accept float32 \(N, 4\).*; data are read as float32, so .* net\.float\(\)",
        ),
    ],
)
def test_networks_that_cannot_be_quantized_as_they_are_say_what_to_pass(network, message):
    with pytest.raises(MicronetError, match=message):
        micronet.quantize(network, data=[(torch.ones(16, 4).double(), torch.ones(16).long())], mode="ptq")
