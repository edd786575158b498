import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from micronet.data.dataset import DataSpec
from micronet.data.masks import Pair, list_pairs
from micronet.errors import MicronetError
from micronet.runtimes.tensorrt import segmentation
from micronet.runtimes.tensorrt.segmentation import evaluate_segmentation, multi_scale_scores
from tests.tensorrt.fake_gpu import write_engine

PLAIN = DataSpec(mean=[0.0] * 3, std=[1 / 255] * 3)  # the network gets the pixels' values


@pytest.fixture
def folder(tmp_path):
    """Three images, bright where the label is 1; the third's left column is labelled as void."""
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    for index, (height, width) in enumerate([(32, 48), (40, 40), (32, 48)]):
        labels = np.zeros((height, width), np.uint8)
        labels[:, width // 2 :] = 1
        Image.fromarray(np.repeat(labels[:, :, None] * 255, 3, 2)).save(tmp_path / "images" / f"{index}.png")
        if index == 2:
            labels[:, :8] = 255
        Image.fromarray(labels).save(tmp_path / "labels" / f"{index}.png")
    return tmp_path


def saved(folder, labels):
    path = folder / "label.tif"
    Image.fromarray(np.asarray(labels, np.int32)).save(path)
    image = folder / "image.png"
    Image.fromarray(np.zeros((*np.shape(labels), 3), np.uint8)).save(image)
    return Pair(image, path)


def constant(classes):
    """Return a predictor that sees a map of classes whatever the image."""
    scores = F.one_hot(torch.tensor(classes), 3).permute(2, 0, 1)[None].float().numpy() * 10
    return lambda images: scores


def test_measures_are_those_of_the_definition():
    rng = np.random.default_rng(0)
    labels, classes = rng.integers(0, 5, 1000), rng.integers(0, 5, 1000)
    accuracy, iou = segmentation.measures(np.bincount(labels * 6 + classes, minlength=36).reshape(6, 6))
    assert accuracy == (labels == classes).mean()
    for k in range(5):
        assert iou[k] == ((labels == k) & (classes == k)).sum() / ((labels == k) | (classes == k)).sum()
    assert iou[5] is None


def test_void_and_negative_labels_count_for_nothing(tmp_path):
    pair = saved(tmp_path, [[0, 1, -1], [255, 0, -7]])
    found = evaluate_segmentation(constant([[0, 1, 2], [2, 1, 2]]), [pair], [(2, 3)], PLAIN)
    assert found.pixel_accuracy == 2 / 3  # of 0 1 0, seen as 0 1 1
    assert found.class_iou == [1 / 2, 1 / 2, None]
    assert found.mean_iou == 1 / 2
    assert found.agreement is None


def test_scores_are_the_mean_of_every_sizes_softmax_at_the_labels_size():
    net = torch.nn.Conv2d(3, 4, 3, stride=8, padding=1)
    image = torch.randint(0, 256, (3, 50, 70), dtype=torch.uint8)
    spec = DataSpec(mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.25])

    @torch.inference_mode()
    def predict(images):
        return net(torch.from_numpy(images)).numpy()

    with torch.inference_mode():
        expected = torch.zeros(4, 50, 70)
        for size in [(32, 48), (64, 88)]:
            resized = F.interpolate(image[None].float(), size, mode="bilinear", antialias=True) / 255
            normal = (resized - torch.tensor(spec.mean).view(-1, 1, 1)) / torch.tensor(spec.std).view(-1, 1, 1)
            expected += F.interpolate(net(normal), (50, 70), mode="bilinear")[0].softmax(0) / 2
    scores = multi_scale_scores(predict, image, (50, 70), [(32, 48), 64], spec)
    np.testing.assert_allclose(scores, expected, atol=1e-5)  # float32 sums of 27 products of about 1, in another order


@pytest.mark.parametrize(
    ("shape", "size", "expected"),
    [((50, 70), 64, (64, 88)), ((70, 50), 64, (88, 64)), ((400, 400), 400, (400, 400)), ((50, 70), (32, 48), (32, 48))],
)
def test_a_size_is_the_shorter_side_or_both(shape, size, expected):
    assert segmentation.scaled(shape, size) == expected


def test_a_network_that_sees_what_is_labelled_is_right_everywhere(folder):
    def bright(images):
        light = images[:, 0]
        return np.stack([127 - light, light - 128], 1)

    found = evaluate_segmentation(bright, list_pairs(folder), [32, 64], PLAIN, reference=lambda x: -bright(x))
    assert found.images == 3
    assert found.pixel_accuracy > 0.97  # the edge alone is blurred where images are resampled
    assert found.mean_iou > 0.95
    assert found.agreement < 0.05
    assert evaluate_segmentation(bright, list_pairs(folder), [32], PLAIN, reference=bright).agreement == 1


def test_a_palettes_labels_are_its_indices(tmp_path):
    image = Image.fromarray(np.array([[0, 1], [2, 255]], np.uint8), mode="L").convert("P")
    image.putpalette([7, 0, 0, 0, 7, 0, 0, 0, 7] + 253 * [9, 9, 9])
    image.save(tmp_path / "label.png")
    np.testing.assert_array_equal(segmentation.read_labels(tmp_path / "label.png"), [[0, 1], [2, 255]])


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([[0, 3]], "has label 3, but the network only has 3 classes"),
        ([[-1, 255]], "contain no labeled pixels"),
    ],
)
def test_labels_that_cannot_be_measured_end_in_one_line(tmp_path, labels, words):
    with pytest.raises(MicronetError, match=words):
        evaluate_segmentation(constant([[0, 1]]), [saved(tmp_path, labels)], [(1, 2)], PLAIN)


def test_class_scores_are_no_segmentation(tmp_path):
    with pytest.raises(MicronetError, match=r"\(N, K, h, w\), but got \(1, 3\)"):
        evaluate_segmentation(lambda images: np.zeros((1, 3)), [saved(tmp_path, [[0]])], [(1, 1)], PLAIN)


def test_a_folder_must_pair_images_with_label_maps(folder):
    (folder / "labels" / "1.png").unlink()
    with pytest.raises(MicronetError, match=r"1\.png has no mask"):
        list_pairs(folder)
    with pytest.raises(MicronetError, match="no images/ and no masks/"):
        list_pairs(folder / "labels")
    with pytest.raises(MicronetError, match="is not a label map: its pixel format is RGB"):
        segmentation.read_labels(folder / "images" / "0.png")
    (folder / "labels" / "0.png").write_bytes(b"no image")
    with pytest.raises(MicronetError, match="cannot be read"):
        segmentation.read_labels(folder / "labels" / "0.png")


@pytest.mark.parametrize(("text", "sizes"), [("256,400", [256, 400]), ("32x48, 64", [(32, 48), 64])])
def test_sizes_are_parsed(text, sizes):
    assert segmentation.parse_sizes(text) == sizes


@pytest.mark.parametrize("text", ["", "0", "4x", "1x2x3", "-1", "a"])
def test_other_sizes_are_refused(text):
    with pytest.raises(MicronetError, match="--sizes"):
        segmentation.parse_sizes(text)


@pytest.mark.usefixtures("gpu")
def test_trt_eval_segments_at_several_sizes(folder, tmp_path, micronet):
    path = write_engine(tmp_path / "net.engine", (1, 3, 32, 32), (4, 3, 96, 96), compute="pixels")
    arguments = ["trt-eval", path, "--segmentation", folder, "--batch-sizes", "2"]
    done = micronet(*arguments, "--sizes", "32,64", "--json")
    assert done.json["images"] == 3
    assert done.json["pixel_accuracy"] > 0.9
    assert [each["shape"] for each in done.json["timings"]] == [[2, 3, 32, 48], [2, 3, 64, 96]]
    shown = micronet(*arguments, "--sizes", "32", "--limit", "2")
    assert "mean IoU" in shown.out and "of 2 images" in shown.out
    unsaid = micronet(*arguments)
    assert unsaid.code == 2 and "1x3x32x32 to 4x3x96x96; choose one with --sizes" in unsaid.err
    large = micronet(*arguments, "--sizes", "128")
    assert large.code == 2 and "built for inputs of 1x3x32x32 to 4x3x96x96, but got 1x3x128x192" in large.err


@pytest.mark.usefixtures("gpu")
def test_trt_eval_segments_at_a_fixed_engines_own_size(folder, tmp_path, micronet):
    path = write_engine(tmp_path / "net.engine", (2, 3, 64, 64), compute="pixels")
    done = micronet("trt-eval", path, "--segmentation", folder, "--batch-sizes", "1,3", "--json")
    assert done.json["pixel_accuracy"] > 0.9
    assert [each["shape"] for each in done.json["timings"]] == [[1, 3, 64, 64], [3, 3, 64, 64]]
