"""What is passed as weights but is something else is named, with what to do."""

import io

import numpy as np
import pytest
import safetensors.torch
import torch

from micronet.artifact.file_kinds import what_it_is


def _saved(save, value):
    file = io.BytesIO()
    save(file, value)
    return file.getvalue()


STATE = _saved(lambda file, value: torch.save(value, file), {"a": torch.zeros(4)})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (STATE[: len(STATE) // 2], "ends early"),
        (_saved(lambda file, value: np.savez(file, a=value), np.zeros(3)), "is a NumPy archive"),
        (_saved(np.save, np.zeros(3)), "is a NumPy array"),
        (b"\n<!DOCTYPE html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "run git lfs pull"),
        (b"\x1f\x8b\x08", "run gunzip first"),
        (STATE, None),
        (safetensors.torch.save({"a": torch.zeros(4)}), "rename it to w.safetensors"),
        (b"\x80\x02\x8a\nl", None),
    ],
)
def test_other_files_than_weights_are_named(tmp_path, content, words):
    path = tmp_path / "w.pth"
    path.write_bytes(content)
    found = what_it_is(path)
    assert (found is None) == (words is None)
    assert words is None or words in found
