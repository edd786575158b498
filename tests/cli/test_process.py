"""How a command's process ends: by Ctrl-C and SIGTERM at any moment, and with closed or full standard streams."""

import ast
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import micronet as package
from micronet.cli import console, process
from micronet.cli.command import Interrupted
from micronet.stages import export, inspect_artifact, train

RESUME = "all files are intact. To continue, run the same command with --resume"


def test_a_long_step_says_how_far_it_is_where_there_is_no_terminal(monkeypatch, capsys):
    monkeypatch.setattr(console, "monotonic", iter([0.0, 29.0, 31.0, 31.0, 60.0]).__next__)
    bar = console.Bar()
    for done in (1, 2000, 3000):
        bar.step("reading images", done, 4000)
    assert capsys.readouterr().err == "reading images: 2,000 of 4,000\n"


def in_fork(work):
    """Run a function in a fork of this process; return its exit code."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell started in the background
        try:
            work()
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def interrupted_twice():
    try:
        with process.ending_in_order():
            signal.raise_signal(signal.SIGTERM)
    except KeyboardInterrupt as stop:
        assert stop.args == (signal.SIGTERM,)
        with process.ending_in_order():
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                signal.raise_signal(signal.SIGTERM)  # the user is in a hurry


def interrupted_where_exceptions_are_lost():
    class Held:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    with process.ending_in_order():
        Held()


def interrupted_during_an_import():
    class Finder:
        def find_spec(self, *arguments):
            signal.raise_signal(signal.SIGINT)

    sys.meta_path.insert(0, Finder())
    with process.ending_in_order():
        try:
            import no_such_module  # noqa: F401
        except BaseException:  # as in C++ code that looks for an optional module
            os._exit(0)


def ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as by nohup
    process.end_at_once()
    with process.ending_in_order():
        signal.raise_signal(signal.SIGINT)
    os._exit(7)


@pytest.mark.parametrize(
    ("work", "code"),
    [
        (interrupted_twice, 143),
        (interrupted_where_exceptions_are_lost, 130),
        (interrupted_during_an_import, 130),
        (ignored, 7),
    ],
)
def test_no_signal_is_lost(work, code):
    assert in_fork(work) == code


def test_signals_mean_what_they_did_once_the_work_is_done():
    before = [signal.getsignal(number) for number in process.SIGNALS]
    with process.ending_in_order():
        pass
    assert [signal.getsignal(number) for number in process.SIGNALS] == before


@pytest.mark.parametrize(
    ("stage", "number", "said"),
    [
        (train.Train(), signal.SIGINT, f"interrupted; {RESUME}"),
        (export.ExportOnnx(Path("a.safetensors")), signal.SIGTERM, "ended by SIGTERM"),
        (inspect_artifact.Inspect(Path("a.safetensors")), signal.SIGINT, "interrupted"),
    ],
)  # fmt: skip
def test_only_what_can_be_resumed_says_so(stage, number, said):
    stop = Interrupted(KeyboardInterrupt(number), stage)
    assert (str(stop), stop.exit_code) == (said, 128 + number)


def test_the_package_imports_nothing_before_the_command_is_ready_for_ctrl_c():
    tree = ast.parse(Path(package.__file__).read_text())
    assert not [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert {each.name for node in tree.body if isinstance(node, ast.Import) for each in node.names} <= {"os"}


@pytest.mark.parametrize(("redirect", "code", "said"), [
    (">/dev/full", 1, "error: standard output could not be written (No space left on device)\n"),
    (">&-", 0, ""),
    ("<&- >/dev/null 2>&-", 0, ""),
])  # fmt: skip
def test_standard_streams_may_be_full_or_closed(redirect, code, said):
    command = f"exec '{sys.executable}' -m micronet schema train {redirect}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, said)


@pytest.mark.parametrize("failing", [(os, "urandom"), (os, "fsync"), (os, "replace")])
def test_a_full_disk_is_one_line_and_the_old_file_stays(micronet, tmp_path, monkeypatch, failing):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    output = tmp_path / "a.safetensors"
    output.write_bytes(b"old")
    monkeypatch.setattr(*failing, full)
    done = micronet("import", "--model", "lenet", "--force", "-o", output)
    assert (done.code, done.err) == (1, f"error: {output} could not be written (No space left on device)\n")
    assert (output.read_bytes(), list(tmp_path.iterdir())) == (b"old", [output])


def test_a_pipe_is_not_called_an_unknown_recipe(micronet, tmp_path):
    os.mkfifo(tmp_path / "recipe")
    done = micronet("run", tmp_path / "recipe")
    assert (done.code, "is not a recipe in TOML: it is a pipe or a device" in done.err) == (2, True)


def test_a_damaged_length_is_not_taken_for_another_kind_of_file(micronet, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes((8).to_bytes(8, "little") + b"}}}}")  # an ONNX file begins with an 8, too
    done = micronet("inspect", path)
    assert (done.code, "a truncated or corrupted file" in done.err) == (2, True)


def test_a_closed_stream_is_not_given_to_the_next_file(tmp_path):
    def work():
        os.close(1)
        process.open_streams()
        with (tmp_path / "a").open("wb") as file:
            assert file.fileno() > 2
            os.write(1, b"of a library")
        assert not (tmp_path / "a").read_bytes()
        os._exit(9)

    assert in_fork(work) == 9
