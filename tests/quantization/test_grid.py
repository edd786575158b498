"""Weights of any bits with activations of any bits: placement, one training step, and the levels that result."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from micronet.errors import MicronetError
from micronet.models.build import ModelSpec, build_model
from micronet.models.layers import Add
from micronet.quantization.calibrate import calibrate, each_quantizer, observing
from micronet.quantization.calls import COMPUTED_WEIGHT
from micronet.quantization.config import QuantConfig
from micronet.quantization.fold import fold_model
from micronet.quantization.quantize import quantize_model, restore

IMAGES = torch.randn(8, 3, 16, 16)
WEIGHTS = [32, 16, 8, 4, 3, 2, "ternary", "binary"]
ACTIVATIONS = [32, 16, 8, 4, 3, 2, "binary"]


class Residual(nn.Module):
    """A pool between ReLU and convolution, a ReLU that an add reads too, an in-place one, a linear layer."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.relu, self.pool = nn.ReLU(inplace=True), nn.MaxPool2d(2)
        self.conv, self.bn_conv = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.add, self.relu_add = Add(), nn.ReLU(inplace=True)
        self.up = nn.ConvTranspose2d(8, 6, 2, 2)
        self.last, self.fc = nn.Conv2d(6, 6, 3, padding=1, groups=2), nn.Linear(6, 4)

    def forward(self, x):
        x = self.pool(self.relu(self.bn(self.stem(x))))
        x = self.relu_add(self.add(self.bn_conv(self.conv(x)), x))
        x = F.relu(self.last(F.relu(self.up(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def mixtures():
    """Every width of weights with every width of activations, half of them slow; each method meets each width."""
    for row, w_bits in enumerate(WEIGHTS):
        for column, a_bits in enumerate(ACTIVATIONS):
            for number, method in enumerate(["iao", "dorefa", "lsq"]):
                marks = () if (row + column) % 6 == 2 * number else pytest.mark.slow
                if (w_bits, a_bits) != (32, 32):  # quantizes nothing, which is an error of its own
                    yield pytest.param(method, w_bits, a_bits, marks=marks)


@pytest.mark.parametrize(("method", "w_bits", "a_bits"), mixtures())
def test_any_weights_with_any_activations(method, w_bits, a_bits):
    model, record = quantize_model(Residual(), QuantConfig(method=method, w_bits=w_bits, a_bits=a_bits))
    calibrate(model, [IMAGES])
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with observing(model):
        loss = F.cross_entropy(model(IMAGES), torch.arange(8) % 4)
        loss.backward()
        optimizer.step()
    assert torch.isfinite(loss)
    trained = [p.grad is not None and bool((p.grad != 0).any()) for n, p in model.named_parameters() if "conv.w" in n]
    assert all(trained)
    for name, slot, quantizer in each_quantizer(model):
        if slot == "weight_quantizer":
            weight = model.get_submodule(name).weight
            values = quantizer(weight).detach()
            channels = values.transpose(0, quantizer.axis or 0).flatten(1)
            most = (
                {"binary": 2, "ternary": 3}.get(w_bits)
                if quantizer.scheme in ("binary", "ternary")
                else 2**quantizer.bits
            )
            assert max(len(row.unique()) for row in channels) <= most
        assert str(w_bits if slot == "weight_quantizer" else a_bits) != "32"
    again = restore(Residual(), record)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(IMAGES), model.eval()(IMAGES))
    folded, fusion = fold_model(model, [record])
    if a_bits in (8, 16, 32) and w_bits not in ("binary", "ternary"):
        error = (folded(IMAGES) - model(IMAGES)).norm() / model(IMAGES).norm()
        assert error < 0.05
    from micronet.quantization.fold import restore as restore_fold

    reloaded = restore_fold(restore(Residual(), record), fusion)
    reloaded.load_state_dict(folded.state_dict())
    assert torch.equal(reloaded.eval()(IMAGES), folded.eval()(IMAGES))


def test_binary_activations_take_the_place_of_the_relu_and_leave_others_theirs():
    """The oracle: the same network written by hand, signs before its inner layers and ReLUs where others read."""
    config = QuantConfig(w_bits=32, a_bits="binary", first_last="float")
    float_model = Residual().eval()
    for module in float_model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.normal_(module.bias)
    model, record = quantize_model(float_model, config)
    calibrate(model, [IMAGES])
    m = float_model

    def sign(x):
        return torch.where(x >= 0, 1.0, -1.0)

    before = m.bn(m.stem(IMAGES))
    inner = m.bn_conv(m.conv(sign(m.pool(before))))
    joined = inner + m.pool(F.relu(before))
    x = F.relu(m.last(sign(m.up(sign(joined)))))
    expected = m.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
    torch.testing.assert_close(model.eval()(IMAGES), expected, rtol=0, atol=1e-6)
    assert record.result["left_float"] == {"stem": "first or last layer", "fc": "first or last layer"}
    assert set(float_model.state_dict()) == set(model.state_dict())


def test_nin_in_binary_pools_before_its_signs_and_needs_no_new_graph():
    model, record = quantize_model(
        build_model(ModelSpec("nin", {"width": 0.1})), QuantConfig(w_bits="binary", a_bits="binary")
    )
    assert not record.result["taps"]
    assert not record.result["splits"]
    slots = [name for name, slot, _ in each_quantizer(model) if slot == "output_quantizer"]
    assert slots == ["features.0.relu", "features.1.relu", "features.3", "features.4.relu", "features.5.relu",
                     "features.7", "features.8.relu"]  # fmt: skip
    assert len(record.result["dropped"]) == 7
    assert set(record.result["left_float"]) == {"features.0.conv", "features.10.conv"}


@pytest.mark.parametrize("weights", ["binary", "ternary", 4, 32])
@pytest.mark.parametrize("name", ["nin", "nin_gc", "resnet18"])
def test_a_batch_norm_before_signs_becomes_a_threshold(name, weights):
    """T24: gains above, below and at zero; every sign of the folded network is the unfolded one's, in float64."""
    model = build_model(ModelSpec(name, {"width": 0.2}))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            module.weight.data[::3] = 0
    model, record = quantize_model(model, QuantConfig(w_bits=weights, a_bits="binary", first_last="float"))
    images = torch.randn(4, 3, 32, 32)
    calibrate(model, [images])
    model = model.double().eval()
    folded, _ = fold_model(model, [record])
    signs = [record_signs(network, images.double()) for network in (model, folded.eval())]
    assert len(signs[0]) >= 5
    assert signs[0].keys() == signs[1].keys()
    for key in signs[0]:
        assert torch.equal(signs[0][key], signs[1][key]), key
    torch.testing.assert_close(folded(images.double()), model(images.double()), rtol=1e-6, atol=1e-8)


def record_signs(model, images):
    found, hooks = {}, []
    for name, slot, quantizer in each_quantizer(model):
        if quantizer.scheme == "sign":
            hooks.append(
                quantizer.register_forward_hook(lambda m, i, out, key=f"{name}.{slot}": found.update({key: out}))
            )
    model(images)
    for hook in hooks:
        hook.remove()
    return found


def test_float_activations_get_the_ordinary_fusion():
    """T23: with A=32 the fused network equals the unfused."""
    model, record = quantize_model(
        build_model(ModelSpec("nin", {"width": 0.1})), QuantConfig(w_bits="binary", a_bits=32)
    )
    images = torch.randn(4, 3, 32, 32)
    calibrate(model, [images])
    folded, _ = fold_model(model.eval(), [record])
    torch.testing.assert_close(folded(images), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("option", "names"), [("include", {"conv"}), ("exclude", {"up", "last"})])
def test_layers_are_chosen_by_name_and_glob(option, names):
    config = QuantConfig(**{option: "conv" if option == "include" else "u*, last"})
    _, record = quantize_model(Residual(), config)
    every = {"stem", "conv", "up", "last", "fc"}
    assert set(record.result["inputs"]) == (names if option == "include" else every - names)
    with pytest.raises(MicronetError, match=r"unknown layer 'cnov'; allowed: conv"):
        quantize_model(Residual(), QuantConfig(**{option: "cnov"}))


@pytest.mark.parametrize("first_last", ["auto", "float", "8bit", "8bit-input", "same"])
@pytest.mark.parametrize("w_bits", [4, "binary"])
def test_first_and_last_layers_follow_their_rule(w_bits, first_last):
    _, record = quantize_model(Residual(), QuantConfig(w_bits=w_bits, a_bits=4, first_last=first_last))
    found = record.result["quantizers"].get("stem", {}).get("weight_quantizer", {})
    expected = {"float": None, "8bit": 8, "same": 1 if w_bits == "binary" else 4}
    expected["auto"] = expected["float" if w_bits == "binary" else "8bit"]
    expected["8bit-input"] = expected["same"]
    kind = found.get("bits", {"binary": 1}.get(found.get("scheme")))
    assert kind == expected[first_last]
    reads = record.result["quantizers"].get("stem", {}).get("input_quantizer", {}).get("bits")
    assert reads == (None if kind is None else 4 if first_last == "same" else 8)


def test_a_network_in_another_order_of_declaration_is_quantized_alike():
    """T9: the rule for first and last layers follows the graph."""

    class Reordered(Residual):
        def __init__(self):
            super().__init__()
            for name in ("fc", "stem"):
                module = self._modules.pop(name)
                self._modules[name] = module

    wanted = quantize_model(Residual(), QuantConfig(w_bits="ternary"))[1].result
    found = quantize_model(Reordered(), QuantConfig(w_bits="ternary"))[1].result
    assert found["left_float"] == wanted["left_float"]
    assert found["quantizers"] == wanted["quantizers"]


@pytest.mark.parametrize("method", ["dorefa", "lsq"])
def test_asymmetric_grids_need_iao(method):
    with pytest.raises(MicronetError, match="--q-type asym only applies to --method iao"):
        QuantConfig(method=method, q_type="asym")


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    ("kind", "shape"),
    [(nn.ConvTranspose1d, (2, 4, 9)), (nn.ConvTranspose2d, (2, 4, 5, 6)), (nn.ConvTranspose3d, (2, 4, 3, 3, 3))],
)
def test_a_transposed_convolution_at_sixteen_bits_is_the_float_one(kind, shape, groups):
    """T7, T8: every argument of the layer counts, and its scales lie on the axis of its outputs."""
    layer = kind(4, 6, 3, stride=2, padding=1, output_padding=1, groups=groups, bias=groups == 1, dilation=2)
    model, record = quantize_model(nn.Sequential(layer), QuantConfig(w_bits=16, a_bits=16))
    x = torch.randn(*shape)
    calibrate(model, [x])
    assert model[0].weight_quantizer.qparams(model[0].weight).scale.shape == (6 // groups,)
    torch.testing.assert_close(model(x), layer(x), rtol=1e-3, atol=1e-3)
    assert record.result["inputs"]


def test_sixteen_bit_dorefa_without_batch_norm_is_the_float_network():
    """T1: nothing is scaled that is not scaled back."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(1152, 4)
    )
    for module in model:
        if hasattr(module, "weight"):
            nn.init.uniform_(module.weight, -0.02, 0.02)  # where tanh is the identity to 1e-4
    quantized, _ = quantize_model(model, QuantConfig(method="dorefa", w_bits=16, a_bits=16, a_gain=0.3))
    images = IMAGES.clamp(-3, 3)
    calibrate(quantized, [images])
    error = (quantized(images) - model(images)).norm() / model(images).norm()
    assert error < 1e-3


@pytest.mark.parametrize("pool", [nn.AvgPool2d(2), nn.MaxPool2d(2)])
@pytest.mark.parametrize("act", [nn.ReLU(), nn.ReLU6()])
def test_no_sign_is_of_what_is_never_negative(pool, act):
    """A sign behind a ReLU, or behind an average of one, would be +1 everywhere."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), act, pool, nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))
    quantized, record = quantize_model(model, QuantConfig(w_bits=8, a_bits="binary"))
    calibrate(quantized, [IMAGES])
    assert record.result["dropped"] == ["1"]
    seen = []
    quantized[3].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    quantized(IMAGES)
    assert set(seen[0].unique().tolist()) == {-1, 1}
    gated = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sigmoid(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))
    with pytest.raises(MicronetError, match="--exclude 2"):
        quantize_model(gated, QuantConfig(a_bits="binary"))


@pytest.mark.parametrize("value", [0.0, 3.0, -3.0])
def test_constant_activations_calibrate(value):
    model, _ = quantize_model(Residual(), QuantConfig())
    calibrate(model, [torch.full((4, 3, 16, 16), value)])
    assert torch.isfinite(model.eval()(IMAGES)).all()


def test_a_learned_step_of_zeros_can_grow():
    from micronet.quantization.schemes.lsq import LearnedQuantizer

    weight = torch.randn(4, 9)
    weight[1] = 0
    quantizer = LearnedQuantizer(4, True, True, 0, 4)
    quantizer.observe(weight)
    scale = quantizer.qparams(weight).scale
    torch.testing.assert_close(scale[1], scale[[0, 2, 3]].mean())
    quantizer = LearnedQuantizer(4, False, False)
    quantizer.observe(torch.zeros(5))
    assert quantizer(torch.ones(5)).min() > 0.1
    with pytest.raises(MicronetError, match="NaN"):
        LearnedQuantizer(4, False, False).observe(torch.tensor([1.0, float("nan")]))


def test_a_tensor_read_at_two_widths_gets_the_wider():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Conv2d(3 if n == "a" else 8, 8, 1) for n in "abcd")

        def forward(self, x):
            x = F.relu(self.a(x))
            return self.d(F.relu(self.b(x)) + F.relu(self.c(x)))

    _, record = quantize_model(Two(), QuantConfig(w_bits=4, a_bits=4, keep_8bit="c"))
    quantizers = record.result["quantizers"]
    assert quantizers["c"]["weight_quantizer"]["bits"] == 8
    module, _, slot = record.result["inputs"]["c"].rpartition(".")
    assert quantizers[module][slot]["bits"] == 8
    assert quantizers["b"]["weight_quantizer"]["bits"] == 4


def test_only_what_no_layer_reads_stays_float_at_the_outputs():
    """A result that is an output and read by a layer keeps its quantizer; all else is as without the setting."""

    class Outputs(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(3, 3, 1) for _ in range(3))

        def forward(self, x):
            y = self.a(x)
            return y, self.b(y) + self.c(y)

    usual, floats = (
        quantize_model(Outputs(), QuantConfig(float_outputs=each))[1].result["quantizers"] for each in (False, True)
    )
    assert usual["b"].pop("output_quantizer") and usual["c"].pop("output_quantizer")
    assert floats == usual


def test_calls_that_stay_float_are_named():
    class Calls(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.fc, self.w = nn.GRU(4, 4, batch_first=True), nn.Linear(4, 4), nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return F.linear(self.fc(input=F.linear(self.rnn(x)[0], 2 * self.w)), self.fc.weight.t())

    model, record = quantize_model(Calls(), QuantConfig())
    assert record.result["left_float"] == {
        "linear()": COMPUTED_WEIGHT,
        "linear_1()": "its weight is computed from that of fc",
        "rnn": "GRU has no int8 form",
    }
    calibrate(model, [torch.randn(2, 3, 4)])


def test_a_layer_called_twice_follows_its_rule_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.d = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return self.d(F.relu(self.a(F.relu(self.a(x)))))

    _, record = quantize_model(Twice(), QuantConfig(w_bits=2))
    assert record.result["quantizers"]["a"]["weight_quantizer"]["bits"] == 8
    with pytest.raises(MicronetError, match="no layer would be quantized"):
        quantize_model(Twice(), QuantConfig(w_bits="binary"))


def test_sixteen_bit_dorefa_is_exported_whole(tmp_path):
    import copy

    from micronet.onnx.export import with_integers

    model, record = quantize_model(Residual(), QuantConfig(method="dorefa", w_bits=16, a_bits=16))
    calibrate(model, [IMAGES])
    expected = model.eval()(IMAGES)
    exported = with_integers(copy.deepcopy(model), [record])(IMAGES)
    assert (exported - expected).norm() < 1e-3 * expected.norm()


def test_an_untraceable_network_has_no_binary_activations():
    class Untraceable(Residual):
        def forward(self, x):
            return super().forward(x) if x.sum() < 1e9 else x

    with pytest.raises(MicronetError, match=r"torch\.fx can trace"):
        quantize_model(Untraceable(), QuantConfig(a_bits="binary"))


@pytest.mark.parametrize(
    ("options", "rate", "taught"),
    [
        ([], 0.001, False),
        (["--w-bits", 5], 0.002, False),
        (["--a-bits", 2, "--method", "lsq"], 0.005, True),
        (["--a-bits", "binary"], 0.01, True),
        (["--w-bits", "ternary", "--lr", 0.003], 0.003, True),
    ],
    ids=str,
)
def test_the_fewer_the_bits_the_higher_the_rate_and_few_bits_learn_from_the_float_network(
    micronet, chain, tmp_path, options, rate, taught
):
    path = tmp_path / "a.safetensors"
    start = chain / "float.safetensors"
    assert micronet("quantize", start, *options, "--epochs", 1, "--limit", 100, "-o", path).code == 0
    config = micronet("inspect", path, "--json").json["history"][-1]["config"]
    assert config["lr"] == rate
    assert config.get("distill") == (start.name if taught else None)
