"""Who says what, and with which exit code, where a command is one of several processes or starts them."""

import signal

import pytest

from micronet.errors import FailedError
from micronet.stages.launch import _exit_code, _interrupts_waiting
from micronet.training.distributed import LOST
from tests.conftest import as_rank


@pytest.mark.parametrize(
    ("codes", "exit_code"),
    [({0: 2, 1: -15}, 2), ({1: 1, 0: -15}, 1), ({0: 3, 1: 3}, 3), ({0: LOST, 1: 2}, 2)],
)
def test_a_process_that_has_said_why_it_ended_decides(codes, exit_code):
    assert _exit_code(codes, 2) == exit_code


@pytest.mark.parametrize(
    ("codes", "said"),
    [
        ({1: -9, 0: -15}, "process 1 of 2 was killed (SIGKILL)"),
        ({0: LOST, 1: -11}, "process 1 of 2 was killed (SIGSEGV)"),
        ({0: LOST, 1: -15}, "process 1 of 2 was killed (SIGTERM)"),
        ({0: LOST, 1: LOST}, "the 2 processes lost contact"),
    ],
)
def test_the_launcher_speaks_for_processes_that_could_not(codes, said):
    with pytest.raises(FailedError) as ended:
        _exit_code(codes, 2)
    assert str(ended.value).startswith(said)


def test_ctrl_c_waits_for_imports_that_would_swallow_it():
    before = signal.getsignal(signal.SIGINT)
    passed = []
    with pytest.raises(KeyboardInterrupt), _interrupts_waiting():
        signal.raise_signal(signal.SIGINT)
        passed.append(True)
    assert passed
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("words", "code"),
    [(["--help"], 0), (["train", "--help"], 0), (["train", "--colour"], 2), (["nonsense"], 2), ([], 2),
     (["train", "--epochs", "-1"], 2), (["train", "--bn_fuse", "x"], 2), (["inspect", "none.safetensors"], 2)],
)  # fmt: skip
def test_only_the_first_process_speaks_of_the_command_line(micronet, monkeypatch, words, code):
    said = []
    for rank in (0, 1):
        as_rank(monkeypatch, rank, 2)
        done = micronet(*words)
        assert done.code == code
        said.append(done.out + done.err)
    assert said[0]
    assert not said[1]


def test_one_word_of_several_processes_makes_no_several(micronet, monkeypatch, chain):
    monkeypatch.setenv("WORLD_SIZE", "2")  # as a scheduler may leave it
    assert micronet("inspect", chain / "float.safetensors").code == 0


@pytest.mark.parametrize(
    ("name", "value"), [("RANK", "x"), ("WORLD_SIZE", "two"), ("MASTER_PORT", "-1"), ("LOCAL_RANK", "")]
)
def test_processes_without_numbers_are_one_line(micronet, monkeypatch, name, value):
    as_rank(monkeypatch, 0, 2)
    monkeypatch.setenv(name, value)
    done = micronet("train", "--epochs", "1")
    assert done.code == 2
    assert f"{name} is" in done.err
    assert len(done.err.splitlines()) == 1
