"""The ``export`` stage: a network for any runtime, checked against torch, with what runs in integers and how fast."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from micronet import registry
from micronet.core.config import changed, flag, group, options, setting
from micronet.core.files import FOLDER
from micronet.core.folders import write_folder
from micronet.errors import MicronetError, unknown
from micronet.stages.config import TimingConfig
from micronet.stages.export import CheckedSettings
from micronet.stages.stage import Context, Outcome, Stage, find


@dataclass(frozen=True)
class Export(CheckedSettings, Stage):
    """Exports a network to a runtime."""

    name = "export"
    details = (
        "--target onnxruntime, packed and tensorrt do what export-onnx, pack and trt-build do with their defaults. "
        "The other targets write a folder of files; evaluate, compare and predict take such a folder in place of a "
        "file. Nothing is written if the target lacks an operator, or if its outputs do not agree with torch's. "
        "Afterwards, the latency is compared with that of the float network in the same runtime."
    )
    example = "micronet export fused.safetensors --target openvino -o int8_openvino"
    suffix = FOLDER
    product = "ModelProto | Program | Engine | Folder"
    takes_example = True

    target: str = setting("onnxruntime", f"Target runtime: {', '.join(registry.TARGETS)}.", basic=True, names="targets")
    precision: Literal["fp32", "fp16"] = setting(
        "fp32",
        "How float weights are stored. fp16 halves them; onnxruntime computes in fp16 too, openvino and ncnn in fp32.",
        basic=True,
    )
    timing: TimingConfig = group(TimingConfig)

    @classmethod
    def configure(cls, values: Mapping[str, Any]) -> Self:
        """Make the stage; an ONNX file is refused with what its target can do with it."""
        file, target = Path(values.get("artifact") or ""), values.get("target")
        if file.suffix == ".onnx" and target in ("openvino", "onnxruntime"):
            raise MicronetError(
                f"{target} runs {file} as it is, without an export; run micronet evaluate {file} --runtime {target}"
            )
        if file.suffix == ".onnx" and target in registry.TARGETS and target != "tensorrt":
            raise MicronetError(
                f"an ONNX file cannot be exported to {target}; export the artifact (.safetensors) that {file} was made "
                "from, or make one with micronet import --model NAME --weights FILE"
            )
        return super().configure(values)

    def check(self) -> None:
        """Refuse an unknown target, and settings that have no effect on the target's stage."""
        if self.target not in registry.TARGETS:
            raise unknown("target", self.target, registry.TARGETS)
        if (stage := self._stage()) is not None:
            self._configured(stage)
        elif self.precision == "fp16" and not registry.load_object(registry.TARGETS[self.target]).STORES_FP16:
            raise MicronetError(f"--precision fp16 has no effect with --target {self.target}; drop it")

    def _stage(self) -> type[Stage] | None:
        """The stage that does the work, or None if the target is a folder."""
        name = registry.TARGETS[self.target]
        return find(name) if name in registry.STAGES else None

    def _configured(self, stage: type[Stage]) -> Stage:
        """Return the target's stage with these settings."""
        given = {name: value for name, value in changed(self).items() if name != "target"}
        for name in given.keys() - {option.name for option in options(stage)}:
            raise MicronetError(f"{flag(name)} has no effect with --target {self.target}; drop it")
        return stage.configure(given)

    def writes(self) -> str | None:
        """Return the suffix of the target's file."""
        stage = self._stage()
        return FOLDER if stage is None else stage.suffix

    def default_output(self) -> Path:
        """Return the name of the artifact with the target's suffix, or for a folder with the target's name."""
        stage = self._stage()
        if stage is not None:
            return self._configured(stage).default_output()
        return self.artifact.with_name(f"{self.artifact.stem}_{self.target}")

    def run(self, context: Context) -> Outcome:
        """Export the network and compare it with torch."""
        stage = self._stage()
        if stage is not None:
            done = self._configured(stage).run(context)
            return Outcome(done.product, {**done.summary, "target": self.target})
        from micronet.stages.export_folder import export_folder

        return export_folder(self, context)

    def write(self, product: Any, path: Path) -> None:
        """Write the file or folder."""
        stage = self._stage()
        if stage is not None:
            self._configured(stage).write(product, path)
        else:
            write_folder(path, product)
