"""The processor's instruction set, and the register blocking that the kernels use on it.

Three instruction sets: ``avx512`` (with VPOPCNTDQ and VNNI), ``avx2``, and ``portable`` for any other processor. numba
freezes module constants into compiled code, so they are set once per process, when this module is imported.
"""

import os
from collections.abc import Mapping

import numpy as np
from llvmlite import binding
from numba import config

from micronet.errors import MicronetError

VARIABLE = "MICRONET_KERNEL"  # environment variable that selects a slower instruction set, for tests
LANES = 16  # output channels per vector
BLOCK_PIXELS = 4  # pixels that share the weights in registers
ITEM_BYTES = 4  # 32 signs, four uint8, or one float32
BITS, UINT8, FLOAT32 = range(3)  # element types of feature maps, and arithmetic of convolutions

# If numba is configured to compile for another processor, this one's features do not count.
_CROSS_COMPILING = any(getattr(config, name, None) for name in ("CPU_NAME", "CPU_FEATURES"))
_FEATURES: Mapping[str, bool] = {} if _CROSS_COMPILING else binding.get_host_cpu_features()
_FOUND = {
    "avx512": all(_FEATURES.get(name) for name in ("avx512vpopcntdq", "avx512vnni", "avx512bw")),
    "avx2": _FEATURES.get("avx2"),
    "portable": True,
}
SUPPORTED = [name for name, found in _FOUND.items() if found]  # fastest first
INSTRUCTION_SET = next((name for name in SUPPORTED if name == os.environ.get(VARIABLE)), SUPPORTED[0])
COUNTS_BYTES = INSTRUCTION_SET != "avx512"  # differing bits are counted byte by byte
WEIGHT_EXPANSION = 2 if INSTRUCTION_SET == "avx2" else 1  # bytes in memory per eight binary weights
BIT_VECTOR_MULTIPLE = 2 if COUNTS_BYTES else 1  # blocks of binary weights hold a multiple of this many vectors
MAX_BIT_VECTORS, MAX_VECTORS = (6, 1) if COUNTS_BYTES else (4, 4)  # vectors per block that fit in registers
HAS_PDEP = bool(_FEATURES.get("bmi2")) and INSTRUCTION_SET != "portable"
# Row = byte of signs; column = nibble of weights (low nibble of the byte first, then high) -> number of differing bits.
DIFFERENCE_TABLE = np.array(
    [[bin(i ^ half).count("1") for half in (byte & 15, byte >> 4) for i in range(16)] for byte in range(256)], np.uint8
)


def check_requested() -> None:
    """Raise MicronetError if MICRONET_KERNEL names an instruction set that this processor does not have."""
    requested = os.environ.get(VARIABLE)
    if requested and requested not in SUPPORTED:
        raise MicronetError(
            f"{VARIABLE} is {requested!r}, but this processor supports {', '.join(SUPPORTED)}; unset it to use the "
            "fastest instruction set"
        )
