"""Tensor files: every flipped bit is noticed and named."""

import json
import struct

import pytest
import torch

from micronet.artifact.artifact import write_tensors
from micronet.core.tensor_file import check_tensors, read_table
from micronet.errors import MicronetError

KEY = "micronet-test"
TENSORS = {"conv.weight": torch.arange(3.0), "empty": torch.zeros(0), "bn.steps": torch.tensor(7)}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, TENSORS, KEY, {"a": [1, {"b": "c"}]})
    return path


def _read(path):
    table = read_table(path)
    header = table.header(KEY)
    check_tensors(path, table)
    return header, table


def test_a_whole_file_reads_back(path):
    header, table = _read(path)
    assert header == {"a": [1, {"b": "c"}]}
    assert {name: info.shape for name, info in table.tensors.items()} == {
        "bn.steps": (),
        "conv.weight": (3,),
        "empty": (0,),
    }


def test_every_flipped_bit_is_noticed_and_that_of_a_tensor_is_named(path):
    content = path.read_bytes()
    _, table = _read(path)
    for position in range(len(content)):
        for bit in range(8):
            flipped = bytearray(content)
            flipped[position] ^= 1 << bit
            path.write_bytes(flipped)
            with pytest.raises((MicronetError, ValueError, KeyError)) as caught:
                _read(path)
            for name, info in table.tensors.items():
                if 0 <= position - len(table.text) - info.begin < info.size_bytes:
                    assert f"tensor {name}" in str(caught.value)


def test_a_file_from_before_checksums_reads(path):
    text = json.dumps(
        {"__metadata__": {KEY: "{}"}, "w": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}
    ).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"ab")
    header, table = _read(path)
    assert header == {}
    assert table.checksums is None


@pytest.mark.parametrize("entry", [{"dtype": "F8_E9M9"}, {"dtype": "F64"}, {"shape": [2]}, {"shape": [2**62, 2**62]}])
def test_a_tensor_of_another_type_or_size_than_its_bytes_is_refused(path, entry):
    table = read_table(path)
    raw = json.loads(table.text[8:])
    raw["conv.weight"] |= entry
    del raw["__metadata__"]["checksums"]
    text, content = json.dumps(raw).encode(), path.read_bytes()[len(table.text) :]
    path.write_bytes(struct.pack("<Q", len(text)) + text + content)
    with pytest.raises(ValueError, match=r"its entry for tensor 'conv\.weight' is invalid"):
        read_table(path)
