import contextlib
import copy
import fcntl
import functools
import gc
import hashlib
import io
import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from micronet.cli.app import run
from micronet.evaluation import latency
from micronet.stages import export, prune

LASTING = ("micronet.", "tests.", "torch.nn.", "torchvision.", "builtins.")  # not a user's file, which may change
TINY = ["--width", "0.1", "--limit", "160", "--batch-size", "32", "--epochs", "1"]


def pytest_configure(config):
    """Take out what costs seconds in every test that exports or compares, and tests nothing."""
    latency.WARM_UP_SECONDS, latency.MEASURE_SECONDS = 0.0, 0.02  # a few calls
    prune.LARGEST_TIMED = 0  # every prune would export twice; a test of it sets it
    export.LARGEST_TIMED = 0  # the same for pack
    torch.fx.config.do_not_emit_stack_traces = True  # of every node that an export traces; nobody reads them


def pytest_collection_finish(session):
    """Spare the garbage collector the million objects of imports, and collect less often: a tenth of the time."""
    if "onnx" in sys.modules:
        with contextlib.suppress(ImportError, AttributeError):  # private to torch: without it, exports take longer
            _build_torchs_tables_once()
            _trace_equal_networks_once()
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)


def _build_torchs_tables_once():
    """Keep torch from building its tables of operators and of their ONNX functions anew in every export."""
    from torch._export import utils
    from torch.onnx._internal._lazy_import import onnxscript_apis
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    def registry(**opset):
        copied = copy.copy(build(**opset))
        copied.functions = {name: list(functions) for name, functions in copied.functions.items()}
        return copied

    utils._materialize_cpp_cia_ops = functools.cache(utils._materialize_cpp_cia_ops)
    load = type(onnxscript_apis).__getattr__  # imports onnxscript, which not every run needs
    onnxscript_apis.get_torchlib_ops = functools.cache(lambda: load(onnxscript_apis, "get_torchlib_ops")())
    build = functools.cache(ONNXRegistry.from_torchlib)
    ONNXRegistry.from_torchlib = staticmethod(registry)


def _trace_equal_networks_once():
    """Give the graph that torch's exporter gave before if nothing differs: half of an export's time, and not our code.

    Only for networks of modules that are the same classes all along, and without functions of their own.
    """
    from micronet.onnx import graph_export

    run, export, kept = graph_export._run_exporter, torch.onnx.export, {}

    def run_once(*arguments):
        key = _describe(arguments) if torch.onnx.export is export else None  # a test has put something else there
        if key is None:
            return run(*arguments)
        if key not in kept:
            kept[key] = run(*arguments).model
        return SimpleNamespace(model=kept[key].clone())

    graph_export._run_exporter = run_once


class _Description(pickle.Pickler):
    """Writes networks with the contents of their tensors, and which of them share memory."""

    def __init__(self, file):
        super().__init__(file)
        self._places = {}

    def persistent_id(self, value):
        if isinstance(value, torch.Tensor):
            place = self._places.setdefault(value.data_ptr(), len(self._places))
            return place, str(value.dtype), value.shape, value.stride(), value.detach().numpy().tobytes()
        return None

    def reducer_override(self, value):
        if not isinstance(value, torch.nn.Module):
            return NotImplemented
        classes = [f"{each.__module__}.{each.__qualname__}" for each in type(value).__mro__]
        if not all(name.startswith(LASTING) and "<locals>" not in name for name in classes):
            raise pickle.PicklingError
        return str, (str(classes),), vars(value)


def _describe(arguments):
    """Return what tells an export from others, or None if nothing does for certain.

    The last argument, the translations of operators, follows from their names, the opset and the network.
    """
    *others, translations = arguments
    names = sorted((str(operator), f"{each.__module__}.{each.__qualname__}") for operator, each in translations.items())
    file = io.BytesIO()
    try:
        _Description(file).dump((others, names))
    except Exception:  # whatever cannot be pickled
        return None
    return hashlib.sha256(file.getvalue()).digest()


def pytest_collectstart(collector):
    """What a file draws as it is imported must not depend on the files collected before it."""
    torch.manual_seed(1)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Nor what a file's own fixtures draw on the tests before."""
    torch.manual_seed(2)


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


def as_rank(monkeypatch, rank, world):
    """Let this process be one of several on one machine, as torchrun tells it."""
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": 29500}
    for name, number in told.items():
        monkeypatch.setenv(name, str(number))
    monkeypatch.setenv("MASTER_ADDR", "localhost")


@pytest.fixture
def micronet(capsys) -> Callable[..., SimpleNamespace]:
    """Run a command in this process; gives its exit code, both outputs and, where asked for, its JSON."""

    def call(*arguments: object) -> SimpleNamespace:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        parsed = json.loads(captured.out) if "--json" in arguments and code == 0 else None
        return SimpleNamespace(code=code, out=captured.out, err=captured.err, json=parsed)

    return call


@pytest.fixture(scope="session")
def shared(tmp_path_factory, worker_id) -> Callable[[str, Callable[[Path], None]], Path]:
    """Make a folder once in a run of the tests, whichever process needs it first; the others wait, then read it."""
    root = tmp_path_factory.getbasetemp()
    root = root if worker_id == "master" else root.parent

    def make(name: str, fill: Callable[[Path], None]) -> Path:
        folder = root / f"shared-{name}"
        with (root / f"{folder.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            done = root / f"{folder.name}.done"
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # what a failed attempt left
                folder.mkdir()
                fill(folder)
                done.touch()
        return folder

    return make


@pytest.fixture(scope="session")
def chain(shared) -> Path:
    """A folder with one tiny network's float, int8, fused and exported files, made by the commands. Read only."""

    def fill(folder: Path) -> None:
        for arguments in (
            ["train", *TINY, "--preset", "plain", "-o", folder / "float.safetensors"],
            ["quantize", folder / "float.safetensors", *TINY[2:4], "--epochs", "1", "-o", folder / "int8.safetensors"],
            ["bn-fuse", folder / "int8.safetensors", "-o", folder / "fused.safetensors"],
            ["export-onnx", folder / "float.safetensors", "-o", folder / "float.onnx"],
            ["export-onnx", folder / "fused.safetensors", "-o", folder / "int8.onnx"],
        ):
            assert run([*map(str, arguments), "--quiet"]) == 0

    return shared("chain", fill)


@pytest.fixture(scope="session")
def lenet(shared) -> Path:
    """A trained network of four layers, on which commands take half of their time on ``chain``'s nin. Read only."""

    def train(folder: Path) -> None:
        short = ["--limit", "160", "--epochs", "1", "--preset", "plain", "--quiet"]
        assert run(["train", "--model", "lenet_bn", *short, "-o", str(folder / "float.safetensors")]) == 0

    return shared("lenet", train) / "float.safetensors"
