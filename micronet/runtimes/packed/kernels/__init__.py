"""The compiled kernels of the packed runtime.

As it is imported, numba reads a file .numba_config.yaml in the working directory, which could switch compilation off or
move its cache. It is therefore imported from this folder.
"""

import os
import sys
from pathlib import Path

if "numba" not in sys.modules:
    _before = os.open(".", os.O_RDONLY)
    try:
        os.chdir(Path(__file__).parent)
        import numba  # noqa: F401
    finally:
        os.chdir(_before)  # by handle: its path may have changed
        os.close(_before)
