"""Labelled data in memory: what the Python API makes of batches, whatever their form."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import micronet
from micronet.data.batch_samples import BatchSamples, settle_labels
from micronet.data.batches import Normalize
from micronet.data.load import load_data
from micronet.data.memory import MemoryData
from micronet.data.samples import SampleSplit
from micronet.data.spec import DataSpec
from micronet.errors import MicronetError
from micronet.tasks.agreement import Agreement

X = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(40) % 4
LOADER = DataLoader(TensorDataset(X, Y), batch_size=16)


def network(channels=4):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, channels)
    ).eval()


class Pair(nn.Module):
    """Takes two inputs, by their order or their names."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.left, self.right = nn.Linear(5, 4), nn.Linear(3, 4)

    def forward(self, left, right):
        return self.left(left) + self.right(right)


class OfDict(Pair):
    def forward(self, batch: dict):
        return super().forward(batch["left"], batch["right"])


LEFT, RIGHT = X[:, 0, 0, :5].contiguous(), X[:, 1, 0, :3].contiguous()
PAIR = {"right": RIGHT, "left": LEFT}


@pytest.mark.parametrize(
    ("net", "data", "inputs"),
    [
        (network(), LOADER, (X,)),
        (network(), TensorDataset(X, Y), (X,)),
        (network(), [(X[:30], Y[:30]), [X[30:], Y[30:]]], (X,)),
        (network(), (X, Y), (X,)),
        (network(), (X.double().numpy(), Y.int().numpy()), (X,)),
        (network(), (each for each in LOADER), (X,)),
        (Pair(), (LEFT, RIGHT, Y[:, None]), (LEFT, RIGHT)),
        (Pair(), ((LEFT, RIGHT), Y), (LEFT, RIGHT)),
        (Pair(), {**PAIR, "label": Y}, (LEFT, RIGHT)),
        (Pair(), [(PAIR, Y)], (LEFT, RIGHT)),
        (OfDict(), (PAIR, Y), (PAIR,)),
    ],
    ids=["loader", "dataset", "list", "tuple", "arrays", "generator", "two", "nested", "dict", "dict, y", "of a dict"],
)
def test_accuracy_is_that_by_hand(net, data, inputs):
    with torch.no_grad():
        scores = net(*inputs)
    row = micronet.evaluate(net, data=data, skip_timing=True)
    assert (row.images, row.accuracy) == (40, int((scores.argmax(1) == Y).sum()) / 40)
    assert row.loss == pytest.approx(float(F.cross_entropy(scores, Y)), abs=1e-5)  # means in another order


def test_one_tuple_is_one_batch_to_every_function():
    whole, listed = (
        [
            micronet.quantize(network(), data=data, mode="ptq").model.state_dict(),
            micronet.quantize(network(), data=data, epochs=1, batch_size=8).model.state_dict(),
            micronet.prune(network(), data=data, percent=0.5, criterion="taylor").model.state_dict(),
            micronet.finetune(network(), data=data, epochs=1).model.state_dict(),
            micronet.train(model=network(), data=data, epochs=1).model.state_dict(),
        ]
        for data in ((X, Y), [(X, Y)])
    )
    for ours, theirs in zip(whole, listed, strict=True):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(("settings", "used"), [({}, 6), ({"calib_batches": 4}, 4), ({"calib_batches": 1}, 1)])
def test_calibration_takes_all_batches_or_as_many_as_requested(settings, used):
    batches = [each * number for number, each in enumerate(X[:36].split(6), 1)]
    given = micronet.quantize(network(), data=batches, mode="ptq", **settings)
    expected = micronet.quantize(network(), data=batches[:used], mode="ptq")
    assert torch.equal(given.model(X), expected.model(X))
    assert given.history[-1].config["calib_batches"] == settings.get("calib_batches")


def test_a_tuple_of_tensors_of_different_lengths_is_a_sequence_of_batches():
    ours, theirs = (micronet.quantize(network(), data=data, mode="ptq").model for data in ((X, X[:7]), [X, X[:7]]))
    assert torch.equal(ours(X), theirs(X))
    ours, theirs = (micronet.quantize(Pair(), data=data, mode="ptq").model for data in ((LEFT, RIGHT), [(LEFT, RIGHT)]))
    assert torch.equal(ours(LEFT, RIGHT), theirs(LEFT, RIGHT))


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "float.onnx"
    micronet.export_onnx(network(), X[:2], output=path)
    return path


def test_comparing_in_memory_is_comparing_on_the_same_data_in_a_file(tmp_path, onnx_file):
    pixels = (255 * X).byte()
    labelled = {f"{name}_{part}": x for part in ("train", "test") for name, x in (("x", pixels), ("y", Y))}
    np.savez(tmp_path / "data.npz", **labelled)
    normalized = Normalize(load_data(str(tmp_path / "data.npz")).spec)(pixels)
    quantized = micronet.quantize(network(), data=normalized, mode="ptq", w_bits=3)
    for networks in ([network(), quantized, onnx_file], [onnx_file]):
        stored, given = (
            [row[:5] + row[6:12] + (row.accuracy,) for row in micronet.compare(networks, data=data, skip_timing=True)]
            for data in (tmp_path / "data.npz", [(normalized, Y)])
        )
        assert stored == given  # but for the loss, whose means are taken in another order


TASK = """
import torch

class Task:
    main = "distance"
    higher_is_better = False

    def __init__(self):
        self.total, self.samples = 0.0, 0

    def data(self, place, part):
        stored = torch.load(place)
        return None if part == "validation" else list(zip(stored["x"], stored["y"]))

    def loss(self, outputs, targets):
        return (outputs - torch.stack(list(targets)).to(outputs.device)).square().mean()

    def update(self, outputs, targets):
        self.total += float(self.loss(outputs, targets)) * len(outputs)
        self.samples += len(outputs)

    def compute(self):
        return {"distance": self.total / self.samples}
"""


def test_training_is_that_on_the_same_samples_in_a_file(tmp_path):
    (tmp_path / "task.py").write_text(TASK)
    wanted = torch.randn(40, 4, generator=torch.Generator().manual_seed(2))
    torch.save({"x": X, "y": wanted}, tmp_path / "data.pt")
    task = f"{tmp_path}/task.py:Task"
    stored, given = (
        micronet.quantize(network(), data=data, task=task, epochs=2, batch_size=8)
        for data in (tmp_path / "data.pt", DataLoader(TensorDataset(X, wanted), batch_size=7))
    )
    ours, theirs = stored.model.state_dict(), given.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert stored.metrics["validation_distance"] == given.metrics["validation_distance"]
    samples = [BatchSamples([(X,)], [each], None, stacked=False) for each in (wanted, wanted, wanted + 1)]
    prints = [SampleSplit(each, "").fingerprint() for each in samples]
    assert prints[0] == prints[1] != prints[2]  # a training on other values is not resumed
    row = micronet.evaluate(given, data=(X, wanted), task=task, skip_timing=True)
    assert row.metrics["distance"] == pytest.approx((given.model.eval()(X) - wanted).square().mean().item(), rel=1e-5)


def test_agreement_needs_no_labels(tmp_path):
    np.savez(tmp_path / "few.npz", x=X[:6].numpy())  # so few that all of them serve for every purpose
    quantized = micronet.quantize(network(), data=[X], mode="ptq")
    stored, given = (
        micronet.compare([network(), quantized], data=data, task="agreement", skip_timing=True)
        for data in (tmp_path / "few.npz", X[:6])
    )
    assert [row.metrics for row in stored] == [row.metrics for row in given]
    trained = micronet.quantize(network(), data=LOADER, task="agreement", epochs=1)
    assert trained.metrics["test_error"] < 0.2


def test_masks_are_labels_of_segmentation():
    net = nn.Conv2d(3, 4, 1)
    masks = torch.randint(4, (40, 8, 8), generator=torch.Generator().manual_seed(0))
    masks[0] = 255
    row = micronet.evaluate(net, data=(X, masks[:, None]), task="segmentation", skip_timing=True)
    right = net(X).argmax(1)[1:] == masks[1:]
    assert row.metrics["pixel_accuracy"] == pytest.approx(float(right.double().mean()), abs=1e-12)
    with pytest.raises(MicronetError, match="scores for 4 classes, 0 to 3, but a mask has class 5"):
        micronet.evaluate(net, data=(X, torch.full_like(masks, 5)), task="segmentation")


def test_a_float_onnx_file_is_calibrated_in_memory(tmp_path, onnx_file):
    np.savez(tmp_path / "x.npz", x=X.numpy())
    stored, given = (
        micronet.quantize(onnx_file, data=data, mode="ptq", skip_timing=True) for data in (tmp_path / "x.npz", (X, Y))
    )
    assert stored.SerializeToString() == given.SerializeToString()


def test_a_new_network_fits_the_data():
    trained = micronet.train(model="nin", width=0.1, data=(X[:, :1], Y), epochs=1)
    assert trained.spec.args["in_channels"] == 1 and trained.spec.args["num_classes"] == 4


def test_the_file_says_that_its_data_were_in_memory(tmp_path, micronet):
    import micronet as api

    path = tmp_path / "net.safetensors"
    api.train(model="nin", width=0.1, data=(X, Y), epochs=1, output=path)
    for words in (["evaluate", path], ["quantize", path], ["export-onnx", path]):
        done = micronet(*words)
        assert done.code == 2
        assert "was given in memory, from Python" in done.err and "--data" in done.err


BOXES, CLASSES = torch.arange(16.0).reshape(2, 2, 4), torch.tensor([[3, 1], [0, 2]])


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([*BOXES], [*BOXES]),
        ([BOXES[0], BOXES[1][:1]], [BOXES[0], BOXES[1][:1]]),
        ((BOXES[0], BOXES[1][:1]), [BOXES[0], BOXES[1][:1]]),
        ([BOXES, CLASSES], [(BOXES[0], CLASSES[0]), (BOXES[1], CLASSES[1])]),  # as a DataLoader collates tuples
        ((BOXES, CLASSES), [(BOXES[0], CLASSES[0]), (BOXES[1], CLASSES[1])]),
        ([BOXES] * 3, [(BOXES[0],) * 3, (BOXES[1],) * 3]),
        ({"boxes": [*BOXES]}, [{"boxes": BOXES[0]}, {"boxes": BOXES[1]}]),
        ([{"class": 1}, {"class": 2}], [{"class": 1}, {"class": 2}]),
    ],
)
def test_a_list_of_as_many_labels_as_samples_is_never_transposed(labels, expected):
    samples = BatchSamples([(X[:2],)], [settle_labels(labels, 2, 1)], None, stacked=False)
    assert str([samples[index][1] for index in range(2)]) == str(expected)


def test_labels_that_can_be_read_in_two_ways_are_refused():
    with pytest.raises(MicronetError, match=r"batch 7 are a tuple of 2 tensors of length 2.*pass a list"):
        settle_labels(tuple(BOXES), 2, 7)
    assert isinstance(settle_labels(tuple(BOXES), 2, 7, are_items=True), tuple)
    with pytest.raises(MicronetError, match="3 samples, but 2 labels"):
        settle_labels([*BOXES], 3, 1)
    two_scores = DataLoader([(x, (torch.zeros(2), torch.ones(2))) for x in X[:5]], batch_size=3)
    with pytest.raises(MicronetError, match="batch 2 are a list of one per sample, but those of batch 1"):
        MemoryData(two_scores).open(Agreement(), DataSpec(), network(), testing=True)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([{"class": 1}], [{"class": 7}]),
        (["cat"], ["dog"]),
        ([{"a": 1}], [{"b": 1}]),
        (torch.zeros(1, 4), torch.zeros(1, 2, 2)),
        (torch.zeros(1), torch.zeros(1, dtype=torch.int32)),
    ],
)
def test_a_training_is_not_resumed_on_other_labels(one, other):
    first, second, same = (BatchSamples([(X[:1],)], [each], None, stacked=False).digest for each in (one, other, one))
    assert first == same != second


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([X], "have no labels, but task classification needs them"),
        ([(X, Y), X], "batch 2 of the data in memory has no labels, but others have"),
        ((X, Y + 1), "a label is class 4, but .* scores classes 0 to 3"),
        ((X, Y - 1), "a label is -1; class numbers count from 0"),
        ((X, F.one_hot(Y).float()), r"the labels are float32 \(N, 4\); expected class numbers"),
        ([(X, list("abcd" * 10))], "the labels are a list; expected class numbers"),
        ([(X, Y[:5])], "batch 1 of the data in memory has 40 samples, but 5 labels"),
        ([(X, Y), (X[:, :, 1:], Y)], r"batch 2 are float32 \(3, 7, 8\), but those of batch 1 are float32 \(3, 8, 8\)"),
        ([(torch.where(X < 0.001, torch.nan, X), Y)], "that are NaN"),
        (iter(()), "no batches; a generator can be read only once"),
        (3, "data is a int; expected"),
        ([("x", Y)], "expected batches that are tensors"),
        ((X[:, :2], Y), "does not accept"),
    ],
    ids=["none", "some", "high", "low", "floats", "words", "few", "shapes", "nan", "empty", "type", "text", "channels"],
)
def test_data_that_do_not_fit_are_refused_in_one_line(data, message):
    for function in (micronet.evaluate, micronet.finetune):
        if hasattr(data, "__next__"):
            data = iter(())
        with pytest.raises(MicronetError, match=message) as caught:
            function(network(), data=data)
        assert "\n" not in str(caught.value)
