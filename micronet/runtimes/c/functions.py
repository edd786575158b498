"""Elementwise functions as C code: the expressions of ``packed.activations``, step by step in float32."""

import math
from typing import Any

import numpy as np

from micronet.packed.activations import ACTIVATIONS
from micronet.runtimes.c.tables import literal

BOUNDS = {"at_least": "x < a ? a : x", "at_most": "x > a ? a : x"}


class _Number:
    """A float variable of the code whose operators write statements."""

    def __init__(self, code: list[str], text: str) -> None:
        self.code, self.text = code, text

    def write(self, expression: str) -> "_Number":
        """Add a statement that computes a new variable."""
        name = f"v{len(self.code)}"
        self.code.append(f"float {name} = {expression};")
        return _Number(self.code, name)

    def _pair(self, operator: str, first: Any, second: Any) -> "_Number":
        texts = [each.text if isinstance(each, _Number) else literal(np.float32(each)) for each in (first, second)]
        return self.write(f" {operator} ".join(texts))

    def __add__(self, other: Any) -> "_Number":
        return self._pair("+", self, other)

    def __sub__(self, other: Any) -> "_Number":
        return self._pair("-", self, other)

    def __rsub__(self, other: Any) -> "_Number":
        return self._pair("-", other, self)

    def __mul__(self, other: Any) -> "_Number":
        return self._pair("*", self, other)

    def __rmul__(self, other: Any) -> "_Number":
        return self._pair("*", other, self)

    def __truediv__(self, other: Any) -> "_Number":
        return self._pair("/", self, other)

    def __rtruediv__(self, other: Any) -> "_Number":
        return self._pair("/", other, self)


class _CArithmetic:
    """``Arithmetic`` on numbers of the code."""

    def clip(self, x: _Number, low: float, high: float) -> _Number:
        """Return x between two bounds, which may be infinite; NaN stays NaN."""
        for bound, comparison in ((low, "<"), (high, ">")):
            if not math.isinf(bound):
                text = literal(np.float32(bound))
                x = x.write(f"{x.text} {comparison} {text} ? {text} : {x.text}")
        return x

    def round(self, x: _Number) -> _Number:
        """Return x, of at most 2^22, rounded half to even."""
        return x.write(f"({x.text} + ROUNDER) - ROUNDER")

    def power_of_two(self, x: _Number) -> _Number:
        """Return 2 to the power of x, a whole number from -126 to 127."""
        return x.write(f"power_of_two({x.text})")


def function_code(kind: str) -> str:
    """Return a function that applies an activation, or one of BOUNDS, to a row of values."""
    if kind in BOUNDS:
        lines = [f"values[i] = {BOUNDS[kind]};"]
    else:
        lines = []
        x, alpha, beta = (_Number(lines, name) for name in ("x", "a", "b"))
        result = ACTIVATIONS[kind](_CArithmetic(), x, alpha, beta)
        lines.append(f"values[i] = {result.text};")
    body = "\n        ".join(["float x = values[i];", *lines])
    return (
        f"static void step_{kind}(float *values, int32_t count, float a, float b)\n{{\n    int32_t i;\n"
        f"    for (i = 0; i < count; i++) {{\n        {body}\n    }}\n    (void)a;\n    (void)b;\n}}"
    )
