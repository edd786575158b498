"""What makes a training fast: Muon, whitening, averages, alternating flips, cutout, growing images, presets."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from micronet.artifact.artifact import Artifact
from micronet.data.batches import Normalize, alternate, cut_out, train_batches
from micronet.data.dataset import Dataset, DataSource, DataSpec
from micronet.data.split import MemorySplit
from micronet.errors import MicronetError
from micronet.models.build import ModelSpec, build_model
from micronet.tasks.classification import Classification
from micronet.training import preset
from micronet.training.average import WeightAverage
from micronet.training.checkpoint import _load_optimizer
from micronet.training.config import PRESETS, RunContext, TrainConfig, image_size
from micronet.training.muon import RELATIVE_STEP, Muon, find_matrices, orthogonalize
from micronet.training.preset import batch_size, muon_lr, settle
from micronet.training.step import make_optimizer
from micronet.training.whitening import whitening_filters

CPU = torch.device("cpu")


def photos(augment="crop-flip", count=64, size=8):
    """Return a data set of random images whose pixels resemble their neighbours."""
    noise = torch.rand(count, 3, size + 2, size + 2, generator=torch.Generator().manual_seed(0))
    images = (255 * F.avg_pool2d(noise, 3, 1)).to(torch.uint8)
    split = MemorySplit(images, torch.arange(count) % 4)
    source = DataSource(lambda: split, lambda: split, list("abcd"), lambda: split, augment=augment)
    return Dataset(source, DataSpec("photos"), Classification())


def network(first=None):
    return nn.Sequential(
        first or nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


@pytest.mark.parametrize("shape", [(2, 5, 9), (1, 9, 5), (3, 1, 4)])
def test_orthogonalized_matrices_keep_their_singular_vectors_and_lose_their_singular_values(shape):
    u, _, v = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    values = torch.logspace(0, -2, u.shape[-1], dtype=torch.float64)
    inside = u.mT @ orthogonalize(u * values @ v) @ v.mT
    found = inside.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(inside, torch.diag_embed(found), rtol=0, atol=1e-12)
    assert (found > 0.6).all() and (found < 1.3).all()  # the quintic's range, from singular values above 0.01


def test_a_step_is_a_share_of_the_weights_norm_however_large_the_gradient_and_may_keep_the_norm():
    weight, gradient = torch.randn(2, 6, 3, 3, 3, dtype=torch.float64)
    moved = []
    for scale, keep_norm, decay in ((1.0, False, 0.0), (1e6, False, 0.0), (1.0, True, 0.0), (1.0, True, 0.5)):
        parameter = nn.Parameter(weight.clone())
        options = {"groups": 2, "keep_norm": keep_norm, "weight_decay": decay}
        optimizer = Muon([{"params": [parameter], **options}], lr=0.001)
        parameter.grad = scale * gradient
        optimizer.step()
        moved.append(parameter.detach())
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-9, atol=1e-9)
    share = (moved[0] - weight).norm() / weight.norm() / (0.001 * RELATIVE_STEP)
    assert 0.6 < share < 1.3  # as the singular values
    torch.testing.assert_close(moved[2].norm(), weight.norm())
    torch.testing.assert_close(moved[2] / moved[2].norm(), moved[0] / moved[0].norm())
    torch.testing.assert_close(moved[3], moved[0] * (1 - 0.001 * 0.5))  # a decayed norm is not kept


@pytest.mark.parametrize("turn", [1, 1 + 2j])
def test_what_is_no_matrix_is_stepped_as_by_adam(turn):
    own, theirs = (nn.Parameter(turn * torch.linspace(-1, 1, 7, dtype=torch.float64)) for _ in range(2))
    optimizers = [Muon([{"params": [own]}], lr=0.01), torch.optim.Adam([theirs], lr=0.01)]
    for _ in range(5):
        for parameter, optimizer in zip((own, theirs), optimizers, strict=True):
            parameter.grad = parameter.detach() ** 2 - 0.3
            optimizer.step()
    torch.testing.assert_close(own, theirs, rtol=1e-12, atol=1e-12)


class Words(nn.Module):
    """Embeddings tied to the scores, a depthwise and a grouped convolution, attention, a layer of zeros."""

    def __init__(self):
        super().__init__()
        self.words, self.scores = nn.Embedding(5, 8), nn.Linear(8, 5)
        self.scores.weight = self.words.weight
        self.depthwise, self.grouped = nn.Conv1d(8, 8, 3, padding=1, groups=8), nn.Conv1d(8, 8, 1, groups=2)
        self.norm, self.attention, self.zeros = nn.BatchNorm1d(8), nn.MultiheadAttention(8, 2), nn.Linear(8, 8)
        nn.init.zeros_(self.zeros.weight)

    def forward(self, x):
        x = self.norm(self.grouped(self.depthwise(self.words(x).transpose(1, 2)))).transpose(1, 2)
        return self.scores(x + self.zeros(self.attention(x, x, x)[0]))


def test_matrices_are_the_weights_between_inputs_and_scores():
    model = Words()
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert {names[weight]: (kind["groups"], kind["keep_norm"]) for weight, kind in find_matrices(model).items()} == {
        "grouped.weight": (2, True), "attention.in_proj_weight": (3, False), "attention.out_proj.weight": (1, False),
    }  # fmt: skip
    nin = build_model(ModelSpec("nin", {"width": 0.1}))  # its last convolution has a norm too
    assert all(kind["keep_norm"] for kind in find_matrices(nin).values())
    assert len(find_matrices(nin)) == 9
    assert list(find_matrices(network()).values()) == [{"groups": 1, "keep_norm": True}]
    assert not find_matrices(nn.Sequential(nn.Linear(4, 4, dtype=torch.cfloat), nn.Linear(4, 4)))
    optimizer = make_optimizer(model, TrainConfig(optimizer="muon"))
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)


@pytest.mark.parametrize("lost", ["weight_decay", "groups", "lr", "params"])
def test_an_optimizer_keeps_a_setting_that_its_checkpoint_has_lost(lost):
    optimizer = make_optimizer(network(), TrainConfig(optimizer="muon"))
    before = optimizer.state_dict()["param_groups"]
    stored = [{name: value for name, value in group.items() if name != lost} for group in before]
    _load_optimizer(optimizer, {"numbers": {}, "groups": stored}, {})
    assert optimizer.state_dict()["param_groups"] == before
    with pytest.raises(ValueError, match="shorter"):
        _load_optimizer(optimizer, {"numbers": {}, "groups": stored[:1]}, {})


WHOLE = {"mean": True, "square": True}  # True: of the parameter's shape


@pytest.mark.parametrize(
    "slots",
    [
        {"step": None, **WHOLE},
        {"step": 0, **WHOLE},
        {"step": 10**400, **WHOLE},
        {"step": 1, "mean": True},
        {"step": 1, "mean": None, "square": True},
        {"step": 1, "mean": torch.ones(1), "square": True},
    ],
    ids=["no step", "step 0", "huge step", "no square", "no mean", "one mean"],
)
def test_a_damaged_state_of_an_optimizer_is_refused(slots):
    optimizer = make_optimizer(network(), TrainConfig(optimizer="muon"))
    stored = {"0": {name: value for name, value in slots.items() if value is None or type(value) is int}}
    weight = optimizer.param_groups[0]["params"][0]
    tensors = {
        f"0.{name}": weight if value is True else value for name, value in slots.items() if name not in stored["0"]
    }
    with pytest.raises(ValueError, match=r"incomplete|expected"):
        _load_optimizer(optimizer, {"numbers": stored, "groups": optimizer.state_dict()["param_groups"]}, tensors)


def test_an_average_forgets_by_its_decay_and_copies_what_is_no_average():
    model = network()
    average = WeightAverage(model, 0.9)
    expected = {name: tensor.double().clone() for name, tensor in model.state_dict().items()}
    for step in range(1, 120):
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.copy_(torch.randn(tensor.shape) * 9)
        average.update(model)
        decay = min(0.9, step / (step + 10))
        for name, tensor in model.state_dict().items():
            expected[name] += (1 - decay) * (tensor.double() - expected[name])
    for name, tensor in average.model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            assert torch.equal(tensor, model.state_dict()[name])
        else:
            torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-5)


def test_whitening_filters_give_uncorrelated_outputs_of_equal_variance():
    data = photos(count=512)
    images = Normalize(data.spec)(data.train.images(torch.arange(512)))
    filters = whitening_filters(images, 2, 2, 100)
    assert filters.shape == (12, 3, 2, 2)
    outputs = F.conv2d(images, filters, stride=2).transpose(0, 1).flatten(1).double()
    variances = outputs.square().mean(1)
    correlations = outputs @ outputs.T / outputs.shape[1] / (variances[:, None] * variances).sqrt()
    torch.testing.assert_close(correlations, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-3)
    assert (variances < 1).all() and (variances > 0.9).all()  # v / (v + 0.0005)
    grey = images[:, :1].expand(-1, 3, -1, -1)
    assert len(whitening_filters(grey, 2, 2, 100)) == 4  # the other directions have no variance


def test_flips_alternate_and_everything_else_stays(monkeypatch):
    data = photos()
    for epoch in (1, 2):
        assert torch.equal(alternate(9, 1, epoch), 1 - alternate(9, 1, epoch + 1))
    assert not torch.equal(alternate(99, 1, 1), alternate(99, 2, 1))
    index = {image.numpy().tobytes(): number for number, image in enumerate(data.train.images(torch.arange(64)))}
    monkeypatch.setattr("micronet.data.batches.CROP_PADDING_SHARE", 0)
    monkeypatch.setattr("micronet.data.batches.Normalize", lambda *_: lambda images: images)
    for epoch in (1, 2):
        turns = alternate(64, 5, epoch)
        batches = list(train_batches(data.train, data.spec, 16, seed=5, epoch=epoch, flip="alternating"))
        for image in torch.cat([images for images, _ in batches]):
            plain, mirrored = (index.get(each.contiguous().numpy().tobytes()) for each in (image, image.flip(2)))
            assert turns[mirrored if plain is None else plain] == (plain is None)
    rest = list(train_batches(data.train, data.spec, 16, seed=5, epoch=2, flip="alternating", start=2))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(batches[2:], rest, strict=True))


def test_cutout_is_a_square_of_the_mean_colour():
    spec = DataSpec(mean=[0.2, 0.4, 0.6], std=[1.0] * 3)
    images = torch.full((3, 3, 8, 8), 255, dtype=torch.uint8)
    centres = torch.tensor([[4, 0, 7], [3, 0, 7]])
    assert int(cut_out(images, centres, 10**26, spec).max()) == 153  # a square that covers everything
    cut = cut_out(images, centres, 4, spec)
    expected = images.clone()
    for image, rows, columns in zip(expected, (slice(2, 6), slice(0, 2), slice(5, 8)),
                                    (slice(1, 5), slice(0, 2), slice(5, 8)), strict=True):  # fmt: skip
        image[:, rows, columns] = torch.tensor([51, 102, 153], dtype=torch.uint8).view(3, 1, 1)
    assert torch.equal(cut, expected)


def test_images_grow_to_their_full_size():
    sizes = [image_size(TrainConfig(start_size=20), 32, step, 100) for step in range(100)]
    assert sizes[0] == 20 and sizes[70:] == [32] * 30
    assert sizes == sorted(sizes) and all(size % 4 == 0 for size in sizes)
    assert {image_size(TrainConfig(), 30, step, 100) for step in range(100)} == {30}


def test_a_preset_is_what_its_settings_say():
    assert TrainConfig(preset="fast").to_json() == TrainConfig(**PRESETS["fast"]).to_json()
    assert TrainConfig().to_json() == TrainConfig(**PRESETS["plain"]).to_json()
    assert TrainConfig(preset="fast", optimizer="adam", flip="random").to_json()["optimizer"] == "adam"
    assert [batch_size(images) for images in (100, 4000, 9000, 50_000)] == [32, 32, 64, 128]


def test_the_rate_of_muon_falls_with_the_square_root_of_the_steps():
    rates = [muon_lr(TrainConfig(preset="fast", epochs=epochs), 50_000) for epochs in (1, 5, 20, 80)]
    assert rates[:2] == [0.01, 0.01] and rates[2] == pytest.approx(2 * rates[3], rel=0.03)
    accumulated = TrainConfig(preset="fast", epochs=80, accumulate=4)
    assert muon_lr(accumulated, 50_000) == pytest.approx(rates[2], rel=0.01)


def settled(config, tmp_path, model=None, data=None, history=(), **run):
    artifact = Artifact(model or network(), ModelSpec("own"), list(history))
    return settle(config, artifact, data or photos(), RunContext(tmp_path / "a.safetensors", CPU, **run))


def test_a_preset_leaves_out_what_does_not_fit_and_measures_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(preset, "step_seconds", None)
    monkeypatch.setattr(preset, "has_bf16", lambda: True)
    fast = TrainConfig(preset="fast")
    found = settled(fast, tmp_path)
    assert (found.flip, found.whiten, found.amp, found.batch_size) == ("alternating", "on", "bf16", 32)
    found = settled(fast, tmp_path, network(nn.Conv2d(3, 8, 9)), photos("crop"))
    assert (found.flip, found.whiten) == ("random", "off")
    assert settled(fast, tmp_path, history=["a training"]).whiten == "off"
    monkeypatch.setattr(preset, "has_bf16", lambda: False)
    assert settled(fast, tmp_path).amp == "off"


def test_fast_is_the_default_and_a_training_that_began_as_plain_goes_on_as_plain(tmp_path):
    plain, fast = (settled(TrainConfig(preset=name), tmp_path).to_json() for name in ("plain", "fast"))
    assert settled(TrainConfig(), tmp_path).to_json() == fast
    for recorded, expected in ((plain, plain), (fast, fast), ({}, fast)):
        resumed = RunContext(tmp_path / "a.safetensors", CPU, resume=True)
        artifact = Artifact(network(), ModelSpec("own"), [])
        assert settle(TrainConfig(), artifact, photos(), resumed, recorded).to_json() == expected
    long = TrainConfig(epochs=100_000)
    assert settled(long, tmp_path).lr < 0.01
    assert settle(long, artifact, photos(), resumed, {**fast, "lr": 0.01}).lr == 0.01  # as an earlier version began
    assert settle(long, artifact, photos(), resumed, {**fast, "lr": 0.5}).lr < 0.01  # the user's, who must say it again


@pytest.mark.parametrize(
    ("layers", "suits"),
    [
        ([nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=2)], True),
        ([nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1)], False),
        ([nn.Conv2d(1, 8, 3, groups=1), nn.ConvTranspose2d(8, 8, 3), nn.Linear(8, 8)], True),
        ([nn.Conv2d(3, 8, 3), nn.MultiheadAttention(8, 2), nn.Linear(8, 8)], False),
        ([nn.Linear(8, 8)], False),
    ],
)
def test_bf16_suits_networks_of_convolutions_that_are_not_depthwise(layers, suits):
    assert preset.suits_bf16(nn.Sequential(*layers)) is suits


@pytest.mark.parametrize(
    ("settings", "model", "said"),
    [
        ({"flip": "alternating"}, None, "--flip alternating has no effect, because images of this data set"),
        (
            {"whiten": "on"},
            nn.Conv2d(3, 8, 9),
            "at most 7x7 pixels and at least 4 filters; this one has 8 filters of 9x9",
        ),
        ({"whiten": "on"}, nn.Sequential(nn.ReLU(), nn.Conv2d(3, 8, 3)), "not ReLU"),
        ({"start_size": 8}, None, "--start-size is 8, but the images are only 8 pixels high"),
        ({"start_size": 2}, None, "--start-size 2: .* does not accept images"),
        ({"amp": "bf16"}, None, "a step of 32 images takes 2000.0 ms, compared with 1000.0 ms without it"),
    ],
)
def test_what_has_no_effect_is_refused(tmp_path, monkeypatch, settings, model, said):
    monkeypatch.setattr(preset, "step_seconds", lambda *_: (1.0, 2.0))
    monkeypatch.setattr(preset, "has_bf16", lambda: True)
    with pytest.raises(MicronetError, match=said):
        settled(TrainConfig(**settings), tmp_path, network(model), photos("crop"))


def test_the_time_of_a_step_changes_nothing():
    model, data = network(), photos()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    drawn = torch.random.get_rng_state()
    assert min(preset.step_seconds(TrainConfig(preset="fast"), model, data)) > 0
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), drawn)


def test_a_stopped_training_goes_on_bit_identical_with_every_option(micronet, tmp_path, monkeypatch):
    command = [
        "train", "--model", "nin", "--width", "0.1", "--limit", "100", "--epochs", "2", "--preset", "fast",
        "--ema", "0.9", "--cutout", "6", "--start-size", "24", "--amp", "bf16",
    ]  # fmt: skip
    monkeypatch.setattr(preset, "has_bf16", lambda: True)
    monkeypatch.setattr(preset, "step_seconds", lambda *_: (2.0, 1.0))
    whole, stopped = tmp_path / "whole.safetensors", tmp_path / "stopped.safetensors"
    assert micronet(*command, "-o", whole).code == 0
    assert micronet(*command, "-o", stopped, "--max-time", "0").code == 3
    monkeypatch.setattr(preset, "step_seconds", lambda *_: (1.0, 2.0))  # the machine is busy now
    assert micronet(*command, "-o", stopped, "--max-time", "0", "--resume").code == 3
    refused = micronet(*command, "-o", stopped, "--resume", "--ema", "0")
    assert refused.code == 2
    assert "different settings (ema)" in refused.err
    assert micronet(*command, "-o", stopped, "--resume").code == 0
    left, right = load_file(whole), load_file(stopped)
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_images_smaller_than_the_first_kernel_are_not_whitened_and_frozen_networks_not_trained(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8, 2))
    with pytest.raises(MicronetError, match="as large as the first layer's kernel"):
        settled(TrainConfig(whiten="on"), tmp_path, network(model), photos("crop", size=1))
    with pytest.raises(MicronetError, match="all parameters of the network are frozen"):
        make_optimizer(model.requires_grad_(False), TrainConfig(optimizer="adam", schedule="linear", lr=0.01))
