from dataclasses import replace
from pathlib import Path

import pytest
import torch

from micronet.artifact.artifact import save
from micronet.cli.app import run as command
from micronet.data.load import load_data
from tests.onnx.test_onnx import quantized

OLD_FILES = Path(__file__).parent / "old_files"


@pytest.fixture
def old_file() -> Path:
    """A packed network (W1A1, first and last layer 8-bit) that an earlier version of micronet wrote."""
    return OLD_FILES / "w1a1.packed"


@pytest.fixture(scope="session")
def packed(tmp_path_factory) -> tuple[Path, Path]:
    """An artifact for the digits, and the packed file that the command makes of it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("packed")
    artifact = replace(quantized("nin", {"width": 0.1}), data=load_data("digits", limit=160).spec.to_json())
    save(artifact, folder / "int8.safetensors")
    assert command(["pack", str(folder / "int8.safetensors"), "-o", str(folder / "int8.packed"), "--quiet"]) == 0
    return folder / "int8.safetensors", folder / "int8.packed"
