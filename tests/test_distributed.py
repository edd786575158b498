"""Two processes compute what one computes: in float64, where the order of sums leaves nothing to see."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import multiprocessing, nn

from micronet import distributed
from micronet.quantization.calibrate import calibrate, observing
from micronet.quantization.config import QuantConfig
from micronet.quantization.quantize import quantize_model
from micronet.synchronized import synchronized
from micronet.training_config import TrainConfig
from micronet.training_step import Step, make_optimizer

CASES = {
    "float": None,
    "w8a8": QuantConfig(w_bits=8, a_bits=8),
    "asym": QuantConfig(w_bits=8, a_bits=8, q_type="asym", weight_observer="moving-average"),
    "bn-fused": QuantConfig(w_bits=8, a_bits=8, bn_fuse=True),
    "lsq": QuantConfig(method="lsq", w_bits=4, a_bits=4),
}
BATCHES = [9, 8, 5]  # two processes cannot share all of them evenly


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, momentum=None),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    ).double()  # fmt: skip


def train(config):
    """Return the losses of a few steps and the network after them."""
    images = torch.randn(sum(BATCHES), 1, 8, 8, generator=torch.Generator().manual_seed(1)).double()
    labels = torch.arange(len(images)) % 3
    model = network()
    if config is not None:
        model = quantize_model(model, config)[0].double()
        calibrate(model, [images[distributed.my_part(8)]])
    training = TrainConfig(optimizer="sgd", lr=0.05)
    losses = []
    with synchronized(model), observing(model):
        step = Step(model.train(), make_optimizer(model, training), training, torch.device("cpu"))
        for x, y in zip(images.split(BATCHES), labels.split(BATCHES), strict=True):
            part = distributed.my_part(len(x))
            losses.append(step([(x[part], y[part])], [len(x)]))
    return losses, model.state_dict()


def work(rank, folder, port):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(port))
    with distributed.group():
        results = {name: train(config) for name, config in CASES.items()}
    torch.save(results, folder / f"{rank}.pt")
    os._exit(0)


def free_port():
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    return store.port


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(work, (folder, free_port()), 2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_compute_what_one_does(of_two, case):
    losses, state = train(CASES[case])
    for rank in (0, 1):
        theirs, other = of_two[rank][case]
        assert theirs == pytest.approx(losses, rel=1e-6)  # they are summed in 32 bits
        for name, tensor in state.items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-9, atol=1e-9, msg=f"{name} of process {rank}")
    assert any(not torch.equal(state[name], network().state_dict().get(name, state[name])) for name in state)


TINY = ["train", "--width", "0.1", "--limit", "200", "--epochs", "3", "--batch-size", "32", "--optimizer", "sgd"]


def start(output, *more):
    command = [sys.executable, "-m", "micronet.cli.app", *TINY, "-o", str(output), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


def ranks_below(parent):
    """Return the ranks' process ids, by rank."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) == parent:
                pairs = (item.partition("=") for item in (stat.parent / "environ").read_text().split("\0"))
                environment = {name: value for name, _, value in pairs}
                if "RANK" in environment:
                    found[int(environment["RANK"])] = int(stat.parent.name)
        except OSError:
            continue
    return found


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the processes in /proc")
def test_a_killed_process_ends_the_run_in_one_line_and_one_process_goes_on(micronet, tmp_path):
    output, checkpoint = tmp_path / "a.safetensors", tmp_path / "a.checkpoint.safetensors"
    process = start(output, "--processes", "2", "--checkpoint-minutes", "0")
    while not checkpoint.exists() and process.poll() is None:
        time.sleep(0.01)
    os.kill(ranks_below(process.pid)[1], signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert [line for line in error.splitlines() if not line.startswith("epoch ")] == [
        "error: process 1 of 2 was killed (SIGKILL); the last checkpoint is whole: add --resume to go on from it"
    ]
    assert not output.exists()
    alone = micronet(*TINY, "-o", output, "--resume")
    assert alone.code == 0
    assert "resuming" in alone.err
    assert all(tensor.isfinite().all() for tensor in load_file(output).values())
    rows = [json.loads(line) for line in (tmp_path / "a.metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3]


def test_several_processes_tell_a_mistake_once(tmp_path):
    (tmp_path / "a.safetensors").touch()
    process = start(tmp_path / "a.safetensors", "--processes", "2")
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert len(error.splitlines()) == 1
    assert "--force" in error


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--device", "0,x"], "numbers of GPUs"),
        (["--device", "0,1", "--processes", "3"], "is 2 processes"),
        (["--processes", "0"], "allowed: 1"),
    ],
)
def test_impossible_processes_are_refused(micronet, options, said):
    done = micronet("train", *options)
    assert done.code == 2
    assert said in done.err
