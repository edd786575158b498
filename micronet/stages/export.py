"""The stages that write a network for other runtimes, checked against torch: ``export-onnx`` and ``pack``."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from micronet.core.config import group, setting
from micronet.core.files import write_bytes
from micronet.core.progress import Progress
from micronet.errors import FailedError, MicronetError, first_line
from micronet.onnx.config import ExportConfig
from micronet.stages.config import ConvertSettings, TimingConfig
from micronet.stages.stage import Context, Outcome, Purpose, Stage

if TYPE_CHECKING:
    from torch import nn

    from micronet.artifact.artifact import Artifact

FLOAT_GATES = "SiLU and hardswish stay float, because in integers the network does not agree with torch"
Compared = TypeVar("Compared")
LARGEST_TIMED = 200_000_000  # weights of a packed network
ROUNDING = ("quantize", "sign", "threshold")  # operations that make the scores differ from the float network's


@dataclass(frozen=True)
class CheckedSettings(ConvertSettings):
    """The settings of every stage that compares what it writes with torch."""

    check_images: int = setting(
        256, "Number of test images used to check that the exported network agrees with torch.", low=1, metavar="N"
    )

    def plain_weights(self) -> Purpose:
        """Return "running": the file stores them as constants."""
        return "running"


@dataclass(frozen=True)
class ExportOnnx(CheckedSettings, Stage):
    """Exports a network to ONNX."""

    name = "export-onnx"
    details = (
        "The file is run in ONNX Runtime and only written if it agrees with torch. The check fails if more than 1% of "
        "the predicted classes change (near ties not counted), if a quantized layer is off by more than one "
        "quantization step for the same input, or if the outputs of a float network differ by more than 0.1% (fp16: "
        "2%). If every quantized layer agrees but the outputs differ by more than 1%, a warning is printed. To find "
        "out what makes the file slow, run micronet check-onnx."
    )
    example = "micronet export-onnx fused.safetensors -o int8.onnx"
    ending = suffix = ".onnx"
    product = "ModelProto"
    takes_example = True

    timing: TimingConfig = group(TimingConfig)
    export: ExportConfig = group(ExportConfig)

    def run(self, context: Context) -> Outcome:
        """Export the network and compare the file with it."""
        from torch import nn

        from micronet.models.device import Inputs
        from micronet.onnx.check import compare_outputs, drift, require_agreement, require_other_sizes
        from micronet.onnx.integer_words import describe
        from micronet.onnx.integers import count_integer_layers
        from micronet.onnx.sharing import share_weights
        from micronet.onnx.stored import unpack_weights
        from micronet.runtimes.onnxruntime import metadata
        from micronet.tasks.task import CLASSIFICATION

        artifact, given = checked_inputs(self, context)
        first = given[0]
        self._check_sizes(artifact)
        if any(isinstance(module, nn.LSTM) and module.proj_size for module in artifact.model.modules()):
            context.progress.line("exporting LSTM layers with proj_size takes torch a minute for some hundred steps")
        (progress := context.progress).step("exporting", 0, 1)
        images = not isinstance(first, Inputs)
        classes = images and (artifact.data or {}).get("task", CLASSIFICATION) == CLASSIFICATION

        def compare(proto: Any) -> Any:
            progress.step("comparing the file with torch", 0, 1)
            found = compare_outputs(artifact.model, proto, given, classes=classes)
            require_agreement(artifact.model, proto, first, found)
            if self.export.axes.keys() - {0} and not self.export.embed_preprocessing:
                require_other_sizes(artifact.model, proto, Inputs([first]) if images else first)
            return found

        with explaining_noise(artifact.model, first):
            proto, agreement = agreeing(
                lambda gates: exported(artifact, first, progress, self.export, gates=gates), compare, progress
            )
        warning = drift(agreement, artifact.history)
        if warning:
            progress.line(f"warning: {warning}")
        about = {"kept_float32": metadata(proto).get("kept_float32", {}), **agreement._asdict(), "warning": warning}
        if self.export.low_bit_storage:
            int8 = share_weights(unpack_weights(proto))
            about["low_bits"] = {"bytes": proto.ByteSize(), "int8_bytes": int8.ByteSize()}
        if (integers := count_integer_layers(proto)) is not None:
            if not context.temporary:
                integers |= self._measured(proto, first, progress)
            about["integers"] = {**integers, "words": describe(integers)}
        about["left_float"] = artifact.left_float if integers is None else integers["float"]
        return Outcome(proto, about)

    def _measured(self, proto: Any, inputs: Any, progress: Progress) -> dict[str, Any]:
        """Return the file's size and, unless timing is to be skipped, its speed, both beside the float network's."""
        from micronet.models.device import as_arrays, head
        from micronet.onnx.speed import measure_size, measure_speed

        if self.timing.skip_timing:
            return measure_size(proto)
        progress.step("timing the file", 0, 1)
        return measure_speed(proto, as_arrays(head(inputs, 1)))

    def _check_sizes(self, artifact: "Artifact") -> None:
        """Raise MicronetError if sizes are to stay free that a stage before fixed."""
        from micronet.stages.quantize_warnings import FIXED_SIZES

        fixing = [record.stage for record in artifact.history if record.result.get(FIXED_SIZES)]
        if fixing and self.export.axes.keys() - {0}:
            raise MicronetError(
                f"{fixing[0]} fixed the sizes of this network's inputs, because forward() loops over them, or computes "
                "with them in a way that cannot be traced; pass --dynamic batch"
            )

    def write(self, product: Any, path: Path) -> None:
        """Write the file."""
        write_bytes(path, product.SerializeToString())


@dataclass(frozen=True)
class Pack(CheckedSettings, Stage):
    """Packs a network: the smallest file that runs, without torch."""

    name = "pack"
    details = (
        "Batch norms are folded; with binary activations, scales, biases and batch norms become one threshold per "
        "channel. The file runs without torch, in evaluate, compare and predict. Nothing is written if the format "
        "does not support the network (all unsupported operators are listed with their layers before anything runs), "
        "or if the packed network and torch predict different classes for more than 1% of the test images, near ties "
        "not counted. Afterwards, the latency of the packed network is compared with ONNX Runtime's."
    )
    example = "micronet pack fused.safetensors -o small.packed"
    ending = suffix = ".packed"
    product = "Program"

    timing: TimingConfig = group(TimingConfig)

    def run(self, context: Context) -> Outcome:
        """Pack the network and compare it with torch."""
        from micronet.onnx.check import compare_network, require_close
        from micronet.packed.from_onnx import pack_model
        from micronet.runtimes.packed.numpy_backend import run as run_packed
        from micronet.stages.inputs import export_batches
        from micronet.tasks.task import CLASSIFICATION

        require_image(self, context.artifact)
        artifact, batches = export_batches(context.artifact, self.data, self.check_images)
        first = next(batches())
        proto = exported(artifact, first, context.progress, pairs=False)
        program = pack_model(proto)
        classes = (artifact.data or {}).get("task", CLASSIFICATION) == CLASSIFICATION
        found = compare_network(
            artifact.model, lambda images: run_packed(program, images), list(batches()), classes=classes
        )
        rounds = any(operation.kind in ROUNDING for operation in program.operations)
        with explaining_noise(artifact.model, first):
            require_close(found, "the packed network", rounds=rounds, classes=classes)
        about = {**found._asdict(), "left_float": artifact.left_float}
        if not (self.timing.skip_timing or context.temporary or program.weights > LARGEST_TIMED):
            from micronet.onnx.export import with_pairs
            from micronet.stages.pack_latency import measure_packed

            about["latency"] = measure_packed(program, with_pairs(proto), first[:1].numpy())
        return Outcome(program, about)

    def write(self, product: Any, path: Path) -> None:
        """Write the file."""
        from micronet.packed.file_format import to_bytes

        write_bytes(path, to_bytes(product))


def require_image(config: CheckedSettings, artifact: "Artifact", runtime: str = "the packed runtime") -> None:
    """Refuse an artifact whose record says that its network takes other inputs than one image, before any work."""
    from micronet.data.spec import DataSpec
    from micronet.packed.from_onnx import check_inputs

    inputs = DataSpec.from_json(artifact.data).inputs
    if inputs and config.data.data is None:
        shapes = {each.get("name") or f"input {place}": each["shape"] for place, each in enumerate(inputs, 1)}
        check_inputs(shapes, runtime)


def checked_inputs(config: CheckedSettings, context: Context) -> "tuple[Artifact, list[Any]]":
    """Return the artifact with its data, and the batches on which what is written is compared with torch."""
    from micronet.models.device import Inputs
    from micronet.stages.inputs import export_batches

    example: Any = context.memory.example
    if example is not None:
        return context.artifact, [Inputs(example) if isinstance(example, tuple) else example]
    artifact, batches = export_batches(context.artifact, config.data, config.check_images)
    return artifact, list(batches())


def agreeing(
    export: Callable[[bool], Any], compare: Callable[[Any], Compared], progress: Progress
) -> tuple[Any, Compared]:
    """Return an ONNX model that agrees with torch, with SiLU and hardswish in float if it does not otherwise.

    Args:
        export: Returns the model, with integers in those gates or without.
        compare: Raises FailedError if a model does not agree.

    Returns:
        The model, and what ``compare`` returned for it.
    """
    proto = export(True)
    try:
        return proto, compare(proto)
    except FailedError as error:  # each integer gate may move a result by a step, which adds up
        plain = export(False)
        if len(plain.graph.node) == len(proto.graph.node):
            raise
        found = compare(plain)
        progress.line(f"{FLOAT_GATES} ({first_line(error)})")
        return plain, found


@contextmanager
def explaining_noise(model: "nn.Module", batch: Any) -> Iterator[None]:
    """Say so, if a comparison with torch fails in this context and the network draws random numbers in eval mode."""
    try:
        yield
    except FailedError as error:
        from micronet.evaluation.accuracy import evaluating
        from micronet.models.device import as_arrays, head

        with evaluating(model) as predict:
            first, second = (predict(as_arrays(head(batch, 2))) for _ in range(2))
        pairs = zip(*(each if isinstance(each, list) else [each] for each in (first, second)), strict=True)
        if all((one == other).all() for one, other in pairs):
            raise
        raise FailedError(
            "the network draws random numbers in eval mode, so no two runs agree and nothing was written; leave the "
            "noise out there, or take it as an input"
        ) from error


def exported(
    artifact: "Artifact", inputs: Any, progress: Progress, config: ExportConfig | None = None, **parts: bool
) -> Any:
    """Return ``to_onnx(...)``; an error names the line that decides by the values of the inputs, if any."""
    from micronet.graph.record import record
    from micronet.models.device import as_inputs
    from micronet.onnx.export import to_onnx

    try:
        return to_onnx(artifact, inputs, config, progress=progress, **parts)
    except MicronetError as error:
        try:
            reads = record(artifact.model, as_inputs(artifact.model, inputs), into_leaves=True).reads
        except Exception:  # the user's forward may raise anything
            reads = ""
        if not reads:
            raise
        raise MicronetError(
            f"torch cannot export this network to ONNX, because forward() depends on the values of its inputs{reads}; "
            "write that part with tensor operations such as torch.where"
        ) from error
