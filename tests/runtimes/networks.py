"""Whole networks, quantized, folded, exported and packed."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from micronet.onnx.export import to_onnx
from micronet.packed.file_format import to_bytes
from micronet.packed.from_onnx import pack_model
from micronet.quantization.fold import fold_model
from tests.onnx.networks import IMAGES, LENET, quantized

BINARY = {"w_bits": "binary", "a_bits": "binary"}
TERNARY = {"w_bits": "ternary", "a_bits": "binary"}
FEW = 8  # images
NETWORKS = {"nin": {"width": 0.1}, "nin_gc": {"width": 1.0}, "resnet18": {"width": 0.1}, LENET[0]: LENET[1]}
SCHEMES = {
    "W1A1": BINARY, "WtA1": TERNARY, "W1A1-8bit": {**BINARY, "first_last": "8bit"},
    "W1A1-W1A8": {**BINARY, "first_last": "8bit-input"}, "W1A1-all": {**BINARY, "first_last": "same"},
    "W8A8": {}, "W8A8-asym": {"q_type": "asym"}, "W2A8": {"w_bits": 2, "method": "lsq"}, "W1A8": {"w_bits": "binary"},
    "WtA8": {"w_bits": "ternary"}, "W4A4-dorefa": {"w_bits": 4, "a_bits": 4, "method": "dorefa"},
    "WtA32": {"w_bits": "ternary", "a_bits": 32}, "W16A16": {"w_bits": 16, "a_bits": 16},
}  # fmt: skip


class Exported(NamedTuple):
    """A packed file, images and torch's scores of them, and the size of the ONNX model."""

    path: Path
    images: NDArray[np.float32]
    scores: NDArray[np.float32]
    onnx_bytes: int


def export(network: str, scheme: str, folder: Path) -> None:
    """Quantize, fold, export and pack a network."""
    torch.manual_seed(0)
    artifact = quantized(network, NETWORKS[network], **SCHEMES[scheme])
    model, record = fold_model(artifact.model, artifact.history)
    proto = to_onnx(artifact.after(record, model=model), IMAGES)
    (folder / "x.packed").write_bytes(to_bytes(pack_model(proto)))
    with torch.no_grad():
        scores = model.eval()(IMAGES[:FEW]).numpy()
    np.savez(folder / "x.npz", images=IMAGES[:FEW].numpy(), scores=scores, onnx_bytes=proto.ByteSize())


def load(folder: Path) -> Exported:
    """Return what ``export`` wrote."""
    with np.load(folder / "x.npz") as saved:
        return Exported(folder / "x.packed", saved["images"], saved["scores"], int(saved["onnx_bytes"]))
