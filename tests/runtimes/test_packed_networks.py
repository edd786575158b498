"""Whole packed networks: torch, numpy and the compiled kernels agree, and the files are as small as promised."""

import numpy as np
import pytest
import torch

from micronet.onnx.export import to_onnx
from micronet.packed.file_format import read
from micronet.packed.from_onnx import pack_model
from micronet.packed.levels import find_levels, packed_bytes
from micronet.packed.program import Program
from micronet.runtimes.packed.numpy_backend import run
from micronet.runtimes.packed.predictor import PackedNetwork
from tests.onnx.test_onnx import IMAGES
from tests.onnx.test_targets import plain

# Every scheme, on one of four networks; tests/runtimes/programs.py combines all kinds of layers at random.
NETWORKS = [
    *(("nin", scheme) for scheme in ("W1A1-W1A8", "W1A8", "WtA32")),
    *(("lenet_bn", scheme) for scheme in ("W2A8", "WtA8", "W4A4-dorefa")),
    *(("nin_gc", scheme) for scheme in ("W1A1", "WtA1", "W1A1-8bit", "W8A8")),
    *(("resnet18", scheme) for scheme in ("W1A1-all", "W8A8-asym")),
]


@pytest.mark.parametrize(("network", "scheme"), [*NETWORKS, ("lenet_bn", "W16A16")])
def test_a_packed_network_computes_what_torch_computes(network, scheme, exported):
    path, images, theirs, onnx_bytes = exported(network, scheme)
    ours = run(read(path), images)
    spread, error = theirs - theirs.mean(1, keepdims=True), ours - theirs
    if scheme in ("W1A1", "WtA1"):  # a float sum within rounding of 0 may flip a sign, which changes a single image
        relative = np.linalg.norm(error, axis=1) / np.linalg.norm(spread, axis=1)
        assert (relative > 0.01).sum() <= 2
    else:  # sums of a low-bit or 8-bit first layer are often exactly 0, which is +1 here; in float, rounding decides
        ties = scheme in ("W1A1-8bit", "W1A1-W1A8", "W1A1-all")
        assert np.linalg.norm(error) < (0.5 if ties else 0.01) * np.linalg.norm(spread)
    assert path.stat().st_size < onnx_bytes


@pytest.mark.parametrize(("network", "scheme"), NETWORKS)
def test_compiled_kernels_compute_what_numpy_computes(network, scheme, exported, monkeypatch):
    pytest.importorskip("numba", reason="pip install numba")
    from micronet.runtimes.packed import compiled_backend
    from micronet.runtimes.packed.compiled_backend import CompiledNetwork
    from micronet.runtimes.packed.kernels import cpu

    path, images, _, _ = exported(network, scheme)
    program = read(path)
    # Leave out images of which a float first layer's sum lies so close to a boundary that rounding decides its side.
    kinds = [operation.kind for operation in program.operations]
    rounding = next((index for index, kind in enumerate(kinds) if kind in ("sign", "threshold", "quantize")), None)
    if rounding is not None:
        start = Program(program.operations[: rounding + 1], program.shape, {})
        images = images[(CompiledNetwork(start, 1)(images) == run(start, images)).all((1, 2, 3))]
    assert len(images) > 4
    expected = run(program, images)
    for threads in (1, 2):
        opened = PackedNetwork(path, threads)
        assert opened.kernel == cpu.INSTRUCTION_SET
        np.testing.assert_allclose(opened(images), expected, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(compiled_backend, "MIN_SHARED_WORK", 0)  # two threads share its rows
    np.testing.assert_allclose(opened(images[:1]), expected[:1], rtol=1e-4, atol=1e-5)


def test_a_float_network_packs_too():
    artifact = plain("nin", {"width": 0.1})
    proto = to_onnx(artifact, IMAGES)
    with torch.no_grad():
        np.testing.assert_allclose(
            run(pack_model(proto), IMAGES.numpy()), artifact.model(IMAGES).numpy(), rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize(
    ("scheme", "most"), [("W1A1", 210_000), ("WtA1", 250_000), ("W8A8", 630_000), ("W1A1-8bit", 120_000)]
)
def test_nin_gc_is_as_small_as_promised(scheme, most, exported):
    path = exported("nin_gc", scheme).path
    program, data = read(path), path.read_bytes()
    parts = 0
    for operation in program.operations:
        for values in (operation.weight, operation.limits):
            if values is not None and values.dtype.kind == "i":
                parts += packed_bytes(values.size, find_levels(values).number)
        floats = [operation.weight, operation.scale, operation.bias]
        parts += sum(
            4 * v.size for v in floats if v is not None and not (v is operation.weight and v.dtype.kind == "i")
        )
    assert len(data) <= most
    assert len(data) <= parts + 8 * 1024
