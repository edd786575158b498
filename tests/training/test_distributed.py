"""Two processes compute what one computes: in float64, where the order of sums leaves nothing to see."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import multiprocessing, nn
from torch.nn import functional as F

from micronet.core import ranks
from micronet.data.dataset import Dataset, DataSource, DataSpec
from micronet.data.split import MemorySplit
from micronet.pruning.criteria import bn_scale
from micronet.pruning.groups import find_groups
from micronet.quantization.calibrate import calibrate, observing
from micronet.quantization.config import QuantConfig
from micronet.quantization.quantize import quantize_model
from micronet.tasks.agreement import Agreement
from micronet.tasks.classification import Classification
from micronet.training import distributed
from micronet.training.config import TrainConfig
from micronet.training.distillation import Teacher
from micronet.training.step import SGD_MOMENTUM, TrainStep, make_optimizer
from micronet.training.validation import evaluate_distributed
from tests.training.processes import Command

CASES = {
    "float": {},
    "w8a8": {"quantized": QuantConfig(w_bits=8, a_bits=8)},
    "asym": {"quantized": QuantConfig(w_bits=8, a_bits=8, q_type="asym", weight_observer="moving-average")},
    "bn-fused": {"quantized": QuantConfig(w_bits=8, a_bits=8, bn_fuse=True)},
    "lsq": {"quantized": QuantConfig(method="lsq", w_bits=4, a_bits=4)},
    "accumulated": {"accumulate": 2},
    "sparse": {"sparsity": 0.1},
    "taught": {"taught": True},
    "bf16": {"amp": "bf16"},
    "functional": {"functional": True},
    "muon and average": {"recipe": {"optimizer": "muon", "lr": 0.01, "ema": 0.5, "label_smoothing": 0.1}},
}
BATCHES = [9, 8, 5]  # two processes cannot share all of them evenly
LR = 0.05


class FunctionalNorm(nn.BatchNorm2d):
    """A batch norm as other libraries write it, by either of torch's functions."""

    def __init__(self, channels, direct):
        super().__init__(channels)
        self.direct = direct

    def forward(self, x):
        if self.direct:
            means, weights = (self.running_mean, self.running_var), (self.weight, self.bias)
            return torch.batch_norm(x, *weights, *means, self.training, 0.1, self.eps, False)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, training=self.training)


def network(functional=False, bias=True):
    torch.manual_seed(0)
    norms = [nn.BatchNorm2d(4), nn.BatchNorm2d(6, momentum=None)]
    if functional:
        norms = [FunctionalNorm(4, False), FunctionalNorm(6, True)]
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=bias), norms[0], nn.ReLU(), nn.Conv2d(4, 6, 3, bias=bias), norms[1], nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    ).double()  # fmt: skip


def train(
    quantized=None, accumulate=1, sparsity=0.0, taught=False, amp="off", functional=False, compiled=False, recipe=None
):
    """Return the losses of a few steps and the network after them."""
    images = torch.randn(sum(BATCHES), 1, 8, 8, generator=torch.Generator().manual_seed(1)).double()
    labels = torch.arange(len(images)) % 3
    model = network(functional, bias=recipe is None)  # before a norm its gradient is noise, which Adam turns into steps
    if quantized is not None:
        model = quantize_model(model, quantized)[0].double()
        calibrate(model, [images[ranks.shard(8)]])
    penalty = bn_scale.penalty(model, find_groups(model, images), sparsity) if sparsity else None
    teacher = Teacher(network().eval(), 0.5, 4.0) if taught else None
    if amp != "off":
        model, images = model.float(), images.float()  # autocast leaves float64 as it is
    training = TrainConfig(**{"optimizer": "sgd", "lr": LR, "amp": amp, **(recipe or {})})
    losses = []
    with observing(model):
        optimizer = make_optimizer(model, training)
        step = TrainStep(model.train(), optimizer, training, torch.device("cpu"), compiled, teacher, penalty)
        batches = zip(images.split(BATCHES), labels.split(BATCHES), strict=True)
        parts = [(x[ranks.shard(len(x))], y[ranks.shard(len(y))]) for x, y in batches]
        for first in range(0, len(BATCHES), accumulate):
            together = slice(first, first + accumulate)
            losses.append(step(parts[together], BATCHES[together]))
    return losses, step.result.state_dict()


def evaluated():
    """Return the accuracy and loss on three batches, and how many images this process has seen for that."""
    pixels = torch.randint(256, (600, 1, 2, 2), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    seen = []

    def predict(images):
        seen.append(len(images))
        return images.reshape(len(images), 4)

    split = MemorySplit(pixels, torch.arange(600) % 4)
    source, spec = DataSource(lambda: split, lambda: split, list("0123")), DataSpec(mean=[0.5], std=[0.5])
    data = Dataset(source, spec, Classification())
    return *evaluate_distributed(predict, data, data.test).values(), sum(seen)


def agreeing():
    """Return the agreement with a reference on one batch, which only one process evaluates."""
    split = MemorySplit(torch.arange(24, dtype=torch.uint8).view(6, 1, 2, 2), torch.zeros(6).long())
    source, spec = DataSource(lambda: split, lambda: split), DataSpec(mean=[0.5], std=[0.5])
    data = Dataset(source, spec, Agreement()).with_reference(lambda images: images)
    return evaluate_distributed(lambda images: images.round(1), data, data.test)


def no_room():
    raise OSError(errno.ENOSPC, "No space left on device", "a.safetensors")


def work(rank, folder, port):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(port))
    told = []

    def tell(error):
        told.append(str(error))
        return 7

    try:
        with distributed.process_group(tell):
            results = {name: train(**case) for name, case in CASES.items()}
            numbers, agreement = evaluated(), agreeing()
            distributed.from_rank_zero(no_room)
    except distributed.ProcessExitError as ended:
        told.append(ended.exit_code)
    torch.save({"trained": results, "evaluated": numbers, "agreement": agreement, "told": told}, folder / f"{rank}.pt")
    waits = time.monotonic() + 20
    while time.monotonic() < waits and not (folder / f"{1 - rank}.pt").exists():
        time.sleep(0.01)  # the rank that holds the store must not end before the other has asked it
    os._exit(0)


def free_port():
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    return store.port


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.start_processes(work, (folder, free_port()), 2, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_compute_what_one_does(of_two, case):
    losses, state = train(**CASES[case])
    # Losses are summed in 32 bits. In bf16 each process rounds its part of a gradient, of 1 at most, to 8 bits, and
    # a gradient takes part in 1 / (1 - momentum) steps.
    loss_rel, weights = (2**-7, 2**-8 * LR / (1 - SGD_MOMENTUM)) if case == "bf16" else (1e-6, 1e-9)
    for rank in (0, 1):
        theirs, other = of_two[rank]["trained"][case]
        assert theirs == pytest.approx(losses, rel=loss_rel)
        for name, tensor in state.items():
            torch.testing.assert_close(other[name], tensor, rtol=weights, atol=weights)
    assert any(not torch.equal(state[name], network().state_dict().get(name, state[name])) for name in state)


def test_two_processes_evaluate_what_one_does_and_each_a_part(of_two):
    accuracy, loss, images = evaluated()
    assert images == 600
    assert [numbers["evaluated"][0] for numbers in of_two] == [accuracy] * 2
    assert [numbers["evaluated"][1] for numbers in of_two] == pytest.approx([loss] * 2, rel=1e-12)
    assert [numbers["evaluated"][2] for numbers in of_two] == [256 + 88, 256]


def test_a_process_without_a_batch_gets_the_metrics_of_the_others(of_two):
    assert [numbers["agreement"] for numbers in of_two] == [agreeing()] * 2


def test_what_the_system_refuses_one_process_ends_all_and_one_tells(of_two):
    line = "[Errno 28] No space left on device: 'a.safetensors'"
    assert sorted((numbers["told"] for numbers in of_two), key=len) == [[7], [line, 7]]


TINY = ["train", "--width", "0.1", "--limit", "200", "--epochs", "3", "--batch-size", "32", "--optimizer", "sgd"]


def start(output, *more, **environment):
    return Command(output.with_suffix(".log"), *TINY, "-o", output, *more, **environment)


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


def is_running(pid):
    """Return True if a process has not ended; one that nobody has waited for has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow  # two interpreters start
@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a process of its parent's end")
def test_the_processes_of_a_killed_launcher_end_too(tmp_path):
    process = start(tmp_path / "a.safetensors", "--processes", "2", "--epochs", "500")
    process.wait_for(tmp_path / "a.checkpoint.safetensors")
    ranks = ranks_below(process.pid)
    assert sorted(ranks) == [0, 1]
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 60
    while any(is_running(pid) for pid in ranks.values()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not (tmp_path / "a.safetensors").exists()


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the processes in /proc")
def test_a_killed_process_ends_the_run_in_one_line_and_one_process_goes_on(micronet, tmp_path):
    output, checkpoint = tmp_path / "a.safetensors", tmp_path / "a.checkpoint.safetensors"
    process = start(output, "--processes", "2", "--checkpoint-minutes", "0")
    process.wait_for(checkpoint)
    os.kill(ranks_below(process.pid)[1], signal.SIGKILL)
    assert process.wait() == 1
    assert process.errors()[-1] == f"error: process 1 of 2 was killed (SIGKILL); {distributed.RESUME}"
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
    assert process.wait() == 2
    (line,) = process.errors()
    assert "--force" in line


def test_ctrl_c_ends_several_processes_in_one_line(tmp_path):
    process = start(tmp_path / "a.safetensors", "--processes", "2", "--epochs", "50")
    process.wait_for(tmp_path / "a.checkpoint.safetensors")
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait() == 130
    assert process.errors()[-1].startswith("error: interrupted")


def test_processes_that_cannot_meet_say_so_in_one_line_and_ctrl_c_ends_their_wait(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        group = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        refused = start(tmp_path / "a.safetensors", **group)
        assert refused.wait() == 1
        (line,) = refused.errors()
        assert line.startswith(f"error: process 0 of 2 could not reach the others at 127.0.0.1:{port} (")
        assert "--master-port" in line
    waiting = start(tmp_path / "a.safetensors", **group)
    while waiting.poll() is None:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            break
        time.sleep(0.01)
    os.kill(waiting.pid, signal.SIGINT)
    assert waiting.wait() == -signal.SIGINT
    assert not waiting.errors()


def by_torchrun(output, *words):
    """Return the lines of two processes that torchrun starts."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "micronet.cli.app"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*torchrun, *words, "-o", output], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()


def by_environment(output, *words):
    """The same with forked processes that are told what torchrun tells: without three new interpreters."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        Command(output.with_suffix(f".{rank}.log"), *words, "-o", output, RANK=rank, LOCAL_RANK=rank, **group)
        for rank in "01"
    ]
    assert [process.wait() for process in processes] == [0, 0]
    return [line for process in processes for line in process.errors()]


@pytest.mark.parametrize("launch", [by_environment, pytest.param(by_torchrun, marks=pytest.mark.slow)])
def test_torchrun_goes_on_with_what_one_process_began(micronet, tmp_path, launch):
    output = tmp_path / "a.safetensors"
    assert micronet(*TINY, "-o", output, "--max-time", "0").code == 3
    resumed = [line for line in launch(output, *TINY, "--resume") if "resuming" in line]
    assert resumed == ["resuming in epoch 1 of 3, after step 1"]
    rows = [json.loads(line) for line in (tmp_path / "a.metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--device", "0,x"], "GPU numbers"),
        (["--device", "0,0"], "a GPU twice"),
        (["--device", "0,1", "--processes", "3"], "already sets the number of processes to 2"),
        (["--processes", "0"], "allowed: 1"),
    ],
)
def test_impossible_processes_are_refused(micronet, options, said):
    done = micronet("train", *options)
    assert done.code == 2
    assert said in done.err
