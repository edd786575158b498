"""The ``list`` report: every name that a user can type, with a line on each, read without importing what it names."""

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from micronet import registry
from micronet.core.config import group, setting
from micronet.core.parse import read_text
from micronet.errors import unknown
from micronet.recipe.reader import bundled
from micronet.stages.config import ReportConfig
from micronet.stages.stage import Context, Outcome, Stage

ALSO = {  # what else a kind takes
    "models": ("torchvision:NAME, pkg.mod:factory, path/to/file.py:factory", "a network of torchvision, or yours"),
    "data": ("FOLDER, FILE.npz, pkg.mod:factory", "your own data (docs/tasks.md)"),
    "tasks": ("path/to/file.py:Task", "your own task (docs/tasks.md)"),
}


@dataclass(frozen=True)
class ListNames(Stage):
    """Lists names."""

    name = "list"
    details = "Without a kind, all kinds are listed."
    example = "micronet list models"
    suffix = None
    product = "dict[str, object]"

    kind: str | None = setting(
        None,
        "Kind of names: models, data, tasks, schemes, criteria, stages, runtimes, targets or recipes.",
        argument=True,
        metavar="[KIND]",
        names="kinds",
    )
    report: ReportConfig = group(ReportConfig)

    def check(self) -> None:
        """Refuse an unknown kind."""
        if self.kind is not None and self.kind not in KINDS:
            raise unknown("kind", self.kind, KINDS)

    def input(self) -> None:
        """Return None: no file is read."""

    def run(self, context: Context) -> Outcome:
        """List the names of one kind or of all."""
        found = {kind: _described(kind) for kind in ([self.kind] if self.kind else KINDS)}
        return Outcome(found, found)


def names_of(kind: str) -> list[str]:
    """Return the names of a kind, for the completion of shells; ``kinds`` itself is one."""
    return list(KINDS) if kind == "kinds" else list(bundled() if kind == "recipes" else _TABLES[kind])


def _described(kind: str) -> dict[str, str]:
    """Return the names of a kind with a line on each."""
    if kind == "recipes":
        return {name: _first_comment(path) for name, path in bundled().items()}
    found = {
        name: place.summary if isinstance(place, registry.Command)
        else registry.STAGES[place].summary if place in registry.STAGES
        else _first_line(place).replace("``", "")
        for name, place in _TABLES[kind].items()
    }  # fmt: skip
    return found | dict([ALSO[kind]] if kind in ALSO else [])


def _first_line(reference: str) -> str:
    """Return the first line of a docstring, of ``module:object`` or of a module, from its source alone."""
    module, _, attribute = reference.partition(":")
    tree = ast.parse(_path(module).read_text(encoding="utf-8"))
    node: Any = tree
    if attribute:
        named = {each.name: each for each in tree.body if isinstance(each, ast.ClassDef | ast.FunctionDef)}
        node = named.get(attribute)
    text = ast.get_docstring(node) if node is not None else None
    return (text or "").partition("\n")[0] or _comment(module, attribute)


def _path(module: str) -> Path:
    """Return the file of one of micronet's modules; to ask Python for it would import the packages that it is in."""
    return Path(__file__).parents[2].joinpath(*module.split(".")).with_suffix(".py")


def _comment(module: str, attribute: str) -> str:
    """Return the comment behind or above ``attribute = …``, as networks that are partials of a class have one."""
    before = ""
    for line in _path(module).read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{attribute} = "):
            return line.partition("  # ")[2] or before.removeprefix("# ") * before.startswith("# ")
        before = line
    return ""


def _first_comment(path: Path) -> str:
    """Return the first comment of a recipe."""
    lines = (line.removeprefix("# ") for line in read_text(path).splitlines() if line.startswith("# "))
    return next(lines, "")


_TABLES: dict[str, Mapping[str, Any]] = {
    "models": registry.MODELS, "data": registry.DATA, "tasks": registry.TASKS, "schemes": registry.SCHEMES,
    "criteria": registry.CRITERIA, "stages": registry.STAGES, "runtimes": registry.ONNX_RUNTIMES,
    "targets": registry.TARGETS,
}  # fmt: skip
KINDS = (*_TABLES, "recipes")
