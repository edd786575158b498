"""What every stage is: its settings, what it may follow, how it runs and how its structure is restored."""

from collections.abc import Mapping
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from micronet import registry
from micronet.artifact.header import StageRecord
from micronet.core.config import Option, build, flatten, options
from micronet.core.files import check_file_kind, file_size
from micronet.core.progress import Progress
from micronet.errors import MicronetError, unknown
from micronet.stages.config import DistributedConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

    from micronet.artifact.artifact import Artifact

PRUNE_FIRST = "prune first, then quantize: run it on the float artifact"
BEFORE_FUSING = "use the artifact from before bn-fuse"
Purpose = Literal["running", "pruning", "training"]  # what follows on weights that are made plain


@dataclass(frozen=True)
class Memory:
    """What the Python API gives in memory.

    Attributes:
        source: The input network, in place of the file that the config names.
        artifacts: Networks by the paths that stand for them in the config.
        example: An input or a tuple of inputs, for tracing.
    """

    source: "Artifact | None" = None
    artifacts: "Mapping[Path, Artifact]" = field(default_factory=dict)
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
    """Base of all stages: dataclasses whose fields are their settings and groups of settings.

    Attributes:
        name: The name on the command line, in recipes and in histories.
        details: What ``--help`` says after the summary.
        example: A command line that works.
        suffix: The suffix of the file that it writes, FOLDER if it writes one, or None if it only reports.
        ending: The end of the default output's name, after the input's.
        begins: Whether it begins a history.
        restorer: The function that does its ``restore``, as ``module:function``; None if it changes no structure.
        cannot_follow: Stages that must not come before it -> why not, and what to do instead.
        optional_data: Whether it can do without the data set that it takes.
        takes_module: Whether the API may give it a network in memory as its ``model``.
        takes_example: Whether the API may give it an example input, for tracing.
        takes_networks: Whether the API may give it networks in memory.
        continues: Whether the same command, given again, continues where it was interrupted.
        leads_to: The stage that usually comes next, perhaps with options, whatever the product is; see ``next_stage``.
        product: The type of its product, for the typed API.
        advanced: Settings that ``--help`` of other stages shows first, and of this one under Advanced.
    """

    name: ClassVar[str]
    details: ClassVar[str] = ""
    example: ClassVar[str]
    suffix: ClassVar[str | None] = ".safetensors"
    ending: ClassVar[str] = ".safetensors"
    begins: ClassVar[bool] = False
    restorer: ClassVar[str | None] = None
    cannot_follow: ClassVar[Mapping[str, str]] = {}
    optional_data: ClassVar[bool] = False
    takes_module: ClassVar[bool] = False
    takes_example: ClassVar[bool] = False
    takes_networks: ClassVar[bool] = True
    continues: ClassVar[bool] = False
    leads_to: ClassVar[str | None] = None
    product: ClassVar[str] = "Artifact"
    advanced: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def summary(cls) -> str:
        """Return one sentence that says what the stage does."""
        return registry.COMMANDS[cls.name].summary

    @classmethod
    def options(cls) -> list[Option]:
        """Return the settings in the order of ``--help``: arguments, basic, advanced; the stage's own come first."""
        bases = [base for base in cls.__bases__ if is_dataclass(base)]
        shared = {option.name for base in bases for option in options(base)}

        def rank(option: Option) -> tuple[bool, bool, bool]:
            return not option.about["argument"], not cls.is_basic(option), option.name in shared

        return sorted(options(cls), key=rank)

    @classmethod
    def is_basic(cls, option: Option) -> bool:
        """Return True if ``--help`` shows a setting first: the ten that a newcomer needs."""
        return bool(option.about["basic"]) and option.name not in cls.advanced

    @classmethod
    def configure(cls, values: Mapping[str, Any]) -> Self:
        """Make the stage from a flat mapping of settings; raise MicronetError for invalid values."""
        stage = build(cls, values)
        flat = flatten(stage)
        for option in options(cls):
            value = flat[option.name]
            for path in value if isinstance(value, list) else [value]:
                if isinstance(path, Path) and option.about["kinds"]:
                    check_file_kind(path, *option.about["kinds"])
        stage.check()
        return stage

    def check(self) -> None:
        """Raise MicronetError if settings contradict one another."""

    def check_order(self, history: list[str]) -> None:
        """Raise MicronetError if this stage may not follow the stages of a history; the message says what to do."""
        if self.begins and history:
            raise MicronetError(
                f"{self.name} must be the first stage, but this artifact already has a history: {' -> '.join(history)}"
            )
        for earlier in history:
            if earlier in self.cannot_follow:
                raise MicronetError(f"{self.name} cannot follow {earlier}: {self.cannot_follow[earlier]}")

    def plain_weights(self) -> Purpose | None:
        """Return for what weights that a network computes are made plain first, if the stage works on their values."""
        return None

    def processes(self) -> int | None:
        """Return the number of processes to run in, or None if the stage always runs in one."""
        group = getattr(self, "execution", None)
        return group.world_size if isinstance(group, DistributedConfig) else None

    def trains(self) -> bool:
        """Return True if the stage trains, so that it can be resumed."""
        return uses(type(self), "resume")

    def needs_data(self) -> bool:
        """Return True if the stage cannot run without a data set."""
        return uses(type(self), "data") and not self.optional_data

    def records(self) -> list[str]:
        """Return the names of the stages that running this one adds to a history."""
        return [self.name] if self.suffix == ".safetensors" else []

    def writes(self) -> str | None:
        """Return the suffix of the file that the stage writes with these settings, or None."""
        return self.suffix

    def leaves(self) -> Path | None:
        """Return the artifact that a stage without a file of its own leaves in its output folder, or None."""
        return None

    def default_output(self) -> Path:
        """Return the path to write to if none is given: a name beside the input's."""
        path = self.input() or self.model.file  # type: ignore[attr-defined]  # without an input there is a model
        name: Path = path.with_name(path.stem + self.ending)
        return name

    def input(self) -> Path | None:
        """Return the input file's path, or None if a new network is made."""
        arguments = [option.name for option in options(type(self)) if option.about["argument"]]
        path: Path | None = flatten(self)[arguments[0]] if arguments else None
        return path

    def open(self, source: "Artifact | None") -> "Artifact | None":
        """Return the input: ``source`` if it was given in memory, otherwise the artifact that the settings name."""
        values = flatten(self)
        path = values.get("artifact")
        kinds = [kind for option in options(type(self)) if option.name == "artifact" for kind in option.about["kinds"]]
        if source is not None or path is None or (path.suffix in kinds and path.suffix != ".safetensors"):
            return source  # ``run`` opens files of other kinds itself
        from micronet.artifact.artifact import load

        return load(path, values.get("model"), trust_code=values.get("trust_code", False))

    def run(self, context: Context) -> Outcome:
        """Do the stage's work and return what it made."""
        raise NotImplementedError

    def judge(self, outcome: Outcome) -> None:
        """Raise FailedError if the outcome breaks a promise that the settings ask for."""

    def write(self, product: Any, path: Path) -> None:
        """Write the product."""
        from micronet.artifact.artifact import save

        save(product, path)

    def add_file(self, summary: dict[str, Any], path: Path) -> None:
        """Add the file that was written to the summary."""
        summary.update(output=str(path), size_bytes=file_size(path))

    def next_stage(self, product: Any) -> str | None:
        """Return the stage that usually works on the product, perhaps with options, or None."""
        return self.leads_to if self.writes() == ".safetensors" else None

    @classmethod
    def restore(cls, model: "nn.Module", record: StageRecord) -> "nn.Module":
        """Rebuild the structure that a record describes; stages that change no structure return the model as it is."""
        if "computed" in record.result:
            from micronet.graph.plain_weights import KEYS, restore_plain_weights

            model = restore_plain_weights(model, record.result)
            own = {key: each for key, each in record.result.items() if key not in KEYS}
            record = replace(record, result=own)
        if cls.restorer is None:
            return model
        restored: nn.Module = registry.load_object(cls.restorer)(model, record)
        return restored


def find(name: str) -> type[Stage]:
    """Return the stage of a name; raise MicronetError with the names there are if there is none."""
    if name not in registry.STAGES:
        raise unknown("stage", name, registry.STAGES)
    stage: type[Stage] = registry.load_object(registry.STAGES[name].stage)
    return stage


def uses(stage: type[Stage], name: str) -> bool:
    """Return True if a stage has a setting of this name."""
    return any(option.name == name for option in options(stage))
