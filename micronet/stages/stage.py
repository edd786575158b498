"""What every stage is: its settings, what it may follow, how it runs and how its structure is restored."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from micronet import registry
from micronet.artifact.history import StageRecord
from micronet.artifact.kinds import check_file_kind
from micronet.core.config import Option, build, flatten, options
from micronet.core.progress import Progress
from micronet.errors import MicronetError, unknown
from micronet.stages.config import DistributedConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

    from micronet.artifact.artifact import Artifact

PRUNE_FIRST = "prune first, then quantize: run it on the float artifact"
BEFORE_FUSING = "use the artifact from before bn-fuse"


@dataclass(frozen=True)
class Memory:
    """What the Python API gives in memory.

    Attributes:
        source: The input network, in place of the file that the config names.
        artifacts: Networks by the paths that stand for them in the config.
        batches: Input tensors, in place of the data set in calibration.
        example: An input or a tuple of inputs, for tracing.
    """

    source: "Artifact | None" = None
    artifacts: "Mapping[Path, Artifact]" = field(default_factory=dict)
    batches: "list[Tensor] | None" = None
    example: "Tensor | tuple[Any, ...] | None" = None


@dataclass(frozen=True)
class Context:
    """What surrounds a stage while it runs.

    Attributes:
        source: The input artifact; None if there is none, or it is another kind of file.
        output: The file that it writes; a name in a temporary folder if nothing is kept.
        progress: Where it reports progress.
        memory: What was given in memory.
        temporary: Whether the output is in a folder that is removed after the stage.
    """

    source: "Artifact | None"
    output: Path
    progress: Progress
    memory: Memory
    temporary: bool

    @property
    def artifact(self) -> "Artifact":
        """The input artifact of a stage that cannot do without."""
        assert self.source is not None
        return self.source


@dataclass(frozen=True)
class Outcome:
    """What a stage made: the product itself, and a summary of JSON values for people and scripts."""

    product: Any
    summary: Any = field(default_factory=dict)


class Stage:
    """Base of all stages.

    Attributes:
        name: The name on the command line, in recipes and in histories.
        details: What ``--help`` says after the summary.
        example: A command line that works.
        Config: The dataclass of its settings.
        suffix: The suffix of the file that it writes, or None if it only reports.
        ending: The end of the default output's name, after the input's.
        begins: Whether it begins a history.
        cannot_follow: Stages that must not come before it -> why not, and what to do instead.
        takes_batches: Whether the API may give it input batches in place of a data set.
        takes_example: Whether the API may give it an example input, for tracing.
        takes_networks: Whether the API may give it networks in memory.
        product: The type of its product, for the typed API.
        advanced: Settings that ``--help`` of other stages shows first, and of this one under Advanced.
    """

    name: ClassVar[str]
    details: ClassVar[str] = ""
    example: ClassVar[str]
    Config: ClassVar[Any]
    suffix: ClassVar[str | None] = ".safetensors"
    ending: ClassVar[str] = ".safetensors"
    begins: ClassVar[bool] = False
    cannot_follow: ClassVar[Mapping[str, str]] = {}
    takes_batches: ClassVar[bool] = False
    takes_example: ClassVar[bool] = False
    takes_networks: ClassVar[bool] = True
    product: ClassVar[str] = "Artifact"
    advanced: ClassVar[tuple[str, ...]] = ()

    @property
    def summary(self) -> str:
        """One sentence that says what the stage does."""
        return registry.COMMANDS[self.name].summary

    @property
    def options(self) -> list[Option]:
        """The settings in the order of ``--help``: arguments, basic ones, advanced ones; the stage's own come first."""
        bases = self.Config.__bases__ if is_dataclass(self.Config.__base__) else ()
        shared = {option.name for base in bases for option in options(base)}

        def rank(option: Option) -> tuple[bool, bool, bool]:
            return not option.about["argument"], not self.is_basic(option), option.name in shared

        return sorted(options(self.Config), key=rank)

    def is_basic(self, option: Option) -> bool:
        """Return True if ``--help`` shows a setting first: the ten that a newcomer needs."""
        return bool(option.about["basic"]) and option.name not in self.advanced

    def configure(self, values: Mapping[str, Any]) -> Any:
        """Make the config from a flat mapping of settings; raise MicronetError for invalid values."""
        config = build(self.Config, values)
        flat = flatten(config)
        for option in options(self.Config):
            value = flat[option.name]
            for path in value if isinstance(value, list) else [value]:
                if isinstance(path, Path) and option.about["kinds"]:
                    check_file_kind(path, *option.about["kinds"])
        self.check(config)
        return config

    def check(self, config: Any) -> None:
        """Raise MicronetError if settings contradict one another."""

    def check_order(self, history: Iterable[str], config: Any) -> None:
        """Raise MicronetError if this stage may not follow the stages of a history; the message says what to do."""
        history = list(history)
        if self.begins and history:
            raise MicronetError(f"{self.name} begins a history; this artifact has one already: {' -> '.join(history)}")
        for earlier in history:
            if earlier in self.cannot_follow:
                raise MicronetError(f"{self.name} cannot follow {earlier}: {self.cannot_follow[earlier]}")

    def processes(self, config: Any) -> int | None:
        """Return the number of processes to run in, or None if the stage always runs in one."""
        run = getattr(config, "run", None)
        return run.world_size if isinstance(run, DistributedConfig) else None

    def trains(self, config: Any) -> bool:
        """Return True if the stage trains, so that it can be resumed."""
        return uses(self.Config, "resume")

    def records(self, config: Any) -> list[str]:
        """Return the names of the stages that running this one adds to a history."""
        return [self.name] if self.suffix == ".safetensors" else []

    def writes(self, config: Any) -> str | None:
        """Return the suffix of the file that the stage writes with this config, or None."""
        return self.suffix

    def default_output(self, config: Any) -> Path:
        """Return the path to write to if none is given: a name beside the input's."""
        path = self.input(config) or config.model.file
        name: Path = path.with_name(path.stem + self.ending)
        return name

    def input(self, config: Any) -> Path | None:
        """Return the input file's path, or None if a new network is made."""
        arguments = [option.name for option in options(self.Config) if option.about["argument"]]
        path: Path | None = flatten(config)[arguments[0]] if arguments else None
        return path

    def open(self, config: Any, source: "Artifact | None") -> "Artifact | None":
        """Return the input: ``source`` if it was given in memory, otherwise the artifact that the config names."""
        values = flatten(config)
        path = values.get("artifact")
        if source is not None or path is None or path.suffix != ".safetensors":
            return source
        from micronet.artifact.artifact import load

        return load(path, values.get("model"), trust_code=values.get("trust_code", False))

    def run(self, config: Any, context: Context) -> Outcome:
        """Do the stage's work and return what it made."""
        raise NotImplementedError

    def judge(self, config: Any, outcome: Outcome) -> None:
        """Raise FailedError if the outcome breaks a promise that the config asks for."""

    def write(self, product: Any, path: Path) -> None:
        """Write the product."""
        from micronet.artifact.artifact import save

        save(product, path)

    def add_file(self, summary: dict[str, Any], path: Path) -> None:
        """Add the file that was written to the summary."""
        summary.update(output=str(path), size_bytes=path.stat().st_size)

    def restore(self, model: "nn.Module", record: StageRecord) -> "nn.Module":
        """Rebuild the structure that a record describes; stages that change no structure return the model as it is."""
        return model


def find(name: str) -> Stage:
    """Return the stage of a name; raise MicronetError with the names there are if there is none."""
    if name not in registry.STAGES:
        raise unknown("stage", name, registry.STAGES)
    stage: Stage = registry.load_object(registry.STAGES[name].stage)
    return stage


def uses(config: Any, name: str) -> bool:
    """Return True if a config class has a setting of this name."""
    return any(option.name == name for option in options(config))


def count(number: int, noun: str) -> str:
    """Return a number with its noun: ``1 error``, ``2 errors``."""
    return f"{number} {noun}{'s' * (number != 1)}"
