"""A training that is killed many times ends as one that never was, and takes no more memory or disk for it."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

TINY = ["train", "--width", "0.1", "--limit", "160", "--batch-size", "32", "--checkpoint-minutes", "0"]


def start(output, epochs, *more):
    command = [sys.executable, "-m", "micronet.cli.app", *TINY, "--epochs", epochs, "-o", str(output), "--quiet", *more]
    return subprocess.Popen(command, stderr=subprocess.PIPE)


@pytest.mark.parametrize(("kills", "epochs"), [(4, "15"), pytest.param(50, "40", marks=pytest.mark.slow)])
def test_kills_and_resumes_change_nothing(tmp_path, kills, epochs):
    whole, killed = tmp_path / "whole.safetensors", tmp_path / "killed.safetensors"
    checkpoint = tmp_path / "killed.checkpoint.safetensors"
    assert start(whole, epochs).wait() == 0
    peaks, sizes = [], []
    for kill in range(kills):
        before = checkpoint.stat().st_mtime_ns if kill else 0
        process = start(killed, epochs, *["--resume"] * bool(kill))
        while not checkpoint.exists() or checkpoint.stat().st_mtime_ns == before:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        peaks.append(os.wait4(process.pid, 0)[2].ru_maxrss)
        sizes.append(checkpoint.stat().st_size)
    assert start(killed, epochs, "--resume").wait() == 0
    left, right = load_file(whole), load_file(killed)
    assert all(torch.equal(left[name], right[name]) for name in left)
    if tenth := kills // 10:  # of a few, chance decides
        assert sum(peaks[-tenth:]) < 1.02 * sum(peaks[:tenth])
        assert max(sizes) < 1.5 * sizes[tenth]  # the best weights come with the first epoch, a row with each
    assert not list(tmp_path.glob(".*"))  # no half-written file stays
