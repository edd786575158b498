from pathlib import Path

import pytest

OLD_FILES = Path(__file__).parent / "old_files"


@pytest.fixture
def old_file() -> Path:
    """A packed network (W1A1, first and last layer 8-bit) that an earlier version of micronet wrote."""
    return OLD_FILES / "w1a1.packed"
