import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from micronet import core
from micronet.artifact.artifact import Artifact
from micronet.core import machine
from micronet.core.machine import available_memory, usable_cores, usable_threads
from micronet.models.build import ModelSpec
from micronet.runtimes.config import RuntimeOptions
from micronet.runtimes.torch import EagerPredictor


@pytest.mark.parametrize(("said", "threads"), [("3", 3), ("3,2", 3), ("0", None), ("many", None), (None, None)])
def test_as_many_threads_as_openmp_is_told_or_one_a_core(monkeypatch, said, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if said is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", said)
    assert usable_threads() == (threads or usable_cores())


@pytest.mark.parametrize(("limit", "free"), [("1000", 300), ("600", 0), ("max", None)])
def test_files_kept_in_memory_count_as_free(tmp_path, monkeypatch, limit, free):
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    whole = available_memory()
    for name, text in {"max": limit, "current": "900", "stat": "file 500\ninactive_file 200\n"}.items():
        (tmp_path / f"memory.{name}").write_text(text)
    assert available_memory() == free if free is not None else available_memory() > whole / 2


def test_networks_are_run_with_as_many_threads(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    EagerPredictor(Artifact(nn.Linear(2, 2), ModelSpec("linear")), RuntimeOptions())
    assert torch.get_num_threads() == 3
    torch.set_num_threads(before)


def test_nothing_in_the_core_imports_torch():
    modules = [f"micronet.core.{path.stem}" for path in Path(core.__file__).parent.glob("[!_]*.py")]
    code = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
