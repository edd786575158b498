"""``doctor``: what is installed and what is not, whatever state it is in; and what will be fast."""

import json
import re
import tomllib
from pathlib import Path

import pytest

from micronet.errors import MicronetError
from micronet.runtimes.packed.kernels.kernel_cache import _folder
from micronet.stages import installed
from micronet.stages.doctor import advise
from micronet.stages.installed import PACKAGES, Package, examine, kernel_cache

ROOT = Path(__file__).parents[2]
WHOLE = {"name": "torch", "version": "2.14.0", "purpose": "training", "install": "pip install torch"}
FEATURES = ("AVX2", "AVX-512", "VNNI", "BF16", "AMX", "NEON")


def test_a_compiler_with_an_open_quote_is_the_users_mistake_and_no_trouble_for_the_doctor(monkeypatch):
    from micronet.runtimes.c.predictor import compiler

    monkeypatch.setenv("CC", 'cc "')
    with pytest.raises(MicronetError, match="the environment variable CC is invalid: No closing quotation"):
        compiler()
    assert set(installed.compilers()) == {"cc", "aarch64"}


def test_install_lines_are_those_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {
        (extra, re.split(r"[<>=;\[ ]", line)[0])
        for extra, lines in project["optional-dependencies"].items() if extra != "dev" for line in lines
    }  # fmt: skip
    assert {(each.extra, each.distribution) for each in PACKAGES if each.extra} == extras
    required = {re.split(r"[<>=]", line)[0] for line in project["dependencies"]}
    assert {each.distribution for each in PACKAGES if not each.extra} <= required
    openvino = next(each for each in PACKAGES if each.module == "openvino")
    assert openvino.install == f"pip install '{project['name']}[openvino]'"


def test_a_broken_package_is_named_and_the_others_are_still_found(tmp_path, monkeypatch):
    sources = {
        "whole_one": "__version__ = '1.2-built-here'\nprint('noise on standard output')",
        "broken_one": "raise ImportError('libmissing.so: no such file\\nsecond line')",
        "exiting_one": "raise SystemExit(3)",
        "killed_one": "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
        "whole_two": "__version__ = '3'",
    }
    for name, source in sources.items():
        (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    rows = examine(tuple(Package(name, name, "tests", "own") for name in [*sources, "missing_one"]))
    found = {row["name"]: (row["version"], row.get("problem")) for row in rows}
    assert found == {
        "whole_one": ("1.2", None),
        "broken_one": (None, "libmissing.so: no such file"),
        "exiting_one": (None, "3"),
        "killed_one": (None, "importing it ends Python (SIGKILL)"),
        "whole_two": ("3", None),
        "missing_one": (None, None),
    }
    assert rows[1]["install"].startswith("pip install --force-reinstall ")


def test_a_package_that_never_ends_its_import_is_named(tmp_path, monkeypatch):
    (tmp_path / "endless_one.py").write_text("import time\ntime.sleep(60)")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(installed, "IMPORT_SECONDS", 0.5)
    [row] = examine((Package("endless_one", "endless-one", "tests"),))
    assert row["version"] is None and "takes more than 0.5 seconds" in row["problem"]


def found(**changes):
    common = {
        "system": "Linux 6 x86_64",
        "processor": {"cores": 2, "threads": 2, "features": dict.fromkeys(FEATURES, True)},
        "memory": {"free_bytes": 1 << 34},
        "packages": [WHOLE | {"gpus": ["a GPU"]}, WHOLE | {"name": "numba", "kernel": "avx512"}],
        "compilers": {"cc": "gcc"},
        "kernel_cache": {"problem": ""},
    }
    return {**common, **changes}


SLOW = {"cores": 2, "threads": 8, "features": dict.fromkeys(FEATURES, False)}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"processor": SLOW}, ["--w-bits 7", "would be emulated", "OMP_NUM_THREADS is 8, but only 2 cores"]),
        ({"processor": SLOW | {"threads": 1, "features": {}}}, []),  # a system that does not say
        ({"system": "Linux 6 aarch64", "processor": SLOW | {"threads": 1}}, ["would be emulated"]),
        ({"packages": [WHOLE | {"gpus": ["a GPU"]}]}, ["run in numpy, which is slow"]),
        ({"compilers": {"cc": None}}, ["apt install gcc"]),
        ({"kernel_cache": {"problem": "/x cannot be written"}}, ["compiled at each start: /x cannot be written"]),
        ({"memory": {"free_bytes": 1}}, ["less than 2 GiB"]),
        ({}, []),
    ],
    ids=range(8),
)
def test_what_is_slow_is_said_and_nothing_else(changes, said):
    slow = [each.text for each in advise(found(**changes)) if not each.fast]
    assert len(slow) == len(said) and all(words in text for words, text in zip(said, slow, strict=True))


@pytest.mark.parametrize(("cuda", "said"), [(None, "a build for processors alone"), ("13.0", "torch does not find it")])
def test_a_gpu_that_torch_cannot_use_is_named(monkeypatch, cuda, said):
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    assert any(said in each.text for each in advise(found(packages=[WHOLE | {"gpus": [], "cuda": cuda}])))


def test_looking_for_the_kernels_makes_no_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert kernel_cache() == {"folder": str(_folder()), "writable": True, "problem": ""}
    assert list(tmp_path.iterdir()) == []
    _folder().mkdir(parents=True)
    _folder().chmod(0o777)
    assert kernel_cache()["problem"].startswith("others can write to ")
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/x")
    assert not kernel_cache()["writable"]


def test_the_report_is_printed_and_exits_0_whatever_is_missing(micronet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(installed, "_import_all", lambda names: {name: {"problem": "it is broken"} for name in names})
    shown = micronet("doctor")
    assert shown.code == 0 and "broken: it is broken; for training" in shown.out and shown.err == ""
    told = micronet("doctor", "--json").json
    assert told["packages"][0]["problem"] == "it is broken" and json.dumps(told)
    assert {"name", "cores", "threads", "features"} == set(told["processor"])
    assert list(tmp_path.iterdir()) == []
