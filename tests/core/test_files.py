import errno
import fcntl

import pytest

from micronet.core import files
from micronet.core.files import check_output_path, check_writable, write_bytes
from micronet.errors import FailedError, MicronetError


@pytest.mark.parametrize(
    ("cause", "error"),
    [(OSError(errno.ENOSPC, "No space left on device"), FailedError), (KeyboardInterrupt(), KeyboardInterrupt)],
    ids=["full disk", "Ctrl-C"],
)
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, cause, error):
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")

    def fail(handle):
        raise cause

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(error):
        write_bytes(target, b"half")
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


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
