import errno

import pytest

from micronet.core.files import check_output_path, check_writable, write_atomically, write_bytes
from micronet.errors import FailedError, MicronetError


def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")

    def fail(temporary):
        temporary.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(FailedError, match="No space left"):
        write_atomically(target, fail)
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")

    def interrupt(temporary):
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(target, interrupt)
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
