from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from micronet.data.batches import Normalize, augment, batch_sizes, draw_transforms, eval_batches, train_batches
from micronet.data.dataset import DataSpec
from micronet.data.image_files import decode
from micronet.data.load import load_data
from micronet.data.split import MemorySplit
from micronet.errors import MicronetError
from tests.conftest import as_rank


def make_folder(root, sizes=((20, 20),), parts=("train", "test"), count=6):
    generator = np.random.default_rng(0)
    for part in parts:
        for name in ("cat", "dog"):
            place = root / part / name
            place.mkdir(parents=True)
            for index in range(count):
                width, height = sizes[index % len(sizes)]
                pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{index}.png")
    return root


def make_arrays(**changes):
    generator = np.random.default_rng(0)
    held = {
        "x_train": generator.integers(0, 256, (40, 8, 8), dtype=np.uint8),
        "y_train": np.arange(40) % 4,
        "x_test": generator.integers(0, 256, (12, 8, 8), dtype=np.uint8),
        "y_test": np.arange(12) % 4,
    }
    return {**held, **changes}


def test_digits_are_split_three_ways_and_shown_as_colour():
    data = load_data("digits")
    assert len(data.train) + len(data.validation) == 1437
    assert len(data.test) == 360
    assert data.train.image_shape == (3, 32, 32)
    assert data.spec.classes == [str(digit) for digit in range(10)]


def test_validation_is_disjoint_seeded_and_the_same_every_time():
    first, again = load_data("digits"), load_data("digits")
    other = load_data("digits", like=DataSpec(seed=2))
    everything = torch.arange(len(first.validation))
    assert torch.equal(first.validation.images(everything), again.validation.images(everything))
    assert not torch.equal(first.validation.labels, other.validation.labels)
    train = {image.numpy().tobytes() for image in first.train.images(torch.arange(len(first.train)))}
    whole = load_data("digits", like=DataSpec(seed=2))
    rows = torch.cat([whole.train.images(torch.arange(len(whole.train))), whole.validation.images(everything)])
    validation = {image.numpy().tobytes() for image in first.validation.images(everything)}
    assert len(train | validation) == len({image.numpy().tobytes() for image in rows})
    assert not train & validation


def test_statistics_are_the_training_images_own():
    data = load_data("digits")
    pixels = data.train.images(torch.arange(len(data.train))).double() / 255
    np.testing.assert_allclose(data.spec.mean, pixels.mean((0, 2, 3)), atol=5.1e-5)
    np.testing.assert_allclose(data.spec.std, pixels.std((0, 2, 3), correction=0), atol=5.1e-5)


def test_normalize_is_the_formula():
    images = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8)
    spec = DataSpec(mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
    expected = (images.double() / 255 - torch.tensor(spec.mean).view(1, 3, 1, 1)) / torch.tensor(spec.std).view(
        1, 3, 1, 1
    )
    torch.testing.assert_close(Normalize(spec)(images).double(), expected, rtol=0, atol=1e-6)


def test_grey_images_have_the_strides_of_plain_memory():
    """By others torch would run networks channels last for which ``machine.memory_format`` says not to."""
    split = MemorySplit(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64))
    spec = DataSpec(mean=[0.5], std=[0.5], augment="crop-flip")
    for batches in (train_batches(split, spec, 2, seed=0, epoch=1), eval_batches(split, spec, 2)):
        assert next(iter(batches))[0].stride() == (64, 64, 8, 1)


def test_no_images_are_augmented_to_none():
    moves = draw_transforms(0, 8, torch.Generator().manual_seed(0), flip=True)
    assert augment(torch.zeros(0, 3, 8, 8, dtype=torch.uint8), moves).shape == (0, 3, 8, 8)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (72, 8), (8, 40)])
@pytest.mark.parametrize("flip", [False, True])
def test_augmented_images_are_shifted_windows_of_the_padded_image(flip, height, width):
    images = torch.randint(1, 256, (64, 3, height, width), dtype=torch.uint8)
    moves = draw_transforms(64, height, torch.Generator().manual_seed(0), flip=flip)
    room = round(height / 8)
    padded = torch.nn.functional.pad(images, (room,) * 4)
    for image, result, (top, left, mirrored) in zip(padded, augment(images, moves), moves.T.tolist(), strict=True):
        window = image[:, top : top + height, left : left + width]
        assert torch.equal(result, window.flip(-1) if mirrored else window)
    assert moves[2].any() == flip
    assert set(moves[0].tolist()) == set(range(2 * room + 1))


def test_an_epochs_batches_follow_from_seed_and_epoch_alone():
    data = load_data("digits", limit=100)

    def draw(seed, epoch):
        return [images for images, _ in train_batches(data.train, data.spec, 32, seed=seed, epoch=epoch)]

    assert all(torch.equal(a, b) for a, b in zip(draw(1, 1), draw(1, 1), strict=True))
    assert not torch.equal(draw(1, 1)[0], draw(1, 2)[0])
    assert not torch.equal(draw(1, 1)[0], draw(2, 1)[0])


@pytest.mark.parametrize("size", [1, 2, 31, 32, 33, 64, 65])
def test_batch_sizes_are_those_of_the_batches(size):
    split = MemorySplit(torch.zeros(size, 1, 4, 4, dtype=torch.uint8), torch.zeros(size, dtype=torch.int64))
    batches = list(train_batches(split, DataSpec(mean=[0.5], std=[0.5]), 32, seed=1, epoch=1))
    assert [len(labels) for _, labels in batches] == batch_sizes(size, 32)
    assert all(len(labels) > 1 for _, labels in batches) or size == 1


def test_batches_from_the_middle_of_an_epoch_are_those_of_the_whole_epoch():
    data = load_data("digits", limit=100)
    whole = list(train_batches(data.train, data.spec, 16, seed=1, epoch=3))
    rest = list(train_batches(data.train, data.spec, 16, seed=1, epoch=3, start=2))
    assert len(rest) == len(whole) - 2
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(whole[2:], rest, strict=True))


@pytest.mark.parametrize("world", [2, 3])
def test_the_parts_of_several_processes_are_one_processs_batches(monkeypatch, world):
    data = load_data("digits", limit=100)
    whole = list(train_batches(data.train, data.spec, 16, seed=1, epoch=1))
    parts = []
    for rank in range(world):
        as_rank(monkeypatch, rank, world)
        parts.append(list(train_batches(data.train, data.spec, 16, seed=1, epoch=1)))
    for batch, *pieces in zip(whole, *parts, strict=True):
        for index in (0, 1):
            assert torch.equal(batch[index], torch.cat([piece[index] for piece in pieces]))


def test_evaluation_never_sees_augmentation():
    data = load_data("digits")
    images = torch.cat([batch for batch, _ in eval_batches(data.test, data.spec)])
    expected = Normalize(data.spec)(data.test.images(torch.arange(len(data.test))))
    assert torch.equal(images, expected)


def test_a_folders_val_validates_where_there_is_a_test(tmp_path):
    data = load_data(str(make_folder(tmp_path, parts=("train", "val", "test"), count=4)))
    assert (len(data.train), len(data.validation), len(data.test)) == (8, 8, 8)


def test_a_folder_with_a_built_in_name_is_not_what_the_name_records(tmp_path, monkeypatch):
    (tmp_path / "digits").mkdir()  # as after: micronet run digits --output digits
    monkeypatch.chdir(tmp_path)
    assert load_data("digits").spec.name == "digits"


def test_evaluating_touches_no_training_image(tmp_path):
    root = make_folder(tmp_path)
    spec = load_data(str(root)).spec
    (root / "train" / "cat" / "0.png").write_bytes(b"broken")
    data = load_data(None, like=spec)
    assert data.spec == spec
    assert len(data.test) == 12


def test_a_network_keeps_its_own_preprocessing():
    spec = load_data("digits").spec
    data = load_data("digits", like=DataSpec(**{**spec.to_json(), "mean": [0.5] * 3, "image_size": 16}))
    assert data.spec.mean == [0.5] * 3
    assert data.test.image_shape == (3, 16, 16)


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 3), (3, 8, 8), (8, 8, 1)])
def test_arrays_of_every_layout(tmp_path, shape):
    generator = np.random.default_rng(0)
    images = {
        part: generator.integers(0, 256, (n, *shape), dtype=np.uint8) for part, n in (("x_train", 40), ("x_test", 12))
    }
    np.savez(tmp_path / "d.npz", **make_arrays(**images))
    data = load_data(str(tmp_path / "d.npz"))
    assert data.train.image_shape[1:] == (8, 8)
    assert data.spec.channels == (3 if 3 in shape else 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_train": np.zeros(40)}, "y_train is float64; expected integer labels; .* --task FILE.py:TASK"),
        ({"x_train": np.zeros((40, 8, 8)), "x_test": np.zeros((12, 8, 8), np.float32)}, None),
        (
            {"x_train": np.zeros((40, 5, 8), np.float32)},
            "training samples of x are float32 5x8, .* are uint8 8x8",
        ),
        ({"x_train": np.full((40, 8, 8), np.nan)}, "x_train has 2,560 values that are NaN"),
        ({"x_train": np.zeros((40, 8, 8), complex)}, "x_train has the type complex128"),
        ({"x_train": np.zeros((40, 5, 8, 9), np.uint8)}, "expected images with 1 or 3 channels, since it is uint8"),
        ({"x_test": np.zeros((12, 8, 8), np.float32)}, "x_test is float32, but x_train is uint8"),
        (
            {"x_train": np.zeros((40, 8, 8)), "ids_train": np.zeros(39), "ids_test": np.zeros(12)},
            "shape .39,., but .* 40",
        ),
        ({"x_train": np.zeros((40, 8, 8)), "ids_train": np.zeros(40)}, "but not ids_test; expected x_train"),
        ({"ids_train": np.zeros(40)}, None),  # images need no other inputs
        ({"y_train": np.zeros(39, int)}, "one label"),
        ({"y_train": -np.ones(40, int)}, "one label"),
        ({"x_test": np.zeros((12, 8, 9), np.uint8)}, "are 1x8x8, but the test images are 1x8x9"),
        ({"x_train": np.zeros((0, 8, 8), np.uint8), "y_train": np.zeros(0, int)}, "one label"),
        ({"classes": np.array(["a", "b"])}, "lists 2 classes"),
    ],
)
def test_arrays_that_do_not_fit_are_one_clear_error(tmp_path, changes, message):
    np.savez(tmp_path / "d.npz", **make_arrays(**changes))
    with pytest.raises(MicronetError, match=message) if message else nullcontext():
        load_data(str(tmp_path / "d.npz")).spec  # noqa: B018


def test_arrays_of_any_inputs_with_labels_are_classified(tmp_path, monkeypatch, micronet):
    """A network of two inputs, neither of them images, is trained, quantized and compared without a task of its own."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    labels = {f"y_{part}": np.arange(n) % 3 for part, n in (("train", 90), ("test", 30))}
    sounds = {part: random.standard_normal((len(y), 2, 24)) + 2 * y[:, None, None] for part, y in labels.items()}
    ids = {part: random.integers(0, 9, (len(y), 5)) for part, y in labels.items()}
    inputs = {f"{name}{part[1:]}": x for name, of in (("sound", sounds), ("ids", ids)) for part, x in of.items()}
    np.savez("d.npz", **inputs, **labels, classes=np.array(["a", "b", "c"]))
    Path("net.py").write_text(
        "import torch\n\n\nclass Net(torch.nn.Module):\n    def __init__(self, classes=3):\n"
        "        super().__init__()\n"
        "        self.conv = torch.nn.Conv1d(2, 8, 3)\n        self.words = torch.nn.Embedding(9, 8)\n"
        "        self.fc = torch.nn.Linear(16, classes)\n\n    def forward(self, ids, sound):\n"
        "        sound = self.conv(sound).relu().mean(-1)\n"
        "        return self.fc(torch.cat([sound, self.words(ids).mean(1)], 1))\n"
    )
    done = micronet("train", "--model", "net.py:Net", "--data", "d.npz", "--epochs", "20", "-o", "net.safetensors")
    assert done.code == 0, done.err
    assert "3 classes" in done.err
    code = ["--model", "net.py:Net"]
    done = micronet("quantize", "net.safetensors", *code, "--mode", "ptq", "-o", "int8.safetensors")
    assert done.code == 0, done.err
    done = micronet("compare", "net.safetensors", "int8.safetensors", *code, "--json")
    assert min(row["metrics"]["accuracy"] for row in done.json["rows"]) > 0.9


def test_arrays_of_other_names_are_listed_once(tmp_path):
    np.savez(tmp_path / "d.npz", train_x=np.zeros(2), test_x=np.zeros(2))
    with pytest.raises(MicronetError, match=r"the arrays train_x, test_x, but not x_train, .*; expected x_train"):
        load_data(str(tmp_path / "d.npz"))


def test_pickled_arrays_are_refused(tmp_path):
    np.savez(tmp_path / "d.npz", **make_arrays(x_train=np.array([{"a": 1}], dtype=object)))
    with pytest.raises(MicronetError, match="pickled"):
        load_data(str(tmp_path / "d.npz")).spec  # noqa: B018


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digit", "unknown data set 'digit'; allowed: digits"),
        ("/no/such/folder", "does not exist; pass its current path"),
        ("no.such:thing", "failed"),
        ("missing.npz", "cannot be read"),
    ],
)
def test_unknown_data_is_one_clear_error(name, message):
    with pytest.raises(MicronetError, match=message):
        load_data(name)


def test_sixteen_bit_grey_is_scaled_and_orientation_kept(tmp_path):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "grey.png")
    assert torch.equal(decode(tmp_path / "grey.png", 16)[..., 0].flatten(), torch.arange(256, dtype=torch.uint8))
    image = Image.new("RGB", (16, 16))
    image.putpixel((0, 0), (255, 255, 255))
    exif = image.getexif()
    exif[0x0112] = 3  # upside down
    image.save(tmp_path / "turned.png", exif=exif)
    assert decode(tmp_path / "turned.png", 16)[15, 15].tolist() == [255] * 3


def test_hidden_folders_are_no_classes_and_empty_ones_are_named(tmp_path):
    root = make_folder(tmp_path)
    (root / "train" / ".ipynb_checkpoints").mkdir()
    assert load_data(str(root)).spec.classes == ["cat", "dog"]
    (root / "train" / "emu").mkdir()
    with pytest.raises(MicronetError, match="empty class folders: emu"):
        load_data(str(root)).train  # noqa: B018


def test_broken_folders_are_one_clear_error(tmp_path):
    with pytest.raises(MicronetError, match="no test"):
        load_data(str(tmp_path))
    root = make_folder(tmp_path / "a")
    (root / "test" / "emu").mkdir()
    with pytest.raises(MicronetError, match="emu"):
        load_data(str(root)).test  # noqa: B018
    wide = make_folder(tmp_path / "b", sizes=((30, 20),))
    with pytest.raises(MicronetError, match="--image-size"):
        load_data(str(wide))


def test_other_classes_than_the_networks_are_refused():
    spec = load_data("digits").spec
    with pytest.raises(MicronetError, match="10 classes"):
        load_data("digits", like=DataSpec(**{**spec.to_json(), "classes": ["cat", "dog"]}))


def test_a_recorded_name_of_code_never_runs_even_if_a_file_has_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recorded_code.py").write_text("raise SystemExit('it ran')")
    for name in ("recorded_code:make", "recorded_code:make.npy"):
        with pytest.raises(MicronetError, match="not run automatically"):
            load_data(None, like=DataSpec(name))
        (tmp_path / name).touch()
        with pytest.raises(MicronetError, match="is a file of an unknown type"):
            load_data(None, like=DataSpec(name))


def test_test_data_that_do_not_fit_are_found_before_a_training(tmp_path, micronet):
    root = make_folder(tmp_path / "data", count=3)
    (root / "test" / "emu").mkdir()
    done = micronet(
        "train", "--model", "lenet_bn", "--data", root, "--image-size", 32, "-o", tmp_path / "a.safetensors"
    )
    assert done.code == 2 and "contains classes without training images: emu" in done.err and "epoch" not in done.err


def test_a_file_of_another_type_is_not_said_to_be_missing(tmp_path):
    (tmp_path / "a.csv").write_text("1")
    with pytest.raises(MicronetError, match=r"a.csv is a file of an unknown type; pass a folder"):
        load_data(str(tmp_path / "a.csv"))
