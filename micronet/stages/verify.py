"""The ``verify`` report: whether files are whole, and hold what they say."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from micronet.core.config import group, setting
from micronet.errors import FailedError, MicronetError, count
from micronet.runtimes.config import CodeOptions
from micronet.stages.config import ReportConfig
from micronet.stages.stage import Context, Outcome, Stage

if TYPE_CHECKING:
    from micronet.artifact.artifact import Artifact

KINDS = (".safetensors", ".packed", ".onnx")
NO_CHECKSUMS = "none (written before files had them)"


@dataclass(frozen=True)
class Verify(Stage):
    """Verifies files."""

    name = "verify"
    details = (
        "Of artifacts and packed networks, the checksum of every tensor is compared with its bytes. An artifact's "
        "network is built, its history replayed, and its quantized weights must be on their grids. No tensor may hold "
        "NaN or infinity. An ONNX or packed file given together with the artifact that it was made from must compute "
        "what the artifact computes."
    )
    example = "micronet verify int8.safetensors fused.safetensors int8.onnx"
    suffix = None
    product = "list[dict[str, object]]"
    takes_networks = False  # it reads files

    files: list[Path] = setting(
        help="Artifacts, .onnx and .packed files.", argument=True, kinds=KINDS, metavar="FILE..."
    )
    code: CodeOptions = group(CodeOptions)
    report: ReportConfig = group(ReportConfig)

    def open(self, source: "Artifact | None") -> None:
        """Open nothing: every file is read on its own."""

    def input(self) -> Path:
        """Return the first file."""
        return self.files[0]

    def run(self, context: Context) -> Outcome:
        """Verify each file; go on after one that fails."""
        artifacts: dict[Path, Artifact] = {}
        rows = []
        for path in sorted(self.files, key=lambda each: KINDS.index(each.suffix) if each.suffix in KINDS else 0):
            row: dict[str, Any] = {"file": str(path), "exit_code": 0}
            try:
                row |= self._verify(path, artifacts)
            except MicronetError as error:
                row |= {"problem": str(error), "exit_code": error.exit_code}
            rows.append(row)
        return Outcome(rows, rows)

    def judge(self, outcome: Outcome) -> None:
        """Raise the problem of the first damaged file, otherwise that of the first file that failed."""
        failed = [row for row in outcome.product if row["exit_code"]]
        if not failed:
            return
        worst = max(failed, key=lambda row: row["exit_code"])
        kind = MicronetError if worst["exit_code"] == MicronetError.exit_code else FailedError
        rest = f" ({count(len(failed), 'file')} of {len(outcome.product)} failed)" if len(outcome.product) > 1 else ""
        raise kind(f"{worst['problem']}{rest}")

    def _verify(self, path: Path, artifacts: "dict[Path, Artifact]") -> dict[str, Any]:
        if path.suffix == ".onnx":
            return _verify_onnx(path, artifacts)
        if path.suffix == ".packed":
            return _verify_packed(path, artifacts)
        from micronet.artifact.artifact import load
        from micronet.artifact.header import read_header

        _, table = read_header(path)
        artifact = load(path, self.code.model, trust_code=self.code.trust_code)
        artifacts[path] = artifact
        return {
            "checksums": _checksums(table),
            "history": " -> ".join(record.stage for record in artifact.history),
            "quantizers": _check_grids(artifact, path),
        }


def _checksums(table: Any) -> str:
    return NO_CHECKSUMS if table.checksums is None else f"{count(len(table.tensors), 'tensor')} match"


def _check_grids(artifact: "Artifact", path: Path) -> int:
    """Return the number of weight quantizers; raise FailedError if a quantized weight is not on its grid."""
    import torch

    from micronet.quantization.calibrate import each_quantizer
    from micronet.quantization.functional import dequantize

    checked = 0
    for name, slot, quantizer in each_quantizer(artifact.model):
        if slot != "weight_quantizer":
            continue
        checked += 1
        with torch.no_grad():
            weight: Any = artifact.model.get_submodule(name).weight
            grid, integers = quantizer.qparams(weight), quantizer.integers(weight)
            on_grid = torch.equal(dequantize(integers, grid), quantizer.project(weight))
        if not on_grid or int(integers.min()) < grid.qmin or int(integers.max()) > grid.qmax:
            raise FailedError(f"{path}: the weight of {name} is not on the grid of its quantizer; quantize it again")
    return checked


def _verify_onnx(path: Path, artifacts: "dict[Path, Artifact]") -> dict[str, Any]:
    import numpy as np
    from onnx import numpy_helper

    from micronet.runtimes.onnxruntime import metadata, read_onnx

    proto = read_onnx(path)
    for tensor in proto.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.dtype.kind == "f" and np.isnan(array).any():
            raise FailedError(f"{path} has NaN in {tensor.name}; export it again")
    history = [record.get("stage") for record in metadata(proto).get("history", [])]
    artifact = _made_from(history, artifacts)
    if artifact is not None:
        from micronet.onnx.check import compare_outputs, require_agreement

        inputs = _inputs(artifact)
        require_agreement(artifact.model, proto, inputs, compare_outputs(artifact.model, proto, [inputs]))
    return {"history": " -> ".join(map(str, history)), "agrees": artifact is not None}


def _verify_packed(path: Path, artifacts: "dict[Path, Artifact]") -> dict[str, Any]:
    from micronet.core.tensor_file import read_table
    from micronet.packed.file_format import read
    from micronet.runtimes.packed.numpy_backend import run

    program = read(path)
    history = [str(stage) for stage in program.about.get("stages") or []]
    artifact = _made_from(history, artifacts)
    if artifact is not None:
        from micronet.onnx.check import LARGEST_ROUNDED_ERROR, compare_tensors

        found = compare_tensors(artifact.model, lambda images: run(program, images), [_inputs(artifact)])
        if found.error > LARGEST_ROUNDED_ERROR:
            raise FailedError(f"the outputs of {path} and torch differ by {found.error:.2%}; pack the network again")
    return {
        "checksums": _checksums(read_table(path)),
        "history": " -> ".join(history),
        "agrees": artifact is not None,
    }


def _made_from(history: list[Any], artifacts: "dict[Path, Artifact]") -> "Artifact | None":
    """Return the artifact among the files given that has a history, or None."""
    found = (each for each in artifacts.values() if [record.stage for record in each.history] == history)
    return next(found, None)


def _inputs(artifact: "Artifact") -> Any:
    import torch

    from micronet.stages.inputs import example_input

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return example_input(artifact)
