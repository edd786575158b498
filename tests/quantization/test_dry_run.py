"""No quantizer without effect is placed: what a network never applies, or throws away, stays float and says so."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook

import micronet
from micronet.errors import MicronetError
from micronet.models import device
from micronet.quantization import quantize
from micronet.quantization.calibrate import calibrate, each_quantizer
from micronet.quantization.config import QuantConfig
from micronet.quantization.dry_run import NEVER_CALLED, NO_EFFECT, PARTLY_EMPTY, find_idle
from micronet.quantization.layers import Quantized
from micronet.quantization.placer import INFINITE_INPUT, LayerPlacer
from micronet.quantization.quantize import quantize_model, restore

IMAGES = torch.randn(4, 3, 8, 8)


class Plain(nn.Module):
    """Two convolutions, one of them behind a gain of 0, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.stem, self.branch, self.other = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.gain = nn.Parameter(torch.zeros(4, 1, 1))
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        x = self.stem(x).relu()
        x = x + self.gain * self.branch(x)
        return self.fc(x.mean((2, 3)))


class Discards(Plain):
    def forward(self, x):
        self.other(self.stem(x))  # computed, and not used
        return super().forward(x)


class Untraceable(Discards):
    def forward(self, x):
        return super().forward(x if bool(torch.isin(x, IMAGES).all()) else 2 * x)


class Bypasses(Untraceable):
    def forward(self, x):
        x = F.conv2d(x, self.stem.weight, self.stem.bias).relu()
        x = x + self.gain * self.branch(x)
        return self.fc((x if bool(torch.isin(x, IMAGES).any()) else 1 * x).sum((2, 3)))


@pytest.mark.parametrize("kind", [Plain, Discards, Untraceable, Bypasses])
def test_every_quantizer_has_an_effect_or_its_layer_is_named(kind, monkeypatch):
    torch.manual_seed(0)
    model = kind().eval()
    if kind is Bypasses:
        monkeypatch.setattr(quantize, "trace", lambda *_: None)
    made, record = quantize_model(model, QuantConfig(), IMAGES)
    left = record.result["left_float"]
    assert "other" in left
    assert ("stem" in left) == (kind is Bypasses)
    if kind is Untraceable:
        assert left["other"] == NO_EFFECT
    if kind is Bypasses:
        assert left["stem"] == NEVER_CALLED
    assert find_idle(made, IMAGES) == {}
    made.get_parameter("gain").data.fill_(1)
    calibrate(made, [IMAGES])
    whole = made.eval()(IMAGES)
    for name, _, quantizer in each_quantizer(made):  # in two levels, each changes the output
        with monkeypatch.context() as patch:
            patch.setattr(quantizer, "forward", lambda x, **_: torch.where(x >= 0, 1.0, -1.0) * x.abs().mean())
            assert not torch.equal(made(IMAGES), whole), name
    again = restore(kind().eval(), record)
    again.load_state_dict(made.state_dict())
    assert torch.equal(again.eval()(IMAGES), whole)


class Chooses(nn.Module):
    """A layer for the samples whose first number is positive, and one for the others."""

    def __init__(self):
        super().__init__()
        self.negative, self.positive = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        chosen = x[:, 0] > 0
        negative, positive = self.negative(x[~chosen]), self.positive(x[chosen])
        return torch.cat([negative, positive])


def test_a_layer_that_only_other_samples_than_the_example_reach_is_quantized():
    rows = torch.linspace(-1, 1, 32).view(8, 4)
    config = QuantConfig(first_last="8bit")
    assert quantize_model(Chooses(), config, rows[:2])[1].result["left_float"] == {"positive": NO_EFFECT}
    assert quantize_model(Chooses(), config, rows[:2], batches=[rows[:2], rows])[1].result["left_float"] == {}
    assert micronet.quantize(Chooses(), mode="ptq", data=[rows], first_last="8bit").left_float == {}


def test_the_callers_random_numbers_stay_as_they_are():
    model = Plain()
    before = torch.get_rng_state()
    quantize_model(model, QuantConfig(), IMAGES)
    assert torch.equal(torch.get_rng_state(), before)


class Shifts(nn.Module):
    """A sum with a stored mask, between layers that run in integers."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)
        self.register_buffer("mask", torch.full((6, 6), -torch.inf).triu(1))

    def forward(self, x):
        return self.second((self.first(x) + self.mask).relu())


def test_a_sum_with_infinities_stays_float():
    made = micronet.quantize(Shifts(), mode="ptq", data=[IMAGES[:, :, :8, :8]], first_last="8bit")
    assert any("infinity" in why for why in made.left_float.values())
    assert made.model.eval()(IMAGES[:, :, :8, :8]).isfinite().all()


class PaddedPool(nn.Module):
    """A pool of what is padded with -infinity, as in timm's ResNets, and a pool that keeps infinities."""

    def __init__(self, keeps):
        super().__init__()
        self.first, self.second, self.keeps = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 1), keeps
        self.second.weight.data.abs_()  # so that no infinities of both signs are added

    def forward(self, x):
        padded = F.pad(self.first(x), (1, 1, 1, 1), value=-torch.inf)
        return self.second(F.max_pool2d(padded, 1 if self.keeps else 3, 1)).relu().mean((2, 3))


@pytest.mark.parametrize("keeps", [False, True])
def test_a_layer_behind_a_pool_of_infinite_padding_is_quantized_if_it_reads_finite_values(keeps):
    made = micronet.quantize(PaddedPool(keeps), mode="ptq", data=[IMAGES[:, :, :8, :8]], first_last="8bit")
    assert isinstance(made.model.second, Quantized) is not keeps
    assert (made.left_float.get("second") == INFINITE_INPUT) is keeps
    assert made.model.eval()(IMAGES[:, :, :8, :8]).isfinite().all()


class Attends(nn.Module):
    """Attention whose mask is added to its scores: a buffer, computed from the input, or a logarithm."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.query, self.key, self.value = (nn.Linear(6, 8) for _ in range(3))
        self.fc = nn.Linear(8, 4)
        self.register_buffer("mask", torch.full((5, 5), -torch.inf).triu(1))

    def forward(self, x):
        mask = self.mask
        if self.kind == "computed":
            mask = torch.zeros_like(x[..., 0]).masked_fill(x[..., 0] > 2, -torch.inf).unsqueeze(1)
        elif self.kind == "logarithm":
            mask = torch.log((self.query(x).mean(-1) * (x[..., 0] <= 2)).abs()).unsqueeze(1)
        scores = self.query(x) @ self.key(x).transpose(1, 2) + mask
        return self.fc((scores.softmax(-1) @ self.value(x)).mean(1))


@pytest.mark.parametrize(("method", "later"), [("iao", False), ("lsq", True), ("dorefa", True)])
@pytest.mark.parametrize("mode", ["ptq", "qat"])
@pytest.mark.parametrize("kind", ["buffer", "computed", "logarithm"])
def test_tensors_with_infinities_stay_float_and_the_rest_is_quantized(tmp_path, kind, mode, method, later):
    torch.manual_seed(0)
    model = Attends(kind).eval()
    batches = [torch.randn(8, 5, 6).clamp(max=1.9) for _ in range(2)]
    batches[later][0, 0, 0] = 3  # which the mask hides; later: in other inputs than those of the dry run
    made = micronet.quantize(model, mode=mode, method=method, data=batches)
    layers = {name for name, module in made.model.named_modules() if isinstance(module, Quantized)}
    assert layers >= {"query", "key", "value", "fc"}
    outputs = made.model.eval()(batches[1])
    assert outputs.isfinite().all()
    if mode == "ptq" and method == "iao":
        for _ in ("written", "read"):
            again = micronet.quantize(model, mode="ptq", data=batches, calib_cache=tmp_path / "cache")
            assert torch.equal(again.model.eval()(batches[1]), outputs) and again.left_float == made.left_float


def test_nan_is_an_error():
    with pytest.raises(MicronetError, match="NaN or infinity reached"):
        micronet.quantize(Attends("buffer").eval(), mode="ptq", data=[torch.full((2, 5, 6), torch.nan)])


def test_sizes_are_no_values_to_quantize():
    class Sized(Plain):
        def forward(self, x):
            x = F.avg_pool2d(self.stem(x).relu(), x.shape[-2:] if x.shape[-1] < 6 else 2)
            x = F.avg_pool2d(self.branch(x), x.shape[-2:])
            return self.fc((x + x.shape[1]).flatten(1))

    made, record = quantize_model(Sized().eval(), QuantConfig(), IMAGES)
    calibrate(made, [IMAGES])
    assert not record.result["left_float"].keys() - {"other"} and find_idle(made, IMAGES) == {}


class Deep(nn.Module):
    """Six residual blocks that begin as identities, and one layer whose values are thrown away."""

    def __init__(self, output):
        super().__init__()
        self.output, self.runs = output, 0
        self.blocks, self.norms = (nn.ModuleList(make(4) for _ in range(6)) for make in (_convolution, nn.BatchNorm2d))
        self.unused, self.fc = nn.Conv2d(4, 4, 1), nn.Linear(4, 3)
        for norm in self.norms:
            nn.init.zeros_(norm.weight)

    def forward(self, x):
        self.runs += 1
        for block, norm in zip(self.blocks, self.norms, strict=True):
            x = x + norm(block(x))
        self.unused(x)
        return self.output(self.fc(x.mean((2, 3))))


def _convolution(channels):
    return nn.Conv2d(channels, channels, 1)


@pytest.mark.parametrize(
    ("output", "idle", "runs"),
    [
        (lambda x: x, {"unused"}, 2),  # the gradient decides, and one more run for the unused layer
        (lambda x: x > -1e6, {"unused"}, 24),  # no gradient: one run for each, and to find that so
        (lambda x: (x.pow(2), x.relu_()), {"unused"}, 25),  # nor here: ReLU overwrites what it needs
    ],
    ids=["values", "booleans", "in-place"],
)
def test_few_runs_find_what_has_no_effect(output, idle, runs):
    torch.manual_seed(0)
    model = LayerPlacer(Deep(output).eval(), QuantConfig(), ()).placement.apply(Deep(output).eval())
    found = find_idle(model, torch.rand(2, 4, 3, 3))
    assert {name.split(".")[0] for name in found} == idle and model.runs <= runs


class Detector(Plain):
    """Returns the rows of scores above a threshold, and with ``sure`` set also a sum of all scores."""

    def __init__(self, threshold, sure=False):
        super().__init__()
        self.threshold, self.sure = threshold, sure

    def forward(self, x):
        scores = super().forward(x)
        found = self.other(x[:, :1].expand(-1, 4, -1, -1)).mean((2, 3))[scores.amax(1) > self.threshold]
        return [found, self.fc(x.mean((2, 3))[:, :1].expand(-1, 4)) if self.sure else scores[scores > self.threshold]]


def test_a_quantizer_whose_values_stop_the_forward_has_an_effect():
    class Best(Detector):
        def forward(self, x):
            found, _ = super().forward(x)
            return found.max(0).values.isfinite()  # no gradient; of no rows, there is no maximum

    assert quantize_model(Best(-9.0).eval(), QuantConfig(), IMAGES)[1].result["left_float"] == {}


def test_a_detector_that_finds_nothing_is_refused_and_told_why():
    assert quantize_model(Detector(-9.0).eval(), QuantConfig(), IMAGES)[1].result["inputs"]
    with pytest.raises(MicronetError, match=r"output is empty for the example .*--data .*score threshold"):
        quantize_model(Detector(9.0).eval(), QuantConfig(), IMAGES)


def test_a_layer_that_reaches_an_empty_output_alone_is_told_so():
    result = quantize_model(Detector(9.0, sure=True).eval(), QuantConfig(), IMAGES)[1].result
    assert result["left_float"]["other"] == PARTLY_EMPTY
    assert "fc" in result["inputs"]


class AllButFirst(Plain):
    def forward(self, x):
        return super().forward(x)[1:]


@pytest.mark.parametrize(("kind", "samples"), [(Plain, [1]), (AllButFirst, [1, 4])])
def test_large_inputs_are_checked_by_one_sample_if_that_gives_a_result(kind, samples, monkeypatch):
    made, sizes = quantize_model(kind().eval(), QuantConfig())[0], []
    made.stem.register_forward_hook(lambda _, inputs, output: sizes.append(len(inputs[0])))
    monkeypatch.setattr(device, "_LARGE", 1)
    assert find_idle(made, IMAGES) == {}
    assert list(dict.fromkeys(sizes)) == samples


def test_progress_names_the_slow_steps():
    labels = []
    progress = SimpleNamespace(step=lambda label, done, total: labels.append(label))
    quantize_model(Plain().eval(), QuantConfig(), IMAGES, progress=progress)
    assert list(dict.fromkeys(labels)) == ["tracing the network", "checking the quantizers"]


def test_ptq_runs_each_calibration_batch_once():
    sizes = []

    def look(module, inputs, output):
        if isinstance(module, nn.Conv2d) and module.in_channels == 3:
            sizes.append(len(inputs[0]))

    handle = register_module_forward_hook(look)
    micronet.quantize(Plain(), data=[torch.rand(5, 3, 8, 8), torch.rand(6, 3, 8, 8)], mode="ptq")
    handle.remove()
    assert sizes.count(6) == 1
    assert sizes.count(5) == 2  # once to see whether the network accepts such inputs


class Stream(nn.Module):
    """Blocks that add to a stream in which one channel is far larger; norms read it, and convolutions if ``conv``."""

    def __init__(self, conv):
        super().__init__()
        self.stem, self.norm, self.head = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)
        self.conv = nn.Conv1d(8, 8, 3, padding=1) if conv else None
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(3)
        )

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
            if self.conv is not None:
                x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        return self.head(self.norm(x)), x[..., 1:]


@pytest.mark.parametrize("conv", [False, True], ids=["norms", "norms and convolutions"])
def test_a_stream_of_sums_that_no_runtime_computes_in_integers_is_not_rounded(conv):
    torch.manual_seed(0)
    net, x = Stream(conv).eval(), torch.randn(64, 5, 6)
    net.stem.bias.data[0] = 2000.0
    made = micronet.quantize(net, mode="ptq", data=[x], first_last="8bit")
    assert made.left_float == {}
    assert not any(name.startswith("add") and name.endswith("_tap") for name, _, _ in each_quantizer(made.model))
    if not conv:  # which reads the large channel in 8 bits
        with torch.no_grad():
            assert (made.model(x)[1] - net(x)[1]).abs().max() < 2000 / 255 / 20  # a step of a stream in 8 bits, by far


class Rereads(Stream):
    """Two layers read a sum that the stream goes on with; ``infinite``: which holds infinity."""

    def __init__(self, infinite=False):
        super().__init__(conv=False)
        self.q, self.k, self.infinite = nn.Linear(8, 8), nn.Linear(8, 8), infinite

    def forward(self, x):
        x = self.norm(self.stem(x))
        total = x + self.blocks[0](x)
        if self.infinite:
            total = total + torch.where(x > 1, float("inf"), 0.0)
        k = torch.sigmoid(self.k(total)).nan_to_num()  # called before q
        return self.head(self.norm(x + k * torch.sigmoid(self.q(total)).nan_to_num() + torch.sigmoid(total)))


@pytest.mark.parametrize("bits", [4, "binary"])
@pytest.mark.parametrize("layer", ["k", "q"])  # the first and the second that reads it
def test_a_layer_that_keeps_8_bits_gets_them_from_a_sum_that_layers_of_fewer_bits_read_too(layer, bits):
    _, record = quantize_model(
        Rereads().eval(), QuantConfig(w_bits=bits, a_bits=bits, keep_8bit=layer), torch.randn(4, 5, 6)
    )
    place, other = (record.result["inputs"][name].rpartition(".")[0] for name in (layer, "q" if layer == "k" else "k"))
    assert record.result["quantizers"][place]["output_quantizer"]["bits"] == 8
    if bits == "binary":
        assert record.result["quantizers"][other]["output_quantizer"]["scheme"] == "sign"


def test_a_layer_that_reads_a_sum_with_infinity_stays_float():
    _, record = quantize_model(Rereads(infinite=True).eval(), QuantConfig(), torch.randn(4, 5, 6))
    assert {"q", "k"} <= record.result["left_float"].keys()


class Picks(Plain):
    """A layer reaches only samples whose mean is positive."""

    def forward(self, x):
        y = self.stem(x).relu()
        y = torch.where(x.mean((1, 2, 3), keepdim=True) > 0, self.other(y), y)
        return self.fc(y.mean((2, 3)))


def test_a_quantizer_without_effect_on_the_first_of_large_inputs_is_tried_on_all(monkeypatch):
    monkeypatch.setattr(device, "_LARGE", 1)
    _, record = quantize_model(Picks().eval(), QuantConfig(), torch.stack([-torch.ones(3, 8, 8), torch.ones(3, 8, 8)]))
    assert "other" in record.result["inputs"]


class Positions(nn.Module):
    """As RoBERTa: the places in a table are sums of integers."""

    def __init__(self):
        super().__init__()
        self.words, self.places, self.head = nn.Embedding(9, 4), nn.Embedding(9, 4), nn.Linear(4, 2)

    def forward(self, x):
        known = x.ne(0).int()
        places = torch.cumsum(known, 1).int() * known + known
        return self.head(torch.relu(self.words(x) + self.places(places)))


def test_sums_of_integers_are_no_activations():
    made = micronet.quantize(Positions(), mode="ptq", data=[torch.randint(9, (4, 5))], task="agreement")
    assert not made.left_float


@torch.fx.wrap
def add_into(x, y):
    x += y


class Shortcut(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 4, 1)

    def forward(self, x):
        y = self.first(x).sigmoid()
        add_into(y, 4 * x)
        return self.last(y)


@pytest.mark.parametrize("hidden", ["", "from_the_trace", "from_the_checks"])
def test_a_function_that_torch_fx_keeps_whole_may_write_into_its_arguments(hidden, monkeypatch):
    if hidden:
        monkeypatch.setattr("micronet.graph.trace.hides_work", lambda *_: False)
    if hidden == "from_the_checks":
        monkeypatch.setattr("micronet.graph.rewrite.is_opaque", lambda _: False)
    torch.manual_seed(0)
    model = Shortcut().eval()
    quantized, record = quantize_model(model, QuantConfig(w_bits=16, a_bits=16, first_last="same"), IMAGES)
    calibrate(quantized, [IMAGES])
    assert (quantized(IMAGES) - model(IMAGES)).norm() < 1e-3 * model(IMAGES).norm()
    assert record.result["inputs"].keys() == {"first", "last"}
