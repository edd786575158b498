"""Images that are not square: read, augmented, recorded, and taken through the command line."""

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torch import nn

from micronet.artifact.artifact import Artifact, load
from micronet.core.image_size import parse_size, sides, spell_size
from micronet.data.batches import eval_batches, resized, train_batches
from micronet.data.folder import square_size
from micronet.data.image_files import decode
from micronet.data.load import load_data
from micronet.data.spec import DataSpec
from micronet.data.split import resize
from micronet.errors import MicronetError
from micronet.models.build import ModelSpec
from micronet.stages.config import DataConfig
from micronet.stages.inputs import open_data
from tests.data.test_data import make_folder


@pytest.mark.parametrize(
    ("given", "size"),
    [(64, 64), ("64", 64), ("64x64", 64), ("24X40", [24, 40]), ([24, 40], [24, 40]), ([8, 8], 8), (None, None)],
)
def test_sizes_are_read_as_they_are_written(given, size):
    assert parse_size(given) == size
    if size is not None:
        assert parse_size(spell_size(size)) == size


@pytest.mark.parametrize(
    "given", ["", "x", "24x", "0x8", "1x2x3", "24x99999", "-4x4", "2.5", "0000000099999", [1, 2, 3]]
)
def test_other_sizes_are_refused_with_an_example(given):
    with pytest.raises(MicronetError, match="expected N, or HEIGHTxWIDTH such as 240x320"):
        parse_size(given)


@pytest.mark.parametrize(
    ("own", "size", "kept"),
    [
        ((48, 80), [24, 40], (slice(None), slice(None))),  # the same shape: nothing is cropped
        ((48, 80), [48, 40], (slice(None), slice(20, 60))),  # the middle of the width
        ((80, 48), [40, 48], (slice(20, 60), slice(None))),  # the middle of the height
    ],
)
def test_images_cover_the_size_and_lose_what_reaches_over_it(tmp_path, own, size, kept):
    pixels = np.random.default_rng(0).integers(0, 256, (*own, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    height, width = sides(size)
    expected = pixels[kept]
    if expected.shape[:2] != (height, width):
        expected = np.array(Image.fromarray(expected).resize((width, height), Image.Resampling.BILINEAR))
    assert np.array_equal(decode(tmp_path / "a.png", size).numpy(), expected)


def test_the_size_that_a_message_advises_is_that_of_the_image_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (40, 24)).save(tmp_path / "a.jpg", exif=exif)
    with pytest.raises(MicronetError, match=r"is 40x24 .* add --image-size 40x24 "):
        square_size(tmp_path / "a.jpg")


def test_arrays_keep_their_proportions_like_files():
    pixels = torch.randint(256, (2, 3, 16, 20), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    assert torch.equal(resize(pixels, 16), pixels[..., 2:18])
    assert torch.equal(resize(pixels, [8, 20]), pixels[:, :, 4:12])


def test_grey_files_that_are_not_square_reach_a_network_of_one_channel(tmp_path):
    folder = make_folder(tmp_path / "data", sizes=((40, 24),))
    for path in folder.rglob("*.png"):
        Image.open(path).convert("L").save(path)
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten(), nn.Linear(2 * 24 * 40, 2))
    config = DataConfig(data=str(folder), image_size="24x40")
    assert open_data(config, Artifact(network, ModelSpec("net"), [])).spec.channels == 1


def test_batches_have_the_size_and_grow_in_proportion(tmp_path):
    data = load_data(str(make_folder(tmp_path, sizes=((40, 24),))), image_size="24x40")
    assert data.spec.image_size == [24, 40] and DataSpec.from_json(data.spec.to_json()) == data.spec
    batches = list(train_batches(data.train, data.spec, 4, seed=1, epoch=1, cutout=8))
    assert {tuple(images.shape[1:]) for images, _ in batches} == {(3, 24, 40)}
    [first, *_] = resized(eval_batches(data.test, data.spec), 12)
    assert first[0].shape[2:] == (12, 20)


def test_masks_move_with_images_that_are_not_square(tmp_path):
    mask = np.tile(np.arange(80, dtype=np.uint8) // 20, (48, 1))
    for part in ("train", "test"):
        for kind, pixels in (("images", np.stack([60 * mask] * 3, 2)), ("masks", mask)):
            (tmp_path / part / kind).mkdir(parents=True)
            for number in range(4):
                Image.fromarray(pixels).save(tmp_path / part / kind / f"{number}.png")
    data = load_data(str(tmp_path), image_size="24x40", task="segmentation")
    [(images, masks)] = eval_batches(data.test, data.spec)
    assert images.shape[1:] == (3, 24, 40) and torch.equal(masks[0], torch.arange(40).expand(24, 40) // 10)


@pytest.mark.parametrize("size", [0, [4], [4, 4], [4, 0], [4, 2**31], [1, 2, 3]])
def test_damaged_records_are_refused(size):
    with pytest.raises(MicronetError, match=r"its image_size|more than"):
        DataSpec.from_json({"channels": 3, "image_size": size})


def test_every_command_keeps_the_size(tmp_path, micronet):
    folder, path = make_folder(tmp_path / "data", sizes=((40, 24),)), tmp_path / "a.safetensors"
    ask = ["train", "--model", "lenet_bn", "--width", 0.2, "--data", folder, "--epochs", 0]
    said = micronet(*ask, "-o", path).err
    assert "is 24x40 (height x width), not square; add --image-size 24x40 " in " ".join(said.split())
    assert "3 channels, 24x40; lenet_bn" in micronet(*ask, "--image-size", "24x40", "-o", path).err
    assert load(path).data["image_size"] == [24, 40]
    assert micronet("export-onnx", path, "-o", tmp_path / "a.onnx").code == 0
    assert "3x24x40" in micronet("inspect", path).out and "3x24x40" in micronet("card", path).out
    int8 = tmp_path / "int8.onnx"
    assert micronet("quantize", tmp_path / "a.onnx", "--mode", "ptq", "--data", folder, "-o", int8).code == 0
    assert len(micronet("predict", int8, folder / "test").out.splitlines()) == 12


def test_a_recorded_size_is_no_option_that_arrays_refuse(tmp_path):
    place = tmp_path / "x.npz"
    np.savez(place, x=np.zeros((9, 3, 24, 40), np.float32))
    trained_on = DataSpec(task="agreement", image_size=32)
    assert len(load_data(str(place), like=trained_on).test) == 2
    with pytest.raises(MicronetError, match=r"--image-size has no effect on the inputs in .*x\.npz; drop it"):
        load_data(str(place), image_size=32, like=trained_on)
