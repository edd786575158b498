"""The compiled kernels of the packed runtime.

numba reads a file .numba_config.yaml in the working directory as it is imported and at each compilation, which could
switch compilation off or move its cache. Unless the user's program has imported numba already, it is ignored.
"""

import os
import sys

if "numba" not in sys.modules:
    from numba.core import config

    # Private: numba has no option for this. tests/runtimes/test_kernel_cache.py notices a change.
    config._config_fname = os.devnull
    config.reload_config()  # type: ignore[no-untyped-call]
