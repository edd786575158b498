import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.runtimes import networks

OLD_FILES = Path(__file__).parent / "old_files"


@pytest.fixture(scope="session", autouse=True)
def _kernels(shared):
    """Compile the kernels in one process; the others wait, then load them from the cache, as later runs do."""

    def compile_all(folder: Path) -> None:
        with contextlib.suppress(ImportError):  # without numba there are none
            from micronet.runtimes.packed.compiled_backend import compile_kernels

            compile_kernels()

    shared("kernels", compile_all)


@pytest.fixture(scope="session")
def exported(shared) -> Callable[[str, str], networks.Exported]:
    """Export a network once per run."""

    def get(network: str, scheme: str) -> networks.Exported:
        return networks.load(shared(f"packed-{network}-{scheme}", partial(networks.export, network, scheme)))

    return get


@pytest.fixture
def old_file() -> Path:
    """A packed network (W1A1, first and last layer 8-bit) that an earlier version of micronet wrote."""
    return OLD_FILES / "w1a1.packed"
