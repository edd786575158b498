"""A search that is really killed, wherever it is, ends with the files of one that was not."""

import os
import random
import signal
import time

import pytest

from tests.compression.test_compress import contents
from tests.training.processes import Command

KILLS = 10
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("training", [[], ["--no-training"]], ids=["training", "calibration"])
def test_a_search_that_was_killed_ten_times_ends_with_the_same_files(micronet, tmp_path, training):
    original, seconds = tmp_path / "float.safetensors", random.Random(1)
    words = ["--model", "lenet_bn", "--limit", "160", "--epochs", "1"]
    assert micronet("train", *words, "-o", original).code == 0
    search = ["compress", original, "--target-size", "0.1", "--max-drop", "100", "--skip-timing", *training]
    start = time.monotonic()
    assert Command(tmp_path / "log", *search, "-o", tmp_path / "whole").wait(1800) in (0, 1)
    took = time.monotonic() - start
    for _ in range(KILLS):
        command = Command(tmp_path / "log", *search, "-o", tmp_path / "killed")
        time.sleep(seconds.uniform(0.3, 2 * took / KILLS))
        if command.poll() is not None:
            break
        os.kill(command.pid, signal.SIGKILL)
        command.wait()
    assert Command(tmp_path / "log", *search, "-o", tmp_path / "killed").wait(1800) in (0, 1)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
