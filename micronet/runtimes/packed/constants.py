"""The constants of all instructions: weights, limits, scales and biases, in one array per element type."""

import numpy as np

from micronet.runtimes.packed.feature_maps import CACHE_LINE, Array, UnsupportedProgram, aligned_zeros

DTYPES = {"bytes": np.uint8, "ints": np.int32, "offsets": np.int64, "floats": np.float32}


class ConstantPool:
    """Collects constants; each method returns the position of the first one in its array."""

    def __init__(self) -> None:
        self._parts: dict[str, list[Array]] = {name: [] for name in DTYPES}
        self._sizes = dict.fromkeys(DTYPES, 0)

    def bytes(self, values: Array) -> int:
        """Add bytes, aligned to a cache line."""
        padded = np.zeros(-(-values.size // CACHE_LINE) * CACHE_LINE, np.uint8)
        padded[: values.size] = values
        return self._add("bytes", padded)

    def ints(self, values: Array) -> int:
        """Add int32 values. Raises UnsupportedProgram if they need more than 32 bits."""
        if values.size and not -(2**31) <= values.min() <= values.max() < 2**31:
            raise UnsupportedProgram("a sum needs more than 32 bits")
        return self._add("ints", values.astype(np.int32))

    def offsets(self, values: list[int]) -> int:
        """Add int64 values."""
        return self._add("offsets", np.array(values, np.int64))

    def floats(self, values: Array) -> int:
        """Add float32 values."""
        return self._add("floats", values.astype(np.float32))

    def arrays(self) -> tuple[Array, ...]:
        """Return all constants: arrays of uint8, int32, int64 and float32."""
        found = tuple(aligned_zeros(self._sizes[name], dtype) for name, dtype in DTYPES.items())
        for values, parts in zip(found, self._parts.values(), strict=True):
            np.concatenate([values[:0], *parts], out=values)
        return found

    def _add(self, name: str, values: Array) -> int:
        position = self._sizes[name]
        self._parts[name].append(values.ravel())
        self._sizes[name] += values.size
        return position
