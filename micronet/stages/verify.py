"""The ``verify`` report: whether files are whole, and hold what they say."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from micronet.core.config import group, setting
from micronet.core.files import FOLDER, check_file_kind
from micronet.errors import FailedError, MicronetError, count
from micronet.runtimes.config import CodeOptions
from micronet.stages.config import ReportConfig
from micronet.stages.stage import Context, Outcome, Stage

if TYPE_CHECKING:
    from micronet.artifact.artifact import Artifact
    from micronet.evaluation.network import Predictor

KINDS = (".safetensors", ".packed", ".onnx", FOLDER)
NO_CHECKSUMS = "none (written before files had them)"


@dataclass(frozen=True)
class Verify(Stage):
    """Verifies files."""

    name = "verify"
    details = (
        "Of artifacts and packed networks, every tensor's checksum is compared with its bytes. An artifact's network "
        "is built and its history replayed. No weight may hold NaN or infinity, and scales must be positive. An "
        "ONNX or packed file given together with the artifact that it was made from must compute what it computes."
    )
    example = "micronet verify int8.safetensors fused.safetensors int8.onnx"
    suffix = None
    product = "list[dict[str, object]]"
    takes_networks = False  # it reads files

    files: list[Path] = setting(
        help="Artifacts, checkpoints, .onnx and .packed files, and folders from export.",
        argument=True,
        metavar="FILE...",
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
        for path in sorted(
            self.files, key=lambda each: each.is_dir() or (each.suffix in KINDS and KINDS.index(each.suffix))
        ):
            row: dict[str, Any] = {"file": str(path), "exit_code": 0}
            try:
                for found in self._verify(path, artifacts):
                    row |= found
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

    def _verify(self, path: Path, artifacts: "dict[Path, Artifact]") -> Iterator[dict[str, Any]]:
        """Yield what was found out about a file, until something is wrong with it."""
        check_file_kind(path, *KINDS)
        if path.is_dir():
            yield _verify_folder(path, artifacts)
        elif path.suffix == ".onnx":
            yield _verify_onnx(path, artifacts)
        elif path.suffix == ".packed":
            yield _verify_packed(path, artifacts)
        else:
            yield from self._verify_tensors(path, artifacts)

    def _verify_tensors(self, path: Path, artifacts: "dict[Path, Artifact]") -> Iterator[dict[str, Any]]:
        from micronet.artifact.artifact import load, read_tensors
        from micronet.artifact.header import open_table, read_header
        from micronet.core.tensor_file import check_tensors
        from micronet.models.finite import check_no_nan
        from micronet.models.spec import ModelSpec

        table = open_table(path)
        check_tensors(path, table)
        if "micronet-calibration" in table.metadata:
            from micronet.quantization.histogram import load_statistics

            load_statistics(path, None)
        elif "micronet-checkpoint" in table.metadata:
            check_no_nan(read_tensors(path, table), str(path))
        else:
            header, _ = read_header(path)
            yield {"checksums": _checksums(table), "history": " -> ".join(record.stage for record in header.history)}
            spec = ModelSpec.from_json(header.model)
            if spec.runs_user_code and self.code.model is None and not self.code.trust_code:
                raise MicronetError(
                    f"the network of {path} was not built, because custom code, {spec.name}, is not run automatically; "
                    "to check its weights, scales and history too, and to compare files made from it, add --model "
                    f"{spec.name} to run your own copy, or --trust-code if you trust the author of the artifact"
                )
            artifacts[path] = load(path, self.code.model, trust_code=self.code.trust_code)
            yield {"quantizers": _check_scales(artifacts[path], path)}
        yield {"checksums": _checksums(table)}


def _checksums(table: Any) -> str:
    return NO_CHECKSUMS if table.checksums is None else f"{count(len(table.tensors), 'tensor')} match"


def _check_scales(artifact: "Artifact", path: Path) -> int:
    """Return the number of weight quantizers; raise FailedError if a scale is not a positive number."""
    import torch

    from micronet.quantization.calibrate import each_quantizer

    checked = 0
    for name, slot, quantizer in each_quantizer(artifact.model):
        checked += slot == "weight_quantizer"
        scale = getattr(quantizer, "scale", None)
        if isinstance(scale, torch.Tensor) and not bool((scale.isnan() | (scale > 0) & scale.isfinite()).all()):
            raise FailedError(f"{path}: {name}.{slot} has a scale that is not a positive number; quantize it again")
    return checked


def _verify_onnx(path: Path, artifacts: "dict[Path, Artifact]") -> dict[str, Any]:
    from micronet.onnx.reader import read_onnx
    from micronet.runtimes.onnxruntime import metadata

    proto = read_onnx(path)
    history = [record.get("stage") for record in metadata(proto).get("history", [])]

    def compare(artifact: "Artifact") -> None:
        from micronet.onnx.check import compare_outputs, require_agreement

        inputs = _inputs(artifact)
        require_agreement(artifact.model, proto, inputs, compare_outputs(artifact.model, proto, [inputs]))

    agrees = _agrees(path, history, artifacts, compare)
    return {"history": " -> ".join(map(str, history)), "agrees": agrees}


def _verify_packed(path: Path, artifacts: "dict[Path, Artifact]") -> dict[str, Any]:
    from micronet.core.tensor_file import read_table
    from micronet.packed.file_format import read
    from micronet.runtimes.packed.numpy_backend import run

    program = read(path)
    history = [str(stage) for stage in program.about.get("stages") or []]
    agrees = _agrees(path, history, artifacts, lambda artifact: _compare(artifact, lambda images: run(program, images)))
    return {"checksums": _checksums(read_table(path)), "history": " -> ".join(history), "agrees": agrees}


def _verify_folder(path: Path, artifacts: "dict[Path, Artifact]") -> dict[str, Any]:
    from micronet.core.files import listed_files
    from micronet.runtimes.config import RuntimeOptions
    from micronet.runtimes.network import open_network

    network = open_network(path, RuntimeOptions())  # which compares every file with its hash
    checksums = f"{count(len(listed_files(path)), 'file')} match"
    history = list(network.stages)
    agrees = _agrees(path, history, artifacts, lambda artifact: _compare(artifact, network))
    return {"checksums": checksums, "history": " -> ".join(history), "agrees": agrees}


def _compare(artifact: "Artifact", predict: "Predictor") -> None:
    """Raise FailedError if another runtime's outputs are not the artifact's."""
    from micronet.onnx.check import LARGEST_ROUNDED_ERROR, compare_tensors

    found = compare_tensors(artifact.model, predict, [_inputs(artifact)])
    if found.error > LARGEST_ROUNDED_ERROR:
        raise FailedError(f"the outputs differ by {found.error:.2%}")


def _agrees(
    path: Path, history: list[Any], artifacts: "dict[Path, Artifact]", compare: "Callable[[Artifact], None]"
) -> bool | None:
    """Compare a file with the artifacts of its history; return None if there is none.

    Raises FailedError if it agrees with none of them.
    """
    alike = {name: each for name, each in artifacts.items() if [record.stage for record in each.history] == history}
    reasons = []
    for name, artifact in alike.items():
        try:
            compare(artifact)
            return True
        except FailedError as error:
            reasons.append(f"{name} ({str(error).removesuffix('; nothing was written')})")
    if reasons:
        raise FailedError(f"{path} does not compute what its artifact computes: {' and '.join(reasons)}")
    return None


def _inputs(artifact: "Artifact") -> Any:
    import torch

    from micronet.stages.inputs import example_input

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return example_input(artifact)
