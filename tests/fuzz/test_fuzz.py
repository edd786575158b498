"""A share of what scripts/fuzz tries: every damaged file ends in one line, and nothing runs."""

import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.corpus import KINDS, fill, set_traps, try_one

FEW = settings(
    max_examples=12, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)  # fmt: skip


@pytest.fixture(scope="session")
def whole(shared):
    """A folder of whole files."""

    def make(folder):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            fill()

    return shared("fuzz", make)


@pytest.mark.parametrize("kind", KINDS)
def test_no_damage_escapes(kind, whole, tmp_path, monkeypatch):
    shutil.copytree(whole, tmp_path / "files")
    monkeypatch.chdir(tmp_path / "files")
    set_traps()

    @FEW
    @given(st.randoms(use_true_random=False))
    def law(random):
        words, _, verdict = try_one(KINDS[kind], whole, random)
        assert not verdict.faults, words

    law()
