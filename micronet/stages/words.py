"""What a stage says before it works, and the command to run next. Imports torch only inside functions."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from micronet.core.config import flatten
from micronet.core.image_size import spell_size
from micronet.errors import count

if TYPE_CHECKING:
    from micronet.artifact.artifact import Artifact
    from micronet.data.dataset import Dataset
    from micronet.evaluation.report import Row
    from micronet.stages.stage import Stage

MILLION = 1_000_000
OTHER_WIDTHS = "widths that suit the kernels may be faster: try --regular 8 or --regular 16, or a larger --percent"


def introduce(data: "Dataset", artifact: "Artifact", device: Any) -> str:
    """Describe the data, the network and the device in one line.

    For example: 4,000 training and 1,000 validation images, 10 classes, 1 channel, 32x32; nin with 0.67 M parameters;
    cpu.
    """
    noun = data.train.noun
    found = [f"{len(data.train):,} training and {len(data.validation):,} validation {noun}s", *_shape(data)]
    return f"{', '.join(found)}; {describe_network(artifact)}; {device}"


def describe_network(artifact: "Artifact") -> str:
    """Name a network and its size: ``nin with 0.67 M parameters``."""
    spec, kind = artifact.spec, type(artifact.model).__name__
    name = kind if spec.runs_user_code or not spec.name else spec.name.rpartition(":")[2]  # not a factory's name
    params = sum(parameter.numel() for parameter in artifact.model.parameters())
    size = f"{params / MILLION:.2f} M" if params >= MILLION / 100 else f"{params:,}"
    return f"{name} with {size} parameters"


def row_labels(rows: "Sequence[Row]") -> list[str]:
    """Return what to call each row of a comparison: its name, with the runtime if several rows have the same name."""
    names = [row.name for row in rows]
    return [f"{row.name} in {row.runtime}" if names.count(row.name) > 1 else row.name for row in rows]


def describe_inputs(inputs: list[dict[str, Any]]) -> str:
    """Describe inputs that are not images: ``float32 1x24x40 and int64 7``."""
    return " and ".join(f"{each['dtype']} {'x'.join(map(str, each['shape']))}".rstrip() for each in inputs)


def without_folder(name: str) -> str:
    """Return the name of a file, or of something in one, without a whole path, which says where it is kept."""
    return Path(name).name if Path(name).is_absolute() else name


def noun_of(artifact: "Artifact") -> str:
    """Return what one of the test samples of an artifact is called."""
    return "image" if (artifact.data or {}).get("inputs") is None else "sample"


def stage_after_training(artifact: "Artifact") -> str:
    """Return the stage that usually follows a training or a quantization."""
    from micronet.graph.ops import BATCH_NORMS

    if all(record.stage != "quantize" for record in artifact.history):
        return "quantize"
    return "bn-fuse" if any(isinstance(module, BATCH_NORMS) for module in artifact.model.modules()) else "export-onnx"


def next_command(command: str, path: Path, stage: "Stage", artifact: "Artifact") -> str:
    """Return a command line that works on the artifact that a stage wrote, with the user's code that it needs.

    ``command``: the name of a stage, perhaps followed by options.
    """
    from micronet.stages.stage import find, uses

    name, *rest = command.split()
    values, following = flatten(stage), find(name)
    words = ["micronet", name, str(path), *rest]
    for option, recorded in (("model", None), ("task", (artifact.data or {}).get("task"))):
        value = values.get(option) or recorded
        if value is not None and ":" in value and not value.startswith("torchvision:") and uses(following, option):
            words += [f"--{option}", value]
    return " ".join(words)


def _shape(data: "Dataset") -> list[str]:
    spec = data.spec
    classes = [count(len(spec.classes), "class")] if spec.classes else []
    if spec.inputs is not None:
        return [*classes, describe_inputs(spec.inputs)]
    return [*classes, count(spec.channels or 0, "channel"), spell_size(spec.image_size or 0)]
