"""Compiled code on disk belongs to these sources and is whole, or it is not used."""

import inspect
import os
import subprocess
import sys

import pytest

pytest.importorskip("numba", reason="pip install numba")

from llvmlite import binding, ir
from numba.core import caching, cgutils
from numba.core.base import BaseContext
from numba.core.serialize import dumps

from micronet.runtimes.packed.kernels import interpreter, kernel_cache
from micronet.runtimes.packed.kernels.kernel_cache import KernelCache, why_not_kept


def test_code_is_found_only_for_its_own_function_key_instruction_set_and_version(tmp_path, monkeypatch):
    cache = KernelCache(tmp_path, "module.first")
    cache.save("int32", "code")
    assert cache.load("int32") == "code"
    assert cache.load("int64") is None
    assert KernelCache(tmp_path, "module.second").load("int32") is None
    with monkeypatch.context() as patched:
        patched.setattr(kernel_cache, "INSTRUCTION_SET", "another")
        assert cache.load("int32") is None
    monkeypatch.setattr(kernel_cache, "SOURCES", "another version's")
    assert cache.load("int32") is None
    cache.save("int32", "newer")
    assert len(list(tmp_path.iterdir())) == 2  # another process may still use the old version
    os.utime(cache.path("int32"), (0, 0))
    monkeypatch.setattr(kernel_cache, "SOURCES", "a third version's")
    cache.save("int32", "newest")
    assert "another version" not in " ".join(path.name for path in tmp_path.iterdir())  # unused for decades
    monkeypatch.setattr(kernel_cache, "SOURCES", "another version's")
    cache.save("int32", "newer")
    assert cache.load("int32") == "newer"


@pytest.mark.parametrize("left", [0, 10])
def test_damaged_code_is_compiled_again(left, tmp_path):
    cache = KernelCache(tmp_path, "module.function")
    cache.save(1, ["some", "code"])
    path = cache.path(1)
    path.write_bytes(path.read_bytes()[:left])
    assert cache.load(1) is None


def test_a_folder_that_is_not_writable_is_no_error_but_a_reason(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "free"))
    assert why_not_kept() is None
    (tmp_path / "free" / "micronet" / "kernels").chmod(0o777)
    assert "nobody else" in why_not_kept()
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert "nobody else" in why_not_kept()
    KernelCache(tmp_path / "file" / "in", "module.function").save(1, "code")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "free"}


@pytest.mark.parametrize("loosened", ["folder", "file"])
def test_code_that_others_may_have_written_is_not_loaded(tmp_path, loosened):
    cache = KernelCache(tmp_path / "kernels", "module.function")
    cache.save(1, "code")
    assert cache.load(1) == "code"
    (cache.folder if loosened == "folder" else cache.path(1)).chmod(0o777)
    assert cache.load(1) is None


def test_numba_reads_no_configuration_from_the_working_directory(tmp_path):
    (tmp_path / ".numba_config.yaml").write_text("cache_dir: ./evil\ndisable_jit: 1\n")
    code = (
        "import micronet.runtimes.packed.kernels, numba\n"
        "numba.njit(lambda x: x)(1)\n"
        "print(numba.config.CACHE_DIR, numba.config.DISABLE_JIT)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == ["0"], done.stderr


@pytest.mark.parametrize("instruction_set", [None, "portable"])
def test_the_next_process_compiles_nothing(instruction_set):
    code = (
        "from micronet.runtimes.packed.compiled_backend import compile_kernels\n"
        "from micronet.runtimes.packed.kernels.interpreter import execute\n"
        "compile_kernels()\n"
        "print(len(execute.stats.cache_hits), len(execute.stats.cache_misses))\n"
    )
    environment = {**os.environ} | ({"MICRONET_KERNEL": instruction_set} if instruction_set else {})
    for _ in range(2):  # the first process may have to compile
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == ["1", "0"]


def test_numbas_private_interface_is_the_one_the_cache_relies_on():
    """If this fails, numba changed: check ``kernel_cache.enable_cache`` and the intrinsics against its new version."""
    cache = interpreter.execute._cache
    assert isinstance(cache, caching.FunctionCache) and isinstance(cache._cache_file, KernelCache)
    assert list(inspect.signature(cache.load_overload).parameters) == ["sig", "target_context"]
    assert list(inspect.signature(cache.save_overload).parameters) == ["sig", "data"]
    for method in ("load", "save"):  # numba calls its own object, which ours replaces, the same way
        theirs = inspect.signature(getattr(caching.IndexDataCacheFile, method))
        assert list(theirs.parameters)[1:] == list(inspect.signature(getattr(cache._cache_file, method)).parameters)
    assert cache.cache_path and callable(cache.disable)
    assert list(inspect.signature(dumps).parameters) == ["obj"] and isinstance(dumps(1), bytes)
    assert list(inspect.signature(BaseContext.get_dummy_value).parameters) == ["self"]
    assert list(inspect.signature(cgutils.global_constant).parameters)[:3] == ["builder_or_module", "name", "value"]
    assert list(inspect.signature(cgutils.get_or_insert_function).parameters) == ["module", "fnty", "name"]
    assert list(inspect.signature(cgutils.alloca_once_value).parameters)[:2] == ["builder", "value"]
    assert list(inspect.signature(cgutils.for_range_slice).parameters)[:4] == ["builder", "start", "stop", "step"]
    assert callable(binding.initialize_native_asmparser) and hasattr(ir.Module, "declare_intrinsic")
