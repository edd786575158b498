"""Elementwise activation functions, each defined once for numpy and for the compiled kernels.

A function is an expression of ``+ - * /`` with numbers and of the methods of ``Arithmetic``. Each of these steps rounds
to float32 in the same way everywhere, so both backends compute the same bits.
"""

import math
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class Arithmetic(Protocol):
    """The operations on float32 vectors that Python has no operator for."""

    def clip(self, x: Any, low: float, high: float) -> Any:
        """Return x between two bounds, which may be infinite; NaN stays NaN."""

    def round(self, x: Any) -> Any:
        """Return x rounded half to even."""

    def power_of_two(self, x: Any) -> Any:
        """Return 2 to the power of x, a whole number from -126 to 127."""


class NumpyArithmetic:
    """``Arithmetic`` on float32 arrays."""

    def clip(self, x: NDArray[np.float32], low: float, high: float) -> NDArray[np.float32]:
        """Return x between two bounds, which may be infinite; NaN stays NaN."""
        return x.clip(np.float32(low), np.float32(high))

    def round(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return x rounded half to even."""
        rounded: NDArray[np.float32] = np.rint(x)
        return rounded

    def power_of_two(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return 2 to the power of x, a whole number from -126 to 127."""
        return (x.astype(np.int32) + 127 << 23).view(np.float32)


def _exp(m: Arithmetic, x: Any) -> Any:
    """Cephes' expf: 2^n times a polynomial in the remainder, to about 1e-7 of the result."""
    x = m.clip(x, -87.0, 88.0)
    n = m.round(x * 1.44269504088896341)
    r = x - n * 0.693359375 + n * 2.12194440e-4
    p = r * 1.9875691500e-4 + 1.3981999507e-3
    for coefficient in (8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = p * r + coefficient
    return (p * r * r + r + 1.0) * m.power_of_two(n)


def _hard_sigmoid(m: Arithmetic, x: Any, alpha: Any, beta: Any) -> Any:
    return m.clip(x * alpha + beta, 0.0, 1.0)


def _gelu(m: Arithmetic, x: Any, alpha: Any, beta: Any) -> Any:
    """Return x times the normal distribution's value: Abramowitz and Stegun 7.1.26, to 1.5e-7."""
    above = m.clip(x, 0.0, math.inf)
    size = above - m.clip(x, -math.inf, 0.0)
    t = 1.0 / (size * (0.3275911 * 0.70710678) + 1.0)
    p = t * 1.061405429 - 1.453152027
    for coefficient in (1.421413741, -0.284496736, 0.254829592):
        p = p * t + coefficient
    return above - size * p * t * _exp(m, x * x * -0.5) * 0.5


def _tanh_gelu(m: Arithmetic, x: Any, alpha: Any, beta: Any) -> Any:
    return x / (_exp(m, (x * x * 0.044715 + 1.0) * x * -1.5957691216057308) + 1.0)


def _mish(m: Arithmetic, x: Any, alpha: Any, beta: Any) -> Any:
    """Return x * tanh(log(1 + e^x)), with the hyperbolic tangent as a fraction of powers of e^x."""
    e = _exp(m, m.clip(x, -math.inf, 40.0))
    n = (e + 2.0) * e
    return x * (n / (n + 2.0))


# Name -> function of an arithmetic, x, and the attributes alpha and beta. A new one needs only a line here, and one in
# ``convert_elementwise`` that names its ONNX operator.
ACTIVATIONS: dict[str, Callable[[Arithmetic, Any, Any, Any], Any]] = {
    "hard_sigmoid": _hard_sigmoid,
    "hard_swish": lambda m, x, alpha, beta: x * _hard_sigmoid(m, x, alpha, beta),
    "sigmoid": lambda m, x, alpha, beta: 1.0 / (_exp(m, x * -1.0) + 1.0),
    "silu": lambda m, x, alpha, beta: x / (_exp(m, x * -1.0) + 1.0),
    "tanh": lambda m, x, alpha, beta: 1.0 - 2.0 / (_exp(m, x * 2.0) + 1.0),
    "gelu": _gelu,
    "tanh_gelu": _tanh_gelu,
    "mish": _mish,
    "leaky_relu": lambda m, x, alpha, beta: m.clip(x, 0.0, math.inf) + m.clip(x, -math.inf, 0.0) * alpha,
    "elu": lambda m, x, alpha, beta: m.clip(x, 0.0, math.inf) + (_exp(m, m.clip(x, -math.inf, 0.0)) - 1.0) * alpha,
}


def activate(kind: str, x: NDArray[np.float32], attributes: dict[str, Any]) -> NDArray[np.float32]:
    """Apply an activation function to an array. attributes: ``alpha`` and ``beta``, where the function has them."""
    alpha, beta = (np.float32(attributes.get(name, 0)) for name in ("alpha", "beta"))
    with np.errstate(over="ignore", invalid="ignore"):
        result: NDArray[np.float32] = ACTIVATIONS[kind](NumpyArithmetic(), x, alpha, beta)
    return result
