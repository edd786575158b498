"""A training that is killed many times ends as one that never was, and takes no more memory or disk for it."""

import os
import re
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.training.processes import Command

TINY = ["train", "--width", "0.1", "--limit", "160", "--batch-size", "64", "--checkpoint-minutes", "0", "--quiet"]


def start(output, epochs, *more):
    return Command(output.with_suffix(".log"), *TINY, "--epochs", epochs, "-o", output, *more)


def peak_memory(pid):
    """Return the most memory that a process has held, in KiB."""
    return int(re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[0])


@pytest.mark.parametrize(("kills", "epochs"), [(2, "3"), pytest.param(50, "40", marks=pytest.mark.slow)])
def test_kills_and_resumes_change_nothing(tmp_path, kills, epochs):
    whole, killed = tmp_path / "whole.safetensors", tmp_path / "killed.safetensors"
    checkpoint = tmp_path / "killed.checkpoint.safetensors"
    assert start(whole, epochs).wait() == 0
    peaks, sizes = [], []
    for kill in range(kills):
        before = checkpoint.stat().st_mtime_ns if kill else 0
        process = start(killed, epochs, *["--resume"] * bool(kill))
        process.wait_for(checkpoint, changed_since=before)
        peaks.append(peak_memory(process.pid))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        sizes.append(checkpoint.stat().st_size)
    assert start(killed, epochs, "--resume").wait() == 0
    left, right = load_file(whole), load_file(killed)
    assert all(torch.equal(left[name], right[name]) for name in left)
    if tenth := kills // 10:  # of a few, chance decides
        assert sum(peaks[-tenth:]) < 1.02 * sum(peaks[:tenth])
        assert max(sizes) < 1.5 * sizes[tenth]  # the best weights come with the first epoch, a row with each
    assert not list(tmp_path.glob(".*"))  # no half-written file stays
