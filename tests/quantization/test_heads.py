"""Heads whose channels differ too much in size for one 8-bit scale stay in float, and only those."""

import pytest
import torch
from torch import Tensor, nn

import micronet
from micronet.quantization.calibrate import collect
from micronet.stages import quantize_network


class Detector(nn.Module):
    """Boxes in pixels and a score in one head, scores alone in another."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU())
        self.boxes, self.scores = nn.Conv2d(8, 5, 1), nn.Conv2d(8, 3, 1)
        with torch.no_grad():
            self.boxes.weight[:4] *= 500

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.stem(images)
        return self.boxes(features), self.scores(features)


def test_a_head_of_unequal_channels_stays_float_and_is_named() -> None:
    torch.manual_seed(0)
    model, images = Detector().eval(), torch.randn(16, 3, 16, 16)
    quantized = micronet.quantize(model, data=[images], mode="ptq")
    assert quantized.left_float == {"boxes": "the 8-bit scale of its output gives channel 4 fewer than 4 levels"}
    score, found = (network(images)[0][:, 4] for network in (model, quantized.model))
    assert len(found.unique()) > 100
    assert (found - score).abs().max() < (score.max() - score.min()) / 4  # less than the steps it would have had


def test_a_head_left_float_is_calibrated_once_and_as_if_the_user_had_excluded_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    model, images, runs = Detector().eval(), torch.randn(16, 3, 16, 16), []
    monkeypatch.setattr(quantize_network, "collect", lambda *given: runs.append(1) or collect(*given))
    found = micronet.quantize(model, data=[images], mode="ptq")
    by_hand = micronet.quantize(model, data=[images], mode="ptq", exclude="boxes")
    assert len(runs) == 2
    torch.testing.assert_close(found.model.state_dict(), by_hand.model.state_dict(), rtol=0, atol=0)


def test_a_head_whose_channel_would_become_constant_stays_float() -> None:
    torch.manual_seed(0)
    model = Detector()
    with torch.no_grad():
        model.boxes.weight[4] /= 100
        model.boxes.bias[4] = 100
    quantized = micronet.quantize(model, data=[torch.randn(8, 3, 16, 16)], mode="ptq")
    assert quantized.left_float == {"boxes": "the 8-bit scale of its output gives channel 4 fewer than 4 levels"}


def test_a_head_that_the_user_asked_to_quantize_is_quantized() -> None:
    quantized = micronet.quantize(Detector(), data=[torch.randn(8, 3, 16, 16)], mode="ptq", first_last="8bit")
    assert not quantized.left_float


def test_a_channel_of_zeros_destroys_no_head() -> None:
    model = Detector()
    with torch.no_grad():
        model.boxes.weight[4] = model.boxes.bias[4] = 0
    assert not micronet.quantize(model, data=[torch.randn(8, 3, 16, 16)], mode="ptq").left_float


class Cascade(nn.Module):
    """A head that a second layer reads too, behind a norm and a ReLU, and a sum of two layers' results."""

    def __init__(self) -> None:
        super().__init__()
        self.boxes, self.norm, self.act = nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5), nn.ReLU()
        self.left, self.right = nn.Conv2d(5, 5, 1), nn.Conv2d(5, 5, 1)
        with torch.no_grad():
            for layer in (self.boxes, self.left, self.right):
                layer.weight[:4] *= 500

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        boxes = self.act(self.norm(self.boxes(images)))
        return boxes, self.left(boxes) + self.right(boxes)


def test_a_head_is_one_though_another_layer_reads_it_but_not_in_a_sum() -> None:
    torch.manual_seed(0)
    quantized = micronet.quantize(Cascade(), data=[torch.randn(16, 3, 16, 16)], mode="ptq")
    assert list(quantized.left_float) == ["boxes"]
