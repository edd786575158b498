"""The ``init`` command: a commented recipe from five answers, each checked as it is given."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from micronet import registry
from micronet.artifact.header import read_header
from micronet.core.config import flatten, group, setting
from micronet.core.files import check_file_kind, check_writable, write_bytes
from micronet.data.spec import unknown_data
from micronet.errors import MicronetError, unknown
from micronet.models.spec import ModelSpec
from micronet.recipe.compose import Answers, Goal, compose
from micronet.recipe.plan import plan
from micronet.recipe.reader import parse_recipe
from micronet.stages.config import DEFAULT_MODEL, ModelConfig, ReportConfig
from micronet.stages.stage import Context, Outcome, Stage

FILES = (".safetensors", ".onnx")
DEFAULTS: dict[str, Any] = {
    "model": DEFAULT_MODEL, "data": "digits", "goal": "small", "runtime": "onnxruntime", "max_drop": 1.0,
}  # fmt: skip
QUESTIONS = {  # a setting -> what is asked
    "model": "Which network? A name (micronet list models), your code as net.py:Net, or an .onnx or .safetensors file",
    "data": "Which data? A name (micronet list data), a folder with train/ and test/, or an .npz file",
    "goal": f"What do you want? {', '.join(get_args(Goal))}",
    "runtime": f"Where will it run? {', '.join(registry.TARGETS)}",
    "max_drop": "How much accuracy may be lost, in percentage points?",
}


@dataclass(frozen=True)
class Init(Stage):
    """Writes a recipe."""

    name = "init"
    details = (
        "Asks five questions in a terminal. Enter takes the answer in brackets; options answer without being asked. An "
        "existing file is never overwritten."
    )
    example = "micronet init --model nin --goal small --yes -o small.toml"
    suffix = None
    product = "str"

    model: str | None = setting(None, f"{QUESTIONS['model']}. Default: nin.", basic=True, names="models")
    data: str | None = setting(
        None, f"{QUESTIONS['data']}. Default: the data that the file records, or digits.", basic=True, names="data"
    )
    goal: Goal | None = setting(None, "What to gain. Default: small.", basic=True)
    runtime: str | None = setting(
        None, f"Where the network will run: {', '.join(registry.TARGETS)}. Default: onnxruntime.", basic=True,
        names="targets",
    )  # fmt: skip
    max_drop: float | None = setting(
        None, "Accuracy that may be lost, in percentage points. Default: 1.", low=0, high=100, basic=True
    )
    yes: bool = setting(False, "Take the default answers instead of asking.", "-y", basic=True)
    output: Path = setting(Path("recipe.toml"), "The recipe to write.", "-o", basic=True)
    report: ReportConfig = group(ReportConfig)

    def input(self) -> None:
        """Return None: the file that a recipe begins with is only looked at."""

    def check(self) -> None:
        """Refuse an answer as soon as it is given, and an output that is there or cannot be written."""
        if self.output.suffix != ".toml":
            raise MicronetError(f"{self.output} does not end in .toml, as recipes do; choose another name with -o")
        check_writable(self.output)
        if self.output.exists():
            raise MicronetError(f"{self.output} already exists; choose another name with -o, or remove it")
        if self.model is not None:
            self._check_model(self.model)
        if self.data is not None:
            _check_data(self.data)
        is_onnx = (self.model or "").endswith(".onnx")
        if is_onnx and self.goal == "low-bit":
            raise MicronetError(
                "--goal low-bit needs training, and ONNX files cannot be trained; use --goal small, or --model with "
                "the network's code or artifact"
            )
        runtimes = registry.ONNX_RUNTIMES if is_onnx else registry.TARGETS
        if self.runtime is not None and self.runtime not in runtimes:
            raise unknown("runtime for an ONNX file:" if is_onnx else "runtime", self.runtime, runtimes)

    def unanswered(self) -> list[str]:
        """Return the settings that are still to be asked, in order."""
        return [name for name in QUESTIONS if getattr(self, name) is None]

    def default(self, name: str) -> Any:
        """Return the answer that Enter gives; of the data, None if the file records some."""
        return None if name == "data" and self.recorded_data() is not None else DEFAULTS[name]

    def recorded_data(self) -> str | None:
        """Return the name of the data that the file records, if it begins with one that does."""
        path = Path(self.model or "")
        data: dict[str, Any] | None = None
        if path.suffix == ".safetensors":
            data = read_header(path)[0].data
        elif path.suffix == ".onnx":
            from micronet.onnx.metadata import metadata
            from micronet.onnx.reader import read_onnx

            data = metadata(read_onnx(path)).get("data")
        name = (data or {}).get("name")
        return name if isinstance(name, str) else None

    def run(self, context: Context) -> Outcome:
        """Compose the recipe, check it as ``micronet run`` would, and write it."""
        answers = {name: self.default(name) for name in self.unanswered()}
        whole = replace(self, **answers)
        whole.check()
        text = whole.compose()
        planned = plan(parse_recipe(text, self.output))
        try:
            content = text.encode()
        except UnicodeEncodeError:
            raise MicronetError("a path is not UTF-8, in which recipes are written; rename it") from None
        write_bytes(self.output, content)
        summary = {
            "output": str(self.output),
            "size_bytes": len(content),
            "stages": [each.entry.name for each in planned],
            **{name: value for name, value in flatten(whole).items() if name in QUESTIONS},
            "next": f"micronet run {self.output}",
        }
        return Outcome(text, summary)

    def compose(self) -> str:
        """Return the recipe's text; every question must be answered."""
        assert self.model is not None and self.goal is not None and self.runtime is not None
        assert self.max_drop is not None
        path = Path(self.model)
        spec = ModelSpec.from_json(read_header(path)[0].model) if path.suffix == ".safetensors" else None
        code = spec.name if spec is not None and spec.runs_user_code else None
        return compose(Answers(self.model, self.data, self.goal, self.runtime, self.max_drop, code), self.output)

    def _check_model(self, model: str) -> None:
        path, file = Path(model), model.rpartition(":")[0]
        if path.suffix in FILES or (path.suffix and not file):
            check_file_kind(path, *FILES)
            if not path.exists():
                raise MicronetError(f"--model {model} does not exist; pass the path of a network file, or a name")
            if path.suffix == ".safetensors" and "quantize" in [each.stage for each in read_header(path)[0].history]:
                raise MicronetError(
                    f"--model {model} is quantized already; pass the float artifact that it was made of"
                )
            self.recorded_data()  # raises if the file is damaged
        elif file.endswith(".py") and not Path(file).is_file():
            raise MicronetError(f"--model {model}: {file} does not exist")
        else:
            ModelConfig(model=model)


def _check_data(data: str) -> None:
    """Raise MicronetError unless data are built in, a folder with images for training, a file or the user's code."""
    path = Path(data)
    if path.is_dir() and not (path / "train").is_dir():
        raise MicronetError(f"--data {data} has no train/ in it; put the images into train/CLASS/ and test/CLASS/")
    if data in registry.DATA or path.is_dir() or (":" in data and not path.exists()):
        return
    if path.suffix != ".npz" or not path.is_file():
        raise unknown_data(data)
