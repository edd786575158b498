import pytest

from tests.tensorrt.fake_gpu import Gpu


@pytest.fixture
def gpu(monkeypatch):
    """A machine with one GPU, TensorRT and pycuda, all of them fakes."""
    return Gpu().install(monkeypatch)
