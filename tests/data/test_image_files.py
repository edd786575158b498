import multiprocessing
import os
import signal
import time

import pytest
import torch
from PIL import Image
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from micronet.data import image_files
from micronet.data.batches import eval_batches, train_batches
from micronet.data.image_files import FileSplit, image_memory, list_images
from micronet.data.load import load_data
from micronet.errors import FailedError, MicronetError
from tests.conftest import as_rank
from tests.data.test_data import make_folder
from tests.training.processes import Command

BROKEN = b"\x89PNG\r\n\x1a\nbroken"


@pytest.fixture
def small_chunks(monkeypatch):
    """Two images of 16 pixels a side a chunk, so that a few images keep several workers busy."""
    monkeypatch.setattr(image_files, "CHUNK_BYTES", 2 * 3 * 16 * 16)


def open_folder(root, monkeypatch, gib):
    monkeypatch.setenv("MICRONET_IMAGE_MEMORY", gib)
    data = load_data(str(root), image_size=16)
    assert len(data.train) + len(data.test)  # opened while the variable says so
    return data


def files_of(root):
    paths = list_images(root)
    return FileSplit(paths, torch.zeros(len(paths), dtype=torch.int64), 16)


@pytest.mark.parametrize("sizes", [((20, 20),), ((30, 20), (20, 41))])
@pytest.mark.parametrize("cores", [1, 2])
def test_memory_and_workers_change_no_pixel(tmp_path, monkeypatch, small_chunks, sizes, cores):
    root = make_folder(tmp_path, sizes)
    kept, streamed = (open_folder(root, monkeypatch, gib) for gib in ("1", "0"))
    monkeypatch.setattr(image_files, "usable_cores", lambda: cores)
    for epoch in (1, 2):
        read = [
            [*train_batches(data.train, data.spec, 5, seed=1, epoch=epoch), *eval_batches(data.test, data.spec, 5)]
            for data in (kept, streamed)
        ]
        for (left, ours), (right, theirs) in zip(*read, strict=True):
            assert torch.equal(left, right)
            assert torch.equal(ours, theirs)


def test_files_are_decoded_once_where_there_is_room(tmp_path, monkeypatch, small_chunks):
    root = make_folder(tmp_path)
    kept, streamed = (open_folder(root, monkeypatch, gib) for gib in ("1", "0"))
    first = torch.cat([images for images, _ in eval_batches(kept.test, kept.spec, 5)])
    for path in list_images(root):
        path.write_bytes(BROKEN)
    assert torch.equal(torch.cat([images for images, _ in eval_batches(kept.test, kept.spec, 4)]), first)
    with pytest.raises(MicronetError, match="cannot be read"):
        next(eval_batches(streamed.test, kept.spec, 4))


def test_room_is_shared_by_the_splits(tmp_path, monkeypatch):
    root = make_folder(tmp_path)
    data = open_folder(root, monkeypatch, str(12 * 3 * 16 * 16 / 2**30))  # one split of 12 images
    data.train.images(torch.arange(8))
    assert len(data.test) == 12
    for path in list_images(root):
        path.write_bytes(BROKEN)
    data.train.images(torch.arange(8))
    with pytest.raises(MicronetError, match="cannot be read"):
        data.test.images(torch.arange(8))


@pytest.mark.parametrize("said", ["much", "nan", "inf", "-1"])
def test_memory_that_is_no_number_is_one_clear_error(monkeypatch, said):
    monkeypatch.setenv("MICRONET_IMAGE_MEMORY", said)
    with pytest.raises(MicronetError, match="MICRONET_IMAGE_MEMORY is"):
        image_memory()


def test_memory_is_shared_by_the_processes_of_a_training(monkeypatch):
    monkeypatch.delenv("MICRONET_IMAGE_MEMORY", raising=False)
    monkeypatch.setattr(image_files, "available_memory", lambda: 1000)
    assert image_memory() == 250
    as_rank(monkeypatch, 0, 2)
    assert image_memory() == 125


def test_one_batch_starts_no_process(tmp_path, monkeypatch):
    files = files_of(make_folder(tmp_path))
    monkeypatch.setattr(image_files, "DataLoader", None)
    assert next(files.stream([torch.arange(4), torch.arange(4)])).shape == (4, 3, 16, 16)


def test_streaming_leaves_the_random_state_alone(tmp_path):
    files = files_of(make_folder(tmp_path))
    before = torch.get_rng_state()
    assert len(list(files.stream([torch.arange(4)] * 3))) == 3
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_read_only_a_little_ahead(tmp_path, monkeypatch, small_chunks):
    root = make_folder(tmp_path / "images", count=20)
    (tmp_path / "decoded").mkdir()
    decode = image_files.decode

    def noted(path, size):
        (tmp_path / "decoded" / path.as_posix().replace("/", "-")).touch()
        return decode(path, size)

    monkeypatch.setattr(image_files, "decode", noted)
    monkeypatch.setattr(image_files, "usable_cores", lambda: 2)
    batches = files_of(root).stream(torch.split(torch.arange(80), 4))
    next(batches), next(batches)
    time.sleep(0.5)  # for workers that do not wait to be found out
    ahead = 2 * image_files.CHUNKS_AHEAD * 2
    assert len(list((tmp_path / "decoded").iterdir())) <= 2 * 4 + ahead
    batches.close()


def test_a_reader_that_stops_leaves_no_process(tmp_path, small_chunks):
    files = files_of(make_folder(tmp_path))
    batches = files.stream(torch.split(torch.arange(24), 4))
    next(batches), next(batches)
    assert multiprocessing.active_children()
    batches.close()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("broken", ["cat/0.png", "dog/5.png"])  # in the first batch, and in a worker's
def test_a_broken_image_is_named_in_one_line(tmp_path, monkeypatch, broken):
    root = make_folder(tmp_path)
    (root / "test" / broken).write_bytes(BROKEN)
    data = open_folder(root, monkeypatch, "0")
    with pytest.raises(MicronetError, match=rf"^\S*test/{broken} cannot be read[^\n]*$"):
        list(eval_batches(data.test, data.spec, 4))


def test_a_killed_worker_is_one_clear_error(tmp_path, monkeypatch, small_chunks):
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.1,))  # seconds; 5 of torch's
    batches = files_of(make_folder(tmp_path, count=20)).stream(torch.split(torch.arange(80), 4))
    next(batches), next(batches)
    for child in multiprocessing.active_children():
        child.kill()
    with pytest.raises(FailedError, match=r"^an image-decoding process died[^\n]*$"):
        list(batches)


@pytest.mark.parametrize("loss", [ConnectionResetError(104, "Connection reset by peer"), EOFError()])
def test_a_worker_that_ends_while_it_hands_images_over_is_the_same_error(tmp_path, monkeypatch, small_chunks, loss):
    def lost(queue, *args):
        raise loss

    monkeypatch.setattr("torch.utils.data.dataloader._MultiProcessingDataLoaderIter._next_data", lost)
    files = files_of(make_folder(tmp_path, count=4))
    with pytest.raises(FailedError, match="an image-decoding process died"):
        list(files.stream(torch.split(torch.arange(16), 4)))


def test_ctrl_c_ends_a_training_and_its_workers(tmp_path):
    root = make_folder(tmp_path / "images", count=10)
    options = ["--width", "0.1", "--data", root, "--epochs", "1000", "--batch-size", "8"]
    output = tmp_path / "a.safetensors"
    training = Command(tmp_path / "log", "train", *options, "-o", output, MICRONET_IMAGE_MEMORY="0")
    training.wait_for(tmp_path / "a.checkpoint.safetensors")
    os.killpg(training.pid, signal.SIGINT)  # as a terminal does: to every process
    assert training.wait() == 130
    assert "Traceback" not in "".join(training.errors())
    deadline = time.monotonic() + 10
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(training.pid, 0)
            time.sleep(0.01)


def test_images_of_every_suffix_and_depth_are_found_and_hidden_ones_are_not(tmp_path):
    names = ["a/b/0.JPEG", "a/1.jpeg", "2.jfif", "3.PNG", ".4.png", ".cache/5.png", "6.txt", "7"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [path.relative_to(tmp_path).as_posix() for path in list_images(tmp_path)] == sorted(
        names[:4], key=lambda name: name.split("/")
    )


def test_imagenets_layout_is_read(tmp_path):
    for part in ("train", "val"):
        for name in ("n01440764", "n01443537"):
            for index in range(4):
                place = tmp_path / part / name / f"{name}_{index}.JPEG"
                place.parent.mkdir(parents=True, exist_ok=True)
                mode = ["RGB", "L", "CMYK", "RGB"][index]
                Image.new(mode, (50 + index, 40)).save(place, "PNG" if index == 3 else "JPEG")  # ImageNet holds a PNG
    data = load_data(str(tmp_path), image_size=32)
    assert (len(data.train), len(data.validation), len(data.test)) == (7, 1, 8)
    assert [images.shape for images, _ in eval_batches(data.test, data.spec)] == [(8, 3, 32, 32)]


def test_a_flat_val_folder_is_one_clear_error(tmp_path):
    root = make_folder(tmp_path, parts=("train",))
    (root / "val").mkdir()
    Image.new("RGB", (20, 20)).save(root / "val" / "ILSVRC2012_val_00000001.png")
    with pytest.raises(MicronetError, match="not in class folders"):
        load_data(str(root)).test  # noqa: B018
