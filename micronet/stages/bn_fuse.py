"""The ``bn-fuse`` stage: batch norms disappear into the layers before them."""

from dataclasses import dataclass

from micronet.core.config import group
from micronet.errors import MicronetError
from micronet.stages.config import OutputConfig, ReadSettings
from micronet.stages.stage import Context, Outcome, Purpose, Stage


@dataclass(frozen=True)
class BnFuse(ReadSettings, Stage):
    """Folds batch norms."""

    name = "bn-fuse"
    details = "Integer weights are unchanged, and biases are rounded to int32."
    example = "micronet bn-fuse int8.safetensors -o fused.safetensors"
    ending = "-fused.safetensors"
    leads_to = "export-onnx"
    restorer = "micronet.quantization.fold:restore"
    takes_example = True

    output: OutputConfig = group(OutputConfig)

    def check_order(self, history: list[str]) -> None:
        """Refuse a network that is fused already; one quantized since then gets its biases rounded."""
        last = [stage for stage in history if stage in ("bn-fuse", "quantize")][-1:]
        if last == ["bn-fuse"]:
            raise MicronetError(
                "bn-fuse cannot follow bn-fuse: the batch norms are already folded; continue with export-onnx"
            )

    def plain_weights(self) -> Purpose:
        """Return "running": a batch norm is multiplied into them."""
        return "running"

    def run(self, context: Context) -> Outcome:
        """Fold every batch norm into the layer before it."""
        from micronet.quantization.fold import fold_model
        from micronet.stages.inputs import example_input
        from micronet.stages.quantize_warnings import warn_fixed_sizes

        artifact, given = context.artifact, context.memory.example
        example = example_input(artifact) if given is None else given
        model, record = fold_model(artifact.model, artifact.history, example)
        warn_fixed_sizes(artifact.model, record, example, context.progress)
        folded = len(record.result["pairs"]) + len(record.result["taken"])
        fused = artifact.after(record, model=model, metrics={})  # metrics of the unfused network are not its own
        about = {name: record.result.get(name, empty) for name, empty in (("left", {}), ("rounded", 0))}
        return Outcome(fused, {"folded": folded, **about})
