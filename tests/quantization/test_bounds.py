"""The straight-through gradient is 1 inside a grid's clamp bounds and on them, 0 outside: one rule for every grid."""

import pytest
import torch

from micronet.quantization.functional import QParams, fake_quantize, learned_step, sign

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def around(bound, dtype):
    """The bound, and its neighbours towards zero and away from it."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    middle = torch.tensor([bound], dtype=dtype)
    return torch.cat([(middle.view(bits) + step).view(dtype) for step in (-1, 0, 1)])


def grid(axis, qmin, qmax, scale=0.25):
    shape = () if axis is None else (3,)
    return QParams(torch.full(shape, scale), torch.zeros(shape), qmin, qmax, axis)


def gradient(function, x):
    x = x.view(-1, 1).clone().requires_grad_()
    (out,) = torch.autograd.grad(function(x).sum(), x)
    return out.flatten().tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("bound", [7.5, -8.5])
def test_of_a_fake_quantized_tensor(bound, axis, dtype):
    x = around(bound * 0.25, dtype)
    assert gradient(lambda x: fake_quantize(x, grid(axis, -8, 7)), x) == [1, 1, 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("bound", [7, -7])
def test_of_a_learned_step(bound, axis, dtype):
    x = around(bound * 0.25, dtype)
    assert gradient(lambda x: learned_step(x, grid(axis, -7, 7), 1.0), x) == [1, 1, 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bound", [1.0, -1.0])
def test_of_a_saturating_sign(bound, dtype):
    assert gradient(lambda x: sign(x, "saturate"), around(bound, dtype)) == [1, 1, 0]


@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("function", [fake_quantize, lambda *args, **kw: learned_step(*args, 1.0, **kw)])
def test_a_rectified_grid_has_the_relus_gradient_at_zero(function, axis):
    x, qparams = torch.tensor([-1.0, 0.0, 1.0]), grid(axis, 0, 15)
    both = gradient(lambda x: function(x.relu(), qparams), x)
    assert gradient(lambda x: function(x, qparams, rectified=True), x) == both == [0, 0, 1]
