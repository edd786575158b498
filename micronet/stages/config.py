"""The settings that stages share, each declared once. No torch here, so ``--help`` stays fast."""

from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal

from micronet import registry
from micronet.core.config import Settings, flag, group, setting
from micronet.core.image_size import LARGEST, parse_size, spell_size
from micronet.core.parse import parse_json
from micronet.errors import MicronetError
from micronet.runtimes.config import CodeOptions, RuntimeOptions
from micronet.training.config import TrainConfig

DEFAULT_MODEL = "nin"
ARTIFACT = (".safetensors",)
MODELS = "nin, nin_gc, resnet18, torchvision:NAME, pkg.mod:factory or path/to/file.py:factory (which runs that code)"


def input_file(
    help: str = "An artifact (.safetensors).",
    default: Any = MISSING,
    *,
    kinds: tuple[str, ...] = ARTIFACT,
    metavar: str = "ARTIFACT",
) -> Any:
    """Declare the file that a stage reads."""
    return setting(default, help, argument=True, kinds=kinds, metavar=metavar)


@dataclass(frozen=True)
class ModelConfig(Settings):
    """Network."""

    model: str | None = setting(None, f"{MODELS}; default: {DEFAULT_MODEL}.", basic=True, names="models")
    width: float | None = setting(
        None, "Multiplier for the width of every layer (built-in networks only); default: 1.", low=0.01, high=16
    )
    model_args: str | None = setting(
        None, "Model arguments as JSON, for example '{\"num_classes\": 10}'.", metavar="JSON"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.arguments
        if self.name not in registry.MODELS:
            from micronet.models.build import check_name

            check_name(self.name)

    @property
    def name(self) -> str:
        """The network named, or the default one."""
        return self.model or DEFAULT_MODEL

    @property
    def file(self) -> Path:
        """The artifact's default path."""
        return Path(f"{self.name.rpartition(':')[2]}.safetensors")

    @property
    def arguments(self) -> dict[str, Any]:
        """The factory's arguments; MicronetError if they are not a JSON object."""
        if self.model_args is None:
            return {}
        try:
            value = parse_json(self.model_args)
        except ValueError as error:
            raise MicronetError(f"--model-args is not valid JSON ({error}); try '{{\"num_classes\": 10}}'") from error
        if not isinstance(value, dict):
            raise MicronetError(f"--model-args is a JSON {type(value).__name__}; expected a JSON object")
        return value

    def check_unused(self) -> None:
        """Raise MicronetError if a new network is described although an artifact is given."""
        if self.width is not None or self.model_args is not None:
            raise MicronetError("--width and --model-args only apply to a new network; drop them, or drop the artifact")


@dataclass(frozen=True)
class DataConfig(Settings):
    """Data."""

    data: str | None = setting(
        None,
        "digits, cifar10, cifar100, mnist, fashion-mnist, a folder with train/ and test/, an .npz file, or "
        "pkg.mod:factory. Default: the data set recorded in the artifact; without an artifact, digits.",
        basic=True,
        names="data",
    )
    task: str | None = setting(
        None,
        "classification, segmentation, agreement (with the float network; for any network and inputs, without labels) "
        "or path/to/file.py:Task (which runs that code). Default: the task recorded in the artifact; without one, "
        "classification.",
        metavar="TASK",
        names="tasks",
    )
    image_size: int | str | None = setting(
        None, "Resize and crop images to N (NxN) or HEIGHTxWIDTH pixels.", metavar="SIZE", low=1, high=LARGEST
    )
    limit: int | None = setting(None, "Use at most N training and N test images.", low=2, metavar="N")

    def __post_init__(self) -> None:
        super().__post_init__()
        size = parse_size(self.image_size)
        object.__setattr__(self, "image_size", spell_size(size) if isinstance(size, list) else size)


@dataclass(frozen=True)
class OutputConfig(Settings):
    """Output."""

    output: Path | None = setting(None, "Output file. Default: a name derived from the input name.", "-o", basic=True)
    force: bool = setting(False, "Overwrite existing files.", run_only=True)
    json: bool = setting(False, "Print the result as JSON.", run_only=True, api=False, basic=True)
    quiet: bool = setting(False, "Print errors only.", "-q", run_only=True, api=False)


@dataclass(frozen=True)
class ReportConfig(Settings):
    """Report."""

    json: bool = setting(False, "Print the result as JSON.", run_only=True, api=False, basic=True)
    quiet: bool = setting(False, "Print errors and results only.", "-q", run_only=True, api=False)


@dataclass(frozen=True)
class TimingConfig(Settings):
    """Timing."""

    skip_timing: bool = setting(False, "Do not measure how fast the networks run.")


@dataclass(frozen=True)
class RunConfig(Settings):
    """Run."""

    seed: int = setting(
        1, "Seed for initial weights, shuffling, augmentation and the validation split.", low=0, high=2**31
    )
    device: str | None = setting(None, "cpu, cuda or cuda:N; default: cuda if available, otherwise cpu.", basic=True)
    resume: bool = setting(False, "Resume an interrupted training run.", run_only=True)
    max_time: float | None = setting(
        None,
        "Minutes after which training saves a checkpoint and stops with exit code 3; continue with --resume.",
        low=0,
    )
    checkpoint_minutes: float = setting(10.0, "Minutes between checkpoints within an epoch (0: every step).", low=0)
    compile: bool = setting(False, "Compile the training step with torch.compile (untested on a GPU).")
    log: Literal["auto", "tensorboard", "mlflow", "none"] = setting(
        "auto",
        "Where metrics go besides the .metrics.jsonl file: TensorBoard, MLflow, or none. auto: TensorBoard if it is "
        "installed.",
        run_only=True,
    )


@dataclass(frozen=True)
class DistributedConfig(RunConfig):
    """Run."""

    device: str | None = setting(
        None,
        "cpu, cuda, cuda:N, or GPU numbers such as 0,1 to run one process per GPU (untested); default: cuda if "
        "available, otherwise cpu.",
        basic=True,
    )
    processes: int | None = setting(
        None,
        "Train in N processes on this machine; every batch is split among them.",
        low=1,
        high=1024,
        metavar="N",
        api=False,
    )
    skip_test: bool = setting(False, "Do not measure the network on the test data at the end.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gpus and not all(gpu.isdigit() for gpu in self.gpus):
            raise MicronetError(f"--device is {self.device!r}; expected GPU numbers, for example 0,1")
        if len(set(map(int, self.gpus))) < len(self.gpus):
            raise MicronetError(f"--device {self.device} lists a GPU twice; list each GPU only once")
        if self.gpus and self.processes not in (None, len(self.gpus)):
            raise MicronetError(
                f"--device {self.device} already sets the number of processes to {len(self.gpus)}; drop --processes"
            )

    @property
    def gpus(self) -> list[str]:
        """The numbers of the GPUs named, one per process."""
        return self.device.split(",") if self.device is not None and self.device[:1].isdigit() else []

    @property
    def world_size(self) -> int:
        """The number of processes."""
        return self.processes or max(1, len(self.gpus))


@dataclass(frozen=True)
class ReadSettings:
    """The settings of every stage that reads an artifact."""

    artifact: Path = input_file()
    code: CodeOptions = group(CodeOptions)


@dataclass(frozen=True)
class ConvertSettings(ReadSettings):
    """The settings of every stage that reads an artifact and data, and writes a file."""

    data: DataConfig = group(DataConfig)
    output: OutputConfig = group(OutputConfig)


@dataclass(frozen=True)
class TrainingSettings:
    """The settings of every stage that trains, in one process or several."""

    data: DataConfig = group(DataConfig)
    training: TrainConfig = group(TrainConfig)
    execution: DistributedConfig = group(DistributedConfig)
    output: OutputConfig = group(OutputConfig)

    def check(self) -> None:
        """Refuse settings that have no effect together."""
        check_teacher(self.training)


@dataclass(frozen=True)
class MeasureSettings:
    """The settings of every report on networks in any runtime."""

    data: DataConfig = group(DataConfig)
    runtime: RuntimeOptions = group(RuntimeOptions)
    report: ReportConfig = group(ReportConfig)


def check_teacher(training: TrainConfig) -> None:
    """Raise MicronetError for settings of distillation without a teacher."""
    for name in ("distill_weight", "temperature"):
        if training.distill is None and getattr(training, name) != getattr(TrainConfig, name):
            raise MicronetError(
                f"{flag(name)} has no effect without a teacher; add --distill ARTIFACT, or drop {flag(name)}"
            )
