"""Whatever a network can go through on the CPU gives the same numbers, to the last bit, on another device."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.devices.table import all_checks

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


def test_the_process_of_the_tests_does_not_know_the_device():
    assert not hasattr(torch, "mock")


REFUSALS = """
import torch
from tests.devices import mock
mock.register()
x = torch.randn(3, 4).to("mock")
tied = torch.nn.Linear(4, 4)
parameter = tied.weight
tied.to("mock")
assert tied.weight is parameter and parameter.data_ptr() != tied.bias.data_ptr()
assert x.view(-1).data_ptr() == x.data_ptr()
assert torch.equal((x + torch.tensor(1.0)).cpu(), x.cpu() + 1)  # a CPU tensor without dimensions may mix
assert float(x.abs().max()) > 0 and bool(x.isfinite().all()) and torch.tensor([1.0], device="mock").tolist() == [1.0]
with torch.inference_mode():
    assert tied.weight.detach().view(-1).device == x.device
for attempt, error in [(lambda: x + torch.randn(3, 4), RuntimeError), (x.numpy, TypeError)]:
    try:
        attempt()
    except error as found:
        assert "mock" in str(found)
    else:
        raise AssertionError("the device mixes with the CPU")
"""


def test_the_mock_device_refuses_what_a_gpu_refuses():
    """Also notices when torch's experimental Python backends, which the device is made of, change."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", REFUSALS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
