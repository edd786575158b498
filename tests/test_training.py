import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from micronet.training_config import TrainConfig, learning_rate

TRAIN = ["train", "--width", "0.1", "--limit", "300", "--epochs", "4", "--batch-size", "16"]


def start(output, *more):
    command = [sys.executable, "-m", "micronet.cli.app", *TRAIN, "-o", str(output), *more]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_a_killed_and_resumed_training_ends_bit_identical(tmp_path):
    whole, killed = tmp_path / "whole.safetensors", tmp_path / "killed.safetensors"
    assert start(whole).wait() == 0
    checkpoint = tmp_path / "killed.checkpoint.safetensors"
    process = start(killed)
    while not checkpoint.exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoint.exists()
    assert not killed.exists()
    unclaimed = start(killed)
    assert unclaimed.wait() == 2
    assert "--resume" in unclaimed.stderr.read()
    resumed = start(killed, "--resume")
    assert resumed.wait() == 0
    assert "resuming after epoch" in resumed.stderr.read()
    left, right = load_file(whole), load_file(killed)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert not checkpoint.exists()
    rows = [json.loads(line) for line in (tmp_path / "killed.metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]


def test_ctrl_c_exits_130_with_one_line(tmp_path):
    process = start(tmp_path / "a.safetensors", "--epochs", "50")
    while not (tmp_path / "a.checkpoint.safetensors").exists() and process.poll() is None:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait() == 130
    error = process.stderr.read()
    assert "Traceback" not in error
    assert error.splitlines()[-1].startswith("error: interrupted")


def test_a_loss_that_is_no_number_fails_in_one_line(micronet, tmp_path):
    done = micronet(*TRAIN, "--lr", "1e30", "--optimizer", "sgd", "-o", tmp_path / "a.safetensors")
    assert done.code == 1
    assert "lower --lr" in done.err
    assert not (tmp_path / "a.safetensors").exists()


def test_a_training_that_cannot_be_saved_is_not_lost(micronet, tmp_path, monkeypatch):
    from micronet.cli import stages
    from micronet.errors import FailedError

    def full_disk(artifact, path):
        raise FailedError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(stages, "save", full_disk)
        assert micronet(*TRAIN, "-o", tmp_path / "a.safetensors").code == 1
    assert (tmp_path / "a.checkpoint.safetensors").exists()
    done = micronet(*TRAIN, "-o", tmp_path / "a.safetensors", "--resume")
    assert "resuming after epoch 4 of 4" in done.err
    assert done.code == 0
    assert not (tmp_path / "a.checkpoint.safetensors").exists()


@pytest.mark.parametrize("schedule", ["one-cycle", "step"])
@pytest.mark.parametrize("steps", [1, 2, 7, 1000])
def test_the_learning_rate_stays_between_zero_and_its_highest(schedule, steps):
    config = TrainConfig(lr=0.5, schedule=schedule)
    rates = [learning_rate(config, step, steps) for step in range(steps)]
    assert all(0 < rate <= 0.5 for rate in rates)
    if steps == 1000:
        assert max(rates) == pytest.approx(0.5, rel=1e-3)
        assert rates[-1] < 0.001
