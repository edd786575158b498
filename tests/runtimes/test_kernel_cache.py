"""Compiled code on the disk is that of these sources, whole, or not there."""

import subprocess
import sys

import pytest

from micronet.runtimes.packed.kernels import kernel_cache
from micronet.runtimes.packed.kernels.kernel_cache import KernelCache


def test_code_comes_back_for_its_own_function_key_and_version_only(tmp_path, monkeypatch):
    store = KernelCache(tmp_path, "module.first")
    store.save("int32", "code")
    assert store.load("int32") == "code"
    assert store.load("int64") is None
    assert KernelCache(tmp_path, "module.second").load("int32") is None
    monkeypatch.setattr(kernel_cache, "SOURCES", "another version's")
    assert store.load("int32") is None
    store.save("int32", "newer")
    assert [path.name for path in tmp_path.iterdir()] == [store.path("int32").name]  # the old version's is gone
    assert store.load("int32") == "newer"


@pytest.mark.parametrize("left", [0, 10])
def test_damaged_code_is_compiled_again(left, tmp_path):
    store = KernelCache(tmp_path, "module.function")
    store.save(1, ["some", "code"])
    path = store.path(1)
    path.write_bytes(path.read_bytes()[:left])
    assert store.load(1) is None


def test_where_nothing_can_be_kept_the_work_goes_on(tmp_path):
    KernelCache(tmp_path / "missing", "module.function").save(1, "code")
    assert not any(tmp_path.iterdir())


def test_the_next_process_compiles_nothing():
    code = (
        "from tests.runtimes.test_compiled_backend import *\n"
        "from micronet.runtimes.packed.kernels import interpreter\n"
        "program, images = operations_of(3)\n"
        "CompiledNetwork(program[6], 1)(images)\n"
        "print(len(interpreter.execute.stats.cache_hits), len(interpreter.execute.stats.cache_misses))\n"
    )
    for _ in range(2):  # the first may be the one that compiles
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "0"]
