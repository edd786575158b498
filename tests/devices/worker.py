"""A process with the mock device: runs the checks whose names it reads, one per line, and answers with JSON lines.

The device can be registered only once in a process and cannot be removed, so the tests' own process must not have it.
"""

import json
import sys
import traceback
import warnings

import torch

from tests.devices import mock
from tests.devices.table import CPU, Check, all_checks, changed


def main() -> None:
    """Answer every line of standard input with the names that differ from the CPU's and the error, if any."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    mock.register()
    for line in sys.stdin:
        try:
            answer = {"changed": compare(all_checks()[line.strip()]), "error": None}
        except Exception:
            answer = {"changed": [], "error": traceback.format_exc()}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def compare(check: Check) -> list[str]:
    """Return the names of a check's numbers and tensors that are not the CPU's to the last bit."""
    reference = None if check.tolerance is None else check.run(CPU)
    found = check.run(torch.device(mock.NAME, 0))
    return [] if reference is None else changed(found, reference)


if __name__ == "__main__":
    main()
