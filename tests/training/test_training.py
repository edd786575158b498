import json
import os
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import micronet
from micronet.artifact.artifact import Artifact, save
from micronet.artifact.header import StageRecord
from micronet.core.progress import Silent
from micronet.data.batches import eval_batches
from micronet.data.load import load_data
from micronet.errors import FailedError, MicronetError, StoppedError
from micronet.models.build import ModelSpec
from micronet.runtimes.config import RuntimeOptions
from micronet.runtimes.torch import EagerPredictor
from micronet.tasks.agreement import Agreement
from micronet.tasks.classification import Classification
from micronet.training.checkpoint import Checkpoint, TrainState
from micronet.training.config import RunContext, TrainConfig, TrainHooks, learning_rate
from micronet.training.distillation import Teacher
from micronet.training.fall import describe_fall, is_fall
from micronet.training.gradients import add_gradients
from micronet.training.loop import Trainer, fit_artifact
from micronet.training.step import NotFiniteError, TrainStep, first_non_finite, make_optimizer
from tests.training.processes import Command

TRAIN = ["train", "--width", "0.1", "--limit", "160", "--epochs", "4", "--batch-size", "16"]


def start(output, *more, **limits):
    return Command(output.with_suffix(".log"), *TRAIN, "-o", output, *more, **limits)


def test_a_killed_and_resumed_training_ends_bit_identical(tmp_path):
    whole, killed = tmp_path / "whole.safetensors", tmp_path / "killed.safetensors"
    assert start(whole).wait() == 0
    process = start(killed, "--epochs", "4")
    checkpoint = process.wait_for(tmp_path / "killed.checkpoint.safetensors")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert checkpoint.exists()
    assert not killed.exists()
    unclaimed = start(killed)
    assert unclaimed.wait() == 2
    assert "--resume" in unclaimed.errors()[-1]
    resumed = start(killed, "--resume")
    assert resumed.wait() == 0
    assert any("resuming after epoch" in line for line in resumed.errors())
    left, right = load_file(whole), load_file(killed)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert not checkpoint.exists()
    rows = [json.loads(line) for line in (tmp_path / "killed.metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]


def test_ctrl_c_exits_130_with_one_line(tmp_path):
    process = start(tmp_path / "a.safetensors", "--epochs", "50")
    process.wait_for(tmp_path / "a.checkpoint.safetensors")
    os.kill(process.pid, signal.SIGINT)
    assert process.wait() == 130
    assert process.errors()[-1].startswith("error: interrupted")


def test_a_loss_that_is_no_number_fails_in_one_line(micronet, tmp_path):
    done = micronet(*TRAIN, "--lr", "1e30", "--optimizer", "sgd", "-o", tmp_path / "a.safetensors")
    assert done.code == 1
    assert "use an --lr below" in done.err
    assert "starting in layer features." in done.err
    assert not (tmp_path / "a.safetensors").exists()


def test_the_search_for_what_broke_computes_as_the_step_and_moves_nothing():
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(4, 2, bias=False))
    nn.init.constant_(model[2].weight, 3.4e38 / 4)  # as a sum finite in 32 bits, not in bf16
    model[0].weight.data.zero_()
    model[0].bias.data.fill_(1)
    training = TrainConfig(amp="bf16")
    step = TrainStep(model, make_optimizer(model, training), training, torch.device("cpu"))
    images = torch.randn(3, 1, 2, 2)
    assert first_non_finite(model, images) is None
    with pytest.raises(NotFiniteError) as raised:
        step([(images, torch.tensor([0, 1, 0]))], [3])
    assert raised.value.layer == "2"
    assert int(model[0].num_batches_tracked) == 1  # by the step alone
    assert first_non_finite(model, images * float("inf")) == "0"
    assert int(model[0].num_batches_tracked) == 1


def test_a_log_that_finds_no_room_says_what_to_do(micronet, tmp_path):
    (tmp_path / "a.metrics.jsonl").symlink_to("/dev/full")
    done = micronet(*TRAIN, "--epochs", "1", "-o", tmp_path / "a.safetensors")
    assert done.code == 1
    assert "a.metrics.jsonl could not be written (No space left on device); free some disk space, then" in done.err


def test_a_training_that_cannot_be_saved_is_not_lost(micronet, tmp_path, monkeypatch):
    def full_disk(artifact, path, **options):
        raise FailedError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("micronet.artifact.artifact.save", full_disk)
        assert micronet(*TRAIN, "-o", tmp_path / "a.safetensors").code == 1
    assert (tmp_path / "a.checkpoint.safetensors").exists()
    (tmp_path / "a.metrics.jsonl").write_text('{"epoch": 1}\n{"ep')  # as a kill during a line leaves it
    done = micronet(*TRAIN, "-o", tmp_path / "a.safetensors", "--resume")
    assert "resuming after epoch 4 of 4" in done.err
    assert done.code == 0
    rows = [json.loads(line) for line in (tmp_path / "a.metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert not (tmp_path / "a.checkpoint.safetensors").exists()


def test_training_stops_at_its_time_and_goes_on_bit_identical(micronet, tmp_path):
    whole, stopped = tmp_path / "whole.safetensors", tmp_path / "stopped.safetensors"
    quantize = ["quantize", "--epochs", "2", "--limit", "200", "--batch-size", "32", "--bn-fuse"]
    assert micronet(*TRAIN, "--epochs", "1", "-o", tmp_path / "float.safetensors").code == 0
    assert micronet(*quantize, tmp_path / "float.safetensors", "-o", whole).code == 0
    for stop in range(2):
        done = micronet(
            *quantize, tmp_path / "float.safetensors", "-o", stopped, "--max-time", "0", *["--resume"] * stop
        )
        assert done.code == 3
        where = f"in epoch 1 of 2, after step {stop + 1}"
        assert done.err.splitlines()[-1] == (
            f"stopped: --max-time reached {where}; run the same command with --resume to continue"
        )
        assert not stopped.exists()
    assert micronet(*quantize, tmp_path / "float.safetensors", "-o", stopped, "--resume").code == 0
    left, right = load_file(whole), load_file(stopped)
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_patience_ends_a_training_that_gets_no_better(micronet, tmp_path):
    done = micronet(*TRAIN, "--epochs", "9", "--lr", "0", "--patience", "2", "-o", tmp_path / "a.safetensors", "--json")
    assert done.code == 0
    rows = [json.loads(line) for line in (tmp_path / "a.metrics.jsonl").read_text().splitlines()]
    best = max(rows, key=lambda row: (row["validation_accuracy"], -row["validation_loss"]))["epoch"]
    assert len(rows) == best + 2 < 9
    assert done.json["epoch"] == best
    refused = micronet("sparse-train", "--epochs", "1", "--patience", "2", "-o", tmp_path / "b.safetensors")
    assert refused.code == 2
    assert "--patience" in refused.err


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_accumulated_batches_are_one_larger_batch(optimizer):
    config = TrainConfig(optimizer=optimizer, lr=0.05, label_smoothing=0.1)
    images, labels = torch.randn(20, 3, 8, 8), torch.arange(20) % 4
    trained = []
    for sizes in ([20], [8, 8, 4]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4)).double()
        step = TrainStep(model, make_optimizer(model, config), config, torch.device("cpu"))
        for _ in range(3):
            step(zip(images.double().split(sizes), labels.split(sizes), strict=True), sizes)
        trained.append(model.state_dict())
    for name, tensor in trained[0].items():
        torch.testing.assert_close(trained[1][name], tensor, rtol=1e-9, atol=1e-9)


def test_a_full_disk_leaves_the_checkpoint_before_and_says_so(tmp_path):
    output, checkpoint = tmp_path / "a.safetensors", tmp_path / "a.checkpoint.safetensors"
    full = start(output, "--max-time", "0", file_bytes=1000)
    assert full.wait() == 1
    assert full.errors()[-1].endswith("; free some disk space, then start again")
    stopped = start(output, "--max-time", "0")
    assert stopped.wait() == 3
    before = checkpoint.read_bytes()
    (tmp_path / ".a.checkpoint.safetensors.micronet-killed").touch()
    full = start(output, "--resume", file_bytes=len(before) // 2)
    assert full.wait() == 1
    error = full.errors()[-1]
    assert error.startswith(f"error: {checkpoint} could not be written (")
    assert error.endswith("the previous checkpoint is intact; free some disk space, then run again with --resume")
    assert checkpoint.read_bytes() == before
    assert not list(tmp_path.glob(".*"))
    assert start(output, "--resume").wait() == 0


def test_sixteen_bits_train_and_the_artifact_stays_in_thirty_two(micronet, tmp_path, monkeypatch):
    monkeypatch.setattr("micronet.training.preset._check_bf16", lambda *_: None)
    assert micronet(*TRAIN, "--epochs", "1", "--amp", "bf16", "-o", tmp_path / "a.safetensors").code == 0
    tensors = load_file(tmp_path / "a.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32, torch.int64}
    refused = micronet(*TRAIN, "--amp", "fp16", "--device", "cpu", "-o", tmp_path / "b.safetensors")
    assert refused.code == 2
    assert "--amp bf16" in refused.err


class Volumes(nn.Module):
    """A network of images whose convolution has three dimensions."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv3d(1, 4, (3, 3, 3), stride=(1, 4, 4)), nn.Linear(4, 10)

    def forward(self, x):
        return self.fc(self.conv(x.unsqueeze(1)).mean((2, 3, 4)))


def test_three_dimensional_convolutions_train_teach_and_are_evaluated(tmp_path):
    data = load_data("digits", limit=40)
    student = Artifact(Volumes(), ModelSpec("volumes"), [])
    run = RunContext(tmp_path / "a.safetensors", torch.device("cpu"))
    trained = fit_artifact(student, data, TrainConfig(epochs=1), run)
    save(trained, run.output)
    assert 0 <= trained.metrics["test_accuracy"] <= 1
    predict = EagerPredictor(trained, RuntimeOptions())
    images, _ = next(eval_batches(data.test, data.spec))
    teacher = Teacher(trained.model, 0.5, 4.0)
    np.testing.assert_allclose(predict(images.numpy()), teacher.outputs((images,)).numpy(), rtol=1e-4, atol=1e-5)


def test_a_checkpoint_without_a_scalers_state_resumes_into_sixteen_bits(tmp_path, monkeypatch):
    """As before the first step, and as written where gradients are not scaled."""
    run = RunContext(tmp_path / "a.safetensors", torch.device("cpu"))
    trainer = Trainer(Volumes(), load_data("digits", limit=40), TrainConfig(epochs=1), run, {})
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *args, **options: scaler)
    trainer.fit()
    assert scaler.state_dict()["_growth_tracker"] == 1


@pytest.mark.parametrize(("reached", "message"), [({"step": 99}, "after step 99"), ({"rows": [{}]}, "incomplete")])
def test_a_checkpoint_from_beyond_its_training_is_refused(tmp_path, reached, message):
    run = RunContext(tmp_path / "a.safetensors", torch.device("cpu"), resume=True)
    trainer = Trainer(Volumes(), load_data("digits", limit=40), TrainConfig(epochs=1), run, {})
    config = trainer.config
    step = TrainStep(trainer.model, make_optimizer(trainer.model, config), config, torch.device("cpu"))
    Checkpoint.beside(run.output, {**config.to_json(), "seed": run.seed}).save(step, TrainState(**reached))
    with pytest.raises(MicronetError, match=f"{message}.*--force"):
        trainer.fit()


class Lines(Silent):
    """Progress that keeps its lines."""

    def __init__(self):
        self.lines = []

    def line(self, text):
        self.lines.append(text)


def flat(inputs):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(inputs, 10))
    return Artifact(model, ModelSpec("flat"), [StageRecord("import", {})])


def test_what_a_network_was_before_its_training_is_known_after_a_resume(tmp_path):
    data, config = load_data("digits", limit=40), TrainConfig(epochs=1, batch_size=16, lr=1e-9, preset="plain")
    asked = {"output": tmp_path / "a.safetensors", "device": torch.device("cpu")}
    never = TrainHooks(largest_fall=-1)  # any training is a fall then
    with pytest.raises(StoppedError):
        fit_artifact(flat(3072), data, config, RunContext(**asked, deadline=0.0), never)
    progress = Lines()
    fit_artifact(flat(3072), data, config, RunContext(**asked, resume=True, progress=progress), never)
    assert "before the training" in progress.lines[-1]


@pytest.mark.parametrize(("lr", "epoch"), [(10.0, 0), (1e-4, 1)], ids=["worse", "better"])
def test_a_training_towards_a_reference_that_made_the_network_worse_is_undone(lr, epoch):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    data = [torch.randn(64, 8)]
    begun, trained = (
        micronet.quantize(net, data=data, mode="qat", task="agreement", lr=rate, epochs=1, w_bits=4)
        for rate in (1e-12, lr)
    )
    assert trained.metrics["epoch"] == epoch
    same = torch.equal(trained.model[0].weight, begun.model[0].weight)
    assert same == (epoch == 0)


@pytest.mark.parametrize(
    ("task", "was", "now", "falls"),
    [
        (Classification(), 0.90, 0.89, False),
        (Classification(), 0.90, 0.88, True),
        (Agreement(), 0.010, 0.012, False),
        (Agreement(), 0.010, 0.013, True),
        (Agreement(), 0.010, float("nan"), True),
        (Agreement(), 0.0, 0.1, False),  # a network that is its own reference
    ],
)
def test_a_fall_is_more_than_noise(task, was, now, falls):
    rows = [{f"validation_{task.main}": value} for value in (was, now)]
    assert is_fall(*rows, task, TrainHooks().largest_fall) == falls
    said = describe_fall(*rows, task, 0.1, "more", undone=False)
    assert f"was {was:.4f} before the training and is {now:.4f} now; " in said


def test_images_that_do_not_fit_a_trained_network_are_refused(tmp_path):
    run = RunContext(tmp_path / "a.safetensors", torch.device("cpu"))
    with pytest.raises(MicronetError, match=r"does not accept images of shape \(3, 32, 32\)"):
        fit_artifact(flat(48), load_data("digits", limit=40), TrainConfig(epochs=1), run)


@pytest.mark.slow
def test_a_compiled_step_leaves_the_artifact_as_it_is(micronet, tmp_path):
    path = tmp_path / "a.safetensors"
    assert micronet(*TRAIN, "--epochs", "1", "--compile", "-o", path).code == 0
    assert micronet("evaluate", path).code == 0
    folding = ["quantize", path, "--epochs", "1", "--bn-fuse", "--compile", "-o", tmp_path / "q.safetensors"]
    assert micronet(*folding).code == 0


@pytest.mark.parametrize("schedule", ["one-cycle", "linear", "step"])
@pytest.mark.parametrize("steps", [1, 2, 7, 1000])
def test_the_learning_rate_stays_between_zero_and_its_highest(schedule, steps):
    config = TrainConfig(lr=0.5, schedule=schedule)
    rates = [learning_rate(config, step, steps) for step in range(steps)]
    assert all(0 < rate <= 0.5 for rate in rates)
    if steps == 1000:
        assert max(rates) == pytest.approx(0.5, rel=1e-3)
        assert rates[-1] < 0.001


def test_a_forward_that_overwrites_what_gradients_need_is_refused_in_one_line():
    x = torch.ones(3, requires_grad=True).exp()
    loss = x.pow(2).sum()
    x.relu_()
    with pytest.raises(MicronetError, match="not in place"):
        add_gradients(loss)
