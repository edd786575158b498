"""Segmentation: masks move with their images, the figures are the definition's, folders train and export."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from micronet.data.batches import eval_batches, train_batches
from micronet.data.load import load_data
from micronet.errors import MicronetError
from micronet.tasks.agreement import Agreement
from micronet.tasks.classification import Classification
from micronet.tasks.segmentation import Segmentation
from micronet.training.config import TrainConfig
from micronet.training.step import TrainStep

NET = "tests/tasks/networks.py:Segmenter"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Grey images of 16 pixels whose brightness says the class, 1 or 2, of a square; some pixels are ignored."""
    root, random = tmp_path_factory.mktemp("masks"), np.random.default_rng(0)
    for part, number in (("train", 24), ("test", 6)):
        for kind in ("images", "masks"):
            (root / part / kind).mkdir(parents=True)
        for index in range(number):
            mask = np.zeros((16, 16), np.uint8)
            top, left = random.integers(0, 8, 2)
            mask[top : top + 8, left : left + 8] = 1 + index % 2
            Image.fromarray(mask * 100 + 20).save(root / part / "images" / f"{index}.png")
            mask[:1] = 255
            Image.fromarray(mask).save(root / part / "masks" / f"{index}.png")
    return root


def test_augmentations_move_the_mask_with_its_image_and_ignore_the_edge(folder):
    data = load_data(str(folder), task="segmentation")
    assert (data.spec.channels, data.classes, len(data.validation)) == (1, ["0", "1", "2"], 2)
    images, masks = next(iter(train_batches(data.train, data.spec, 22, seed=1, epoch=1)))
    mean, std = data.spec.mean[0], data.spec.std[0]
    pixels = ((images[:, 0] * std + mean) * 255).round().long()
    known = masks != 255
    assert torch.equal(pixels[known], masks[known] * 100 + 20)
    assert (masks[pixels == 0] == 255).all() and (pixels == 0).any()


def test_masks_that_do_not_fit_are_named(folder, tmp_path, micronet):
    root = tmp_path / "data"
    shutil.copytree(folder, root)
    mask = np.full((16, 16), 9, np.uint8)
    stray, small = root / "test" / "masks" / "3.png", root / "train" / "masks" / "4.png"
    Image.fromarray(mask).save(stray)
    data = load_data(str(root), task="segmentation")
    with pytest.raises(MicronetError, match=r"3.png has class 9; expected 0 to 2"):
        list(eval_batches(data.test, data.spec))
    Image.fromarray(mask[:8, :4]).save(small)
    with pytest.raises(MicronetError, match=r"4.png has 8x4 pixels \(height x width\), but its image .* has 16x16"):
        list(eval_batches(load_data(str(root), task="segmentation").train, data.spec))
    Image.fromarray(mask).save(small)
    refused = micronet(
        "train", "--model", NET, "--task", "segmentation", "--data", root, "-o", tmp_path / "a.safetensors"
    )
    assert refused.code == 2 and "0 to 2, but" in refused.err and "4.png has class 9; fix the mask" in refused.err
    with pytest.raises(MicronetError, match=r"trained on 3 classes .*4.png has class 9"):
        load_data(str(root), task="segmentation", like=data.spec)
    photo = root / "train" / "masks" / "4.jpg"
    Image.fromarray(mask).save(photo)
    small.unlink()
    with pytest.raises(MicronetError, match=r"4.jpg is a JPEG, whose compression changes class numbers"):
        load_data(str(root), task="segmentation")
    shutil.move(photo, small)
    Image.fromarray(mask).save(small)
    shutil.move(root / "test" / "images", tmp_path / "elsewhere")
    with pytest.raises(MicronetError, match=r"test has no images/; segmentation reads images/NAME"):
        load_data(str(root), task="segmentation").test  # noqa: B018
    for path in root.glob("*/masks/*.png"):
        Image.fromarray(mask // 9 * 255).save(path)
    with pytest.raises(MicronetError, match="have only class 0"):
        load_data(str(root), task="segmentation")
    for path in root.glob("*/images/*"):
        Image.fromarray(mask[:8]).save(path)
    with pytest.raises(MicronetError, match=r"is 8x16 \(height x width\), not square; add --image-size 8x16 "):
        load_data(str(root), task="segmentation")


def test_figures_are_those_of_the_definition_and_ignored_pixels_do_not_count():
    random = torch.Generator().manual_seed(1)
    labels, scores = torch.randint(3, (4, 6, 6), generator=random), torch.randn(4, 4, 6, 6, generator=random)
    labels[0] = 255
    task, valid, classes = Segmentation(), labels != 255, scores.argmax(1)
    meter = task.meter()
    for part in (slice(0, 1), slice(1, 4)):
        meter.update(scores[part], labels[part])
    found = meter.compute()
    iou = []
    for number in range(4):
        ours, theirs = (classes == number) & valid, labels == number
        iou.append(float((ours & theirs).sum() / (ours | theirs).sum()))
    assert found["mean_iou"] == pytest.approx(sum(iou) / 4, rel=1e-6)
    assert found["pixel_accuracy"] == pytest.approx(float((classes == labels)[valid].double().mean()))
    expected = F.cross_entropy(scores, labels, ignore_index=255)
    assert float(task.loss([scores, scores[:, :1]], labels)) == pytest.approx(float(expected), rel=1e-6)
    with pytest.raises(MicronetError, match="class 9, but the network scores classes 0 to 3"):
        task.loss(scores, torch.full((4, 6, 6), 9))


def test_a_segmenter_trains_quantizes_and_exports_from_folders(folder, tmp_path, micronet):
    plain, int8, onnx = (tmp_path / name for name in ("a.safetensors", "q.safetensors", "q.onnx"))
    train = ["train", "--model", NET, "--task", "segmentation", "--data", folder, "--epochs", "2", "-o", plain]
    done = micronet(*train, "--batch-size", "4")
    assert done.code == 0 and "mean IoU" in done.out
    assert micronet("quantize", plain, "--model", NET, "--mode", "ptq", "-o", int8).code == 0
    assert micronet("export-onnx", int8, "--model", NET, "-o", onnx).code == 0
    compared = micronet("compare", plain, onnx, "--model", NET, "--json")
    assert not compared.code, compared.err
    rows = json.loads(compared.out)["rows"]
    assert rows[1]["drop"] == rows[0]["metrics"]["mean_iou"] - rows[1]["metrics"]["mean_iou"]
    assert {"mean_iou", "pixel_accuracy"} == set(rows[0]["metrics"])
    floating, file = tmp_path / "f.onnx", tmp_path / "f8.onnx"
    assert micronet("export-onnx", plain, "--model", NET, "--skip-timing", "-o", floating).code == 0
    ptq = ["--mode", "ptq", "--task", "segmentation", "--data", folder, "--json"]
    done = micronet("quantize", floating, *ptq, "-o", file)
    found = done.json
    assert any(re.search(r"1 thread, batch \d+\)", line) for line in found["integers"]["words"])
    assert found["test_images"] == 6 and found["float_test_mean_iou"] == rows[0]["metrics"]["mean_iou"]
    assert found["test_mean_iou"] == micronet("evaluate", file, "--skip-timing", "--json").json["metrics"]["mean_iou"]
    other = ["train", "--model", NET, "--model-args", '{"channels": 3}', "--data", "digits"]
    refused = micronet(*other, "-o", tmp_path / "b.safetensors")
    assert refused.code == 2 and "(1, 3, 16, 16)" in refused.err and "--task segmentation" in refused.err


@pytest.mark.parametrize("task", [Classification(), Segmentation(), Agreement()], ids=lambda task: task.name)
def test_every_loss_that_has_label_smoothing_gets_it(task):
    model = torch.nn.Conv2d(1, 3, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    step = TrainStep(model, optimizer, TrainConfig(label_smoothing=0.5), torch.device("cpu"), task=task)
    scores, labels = torch.randn(2, 3, 4, 4), torch.randint(3, (2, 4, 4))
    if task.label_smoothing is None:
        assert step.task is task
    else:
        torch.testing.assert_close(step.task.loss(scores, labels), F.cross_entropy(scores, labels, label_smoothing=0.5))
