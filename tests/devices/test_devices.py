"""Whatever a network can go through on the CPU gives the same numbers, to the last bit, on another device."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from micronet.quantization.calibrate import calibrate, each_quantizer
from micronet.quantization.config import QuantConfig
from micronet.quantization.fold import fold_model
from micronet.quantization.quantize import quantize_model
from tests.devices.network import batches, trained
from tests.devices.table import CPU, all_checks

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def worker():
    """A process that has the mock device, for all the tests that run in this one."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.devices.worker"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield process
        process.stdin.close()


def ask(worker, name):
    print(name, file=worker.stdin, flush=True)
    return json.loads(worker.stdout.readline())


@pytest.mark.parametrize("name", all_checks())
def test_the_device_gives_the_numbers_of_the_cpu(worker, name):
    answer = ask(worker, name)
    assert answer["error"] is None, answer["error"]
    assert not answer["changed"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ranges_have_the_dtype_of_the_network(dtype):
    model, record = quantize_model(trained(CPU).to(dtype), QuantConfig())
    calibrate(model, [batch.to(dtype) for batch in batches(CPU)])
    folded, _ = fold_model(model, [record])
    for network in (model, folded):
        assert {quantizer.scale.dtype for _, _, quantizer in each_quantizer(network)} == {dtype}


def test_the_gpu_check_runs_on_the_mock_device():
    command = [sys.executable, "-m", "scripts.gpu_check", "--device", "mock", "--only", "device"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 of 2 ok" in done.stdout


def test_the_process_of_the_tests_does_not_know_the_device():
    assert not hasattr(torch, "mock")
