import errno
import fcntl
import os
import resource
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from micronet.core.files import (
    cache_folder,
    check_cache_path,
    check_output_path,
    check_report_path,
    check_writable,
    short_names,
    temporary_folder,
    write_bytes,
)
from micronet.errors import FailedError, MicronetError


@pytest.mark.parametrize(
    ("cause", "error"),
    [(OSError(errno.ENOSPC, "No space left on device"), FailedError), (KeyboardInterrupt(), KeyboardInterrupt)],
    ids=["full disk", "Ctrl-C"],
)
@pytest.mark.parametrize("step", [(os, "urandom"), (os, "fsync"), (os, "replace")])
def test_a_write_that_fails_at_any_step_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, cause, error, step):
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")

    def fail(*arguments, **options):
        raise cause

    monkeypatch.setattr(*step, fail)
    with pytest.raises(error):
        write_bytes(target, b"half")
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_disk_that_takes_a_part_of_a_file_leaves_the_old_one(tmp_path):
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        with pytest.raises(FailedError, match="could not be written"):
            write_bytes(target, b"x" * 4096, b"y" * 4096)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_two_writers_of_one_file_leave_it_whole_at_all_times(tmp_path):
    target, contents = tmp_path / "a.bin", [bytes([number]) * 100_000 for number in range(2)]
    write_bytes(target, contents[0])
    with ThreadPoolExecutor(2) as pool:
        writers = [
            pool.submit(lambda content: [write_bytes(target, content) for _ in range(10)], each) for each in contents
        ]
        while not all(writer.done() for writer in writers):
            assert target.read_bytes() in contents
    for writer in writers:
        writer.result()
    assert list(tmp_path.iterdir()) == [target]


def test_a_file_has_the_permissions_of_any_new_file(tmp_path):
    before = os.umask(0o027)
    try:
        write_bytes(tmp_path / "a.bin", b"new")
    finally:
        os.umask(before)
    assert (tmp_path / "a.bin").stat().st_mode & 0o777 == 0o640


def test_a_short_name_has_the_folders_that_tell_it_apart():
    paths = ["runs/a/x.onnx", "runs/b/x.onnx", "runs/b/../b/x.onnx"]
    assert short_names(map(Path, paths)) == ["a/x.onnx", "b/x.onnx", "b/x.onnx"]
    assert short_names(map(Path, ["runs/a/x.onnx", "runs/b/y.onnx"])) == ["x.onnx", "y.onnx"]
    assert short_names([Path()]) == [Path.cwd().name] and short_names([]) == []


@pytest.mark.parametrize("suffix", [".safetensors", ".onnx", ".packed", ".engine", ".pth", ".toml"])
def test_a_report_does_not_replace_a_network(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.touch()
    with pytest.raises(MicronetError, match=f"ends in {suffix}, as an? .*; choose another name"):
        check_report_path(path)
    check_report_path(path.with_suffix(".html"))
    check_report_path(None)


def test_devices_and_pipes_are_not_replaced_by_files(tmp_path):
    pipe, link = tmp_path / "pipe", tmp_path / "a.safetensors"
    os.mkfifo(pipe)
    link.symlink_to(pipe)  # as /dev/full, which root could replace
    for refuse in (check_writable, check_cache_path, lambda path: write_bytes(path, b"new")):
        with pytest.raises(MicronetError, match="is a pipe or a device; specify a file"):
            refuse(link)
    assert pipe.is_fifo()


def test_folders_of_killed_processes_are_removed_and_those_in_use_are_not(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left = tmp_path / "micronet-run-dead1234"
    left.mkdir()
    (left / "result.safetensors").touch()
    with temporary_folder() as first:
        (first / "file").touch()
        with temporary_folder() as second:
            assert {*tmp_path.iterdir()} == {first, second}
    assert not list(tmp_path.iterdir())


def test_a_folder_taken_for_a_leftover_before_it_is_locked_is_made_again(monkeypatch):
    make, removed = tempfile.mkdtemp, []

    def made(*arguments, **options):
        folder = make(*arguments, **options)
        if not removed:
            removed.append(folder)
            Path(folder).rmdir()
        return folder

    monkeypatch.setattr(tempfile, "mkdtemp", made)
    with temporary_folder() as folder:
        assert folder.is_dir() and [str(folder)] != removed


def test_a_user_without_a_home_has_a_cache_among_temporary_files(tmp_path, monkeypatch):
    def unknown(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", unknown)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder().parent == Path(tempfile.gettempdir())


def test_a_target_that_exists_needs_force(tmp_path):
    target = tmp_path / "a.safetensors"
    check_output_path(target, force=False)
    target.write_bytes(b"old")
    with pytest.raises(MicronetError, match="--force"):
        check_output_path(target, force=False)
    check_output_path(target, force=True)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(MicronetError, match="mkdir"):
        check_output_path(tmp_path / "no" / "a.safetensors", force=True)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs /proc, where no user can make a file")
def test_a_folder_that_takes_no_files_is_named_before_the_work(tmp_path):
    with pytest.raises(MicronetError, match=r"/proc takes no files \(.*\); choose another folder"):
        check_output_path(Path("/proc/a.safetensors"), force=False)
    check_output_path(tmp_path / "a.safetensors", force=False)
    assert not list(tmp_path.iterdir())


def test_writing_to_a_link_writes_what_it_names(tmp_path):
    (tmp_path / "kept").mkdir()
    target, link = tmp_path / "kept" / "a.bin", tmp_path / "link.bin"
    link.symlink_to(target)
    for data in (b"first", b"second"):  # a link to nothing yet, then to a file
        write_bytes(link, data)
        assert link.is_symlink() and target.read_bytes() == data
    assert list((tmp_path / "kept").iterdir()) == [target]
    link.unlink()
    link.symlink_to(tmp_path / "no" / "a.bin")
    with pytest.raises(MicronetError, match="mkdir"):
        check_writable(link)


def test_what_a_killed_process_left_is_removed_and_what_a_running_one_writes_is_not(tmp_path):
    path = tmp_path / "a.onnx"
    for name in (".a.onnx.micronet-dead1234", ".a.onnx.original", ".a.onnx.micronet-alive123"):
        (tmp_path / name).touch()
    with (tmp_path / ".a.onnx.micronet-alive123").open("rb") as busy:
        fcntl.flock(busy, fcntl.LOCK_EX)
        write_bytes(path, b"new")
        assert {each.name for each in tmp_path.iterdir()} == {
            "a.onnx", ".a.onnx.original", ".a.onnx.micronet-alive123"
        }  # fmt: skip
