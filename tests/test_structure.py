"""The rooms of the house: imports run one way, heavy libraries stay where they belong."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from micronet import registry

ROOT = Path(__file__).parents[1] / "micronet"
# From the ground up; a module may import its own level's modules and those of levels below.
LEVELS = [
    {"errors", "registry"},
    {"core"},
    {"models"},
    {"artifact", "data", "graph", "evaluation"},
    {"training"},
    {"pruning", "quantization"},
    {"onnx", "packed", "runtimes"},
    {"stages", "recipe", "api"},
    {"cli", "__init__"},
]
FORBIDDEN = [("pruning", "quantization"), ("quantization", "pruning"), ("runtimes", "training")]
CLI_ONLY = {"typer", "rich", "click"}


def _room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def _imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            if node.module == "micronet":
                found |= {f"micronet.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def _level(room: str) -> int:
    return next(index for index, rooms in enumerate(LEVELS) if room in rooms)


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_downwards(path):
    room = _room(path)
    for module in _imports(path):
        top, _, rest = module.partition(".")
        if top in CLI_ONLY:
            assert room == "cli", f"{path} imports {module}"
        if top == "micronet" and rest:
            other = rest.partition(".")[0]
            if room in ("__init__", "__main__"):
                continue
            assert _level(other) <= _level(room), f"{path} imports {module}, which is above it"
            assert (room, other) not in FORBIDDEN, f"{path} imports {module}"


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_hold_one_noun(path):
    assert len(path.read_text().splitlines()) <= 300


def test_every_module_says_what_it_computes():
    for path in ROOT.rglob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path


OWN_COMMANDS = {each.module for each in registry.COMMANDS.values()}
HEAVY = {
    "torch",
    "torchvision",
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "matplotlib",
    "numba",
    "PIL",
    "safetensors",
}
MODULES = "import sys; from micronet.cli.app import run; code = run(sys.argv[1:]); print(*sys.modules); sys.exit(code)"


def _modules_after(*arguments):
    """Return the top-level modules that a command line has imported when it ends."""
    done = subprocess.run([sys.executable, "-c", MODULES, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([name, "--help"] for name in registry.COMMANDS)])
def test_help_imports_nothing_heavy(arguments):
    assert not _modules_after(*arguments) & HEAVY


def test_the_list_of_commands_imports_none_of_them():
    assert not _modules_after("--help") & OWN_COMMANDS


def test_inspect_imports_nothing_heavy_and_no_other_command(chain):
    found = _modules_after("inspect", str(chain / "int8.safetensors"))
    assert not found & HEAVY
    assert found & OWN_COMMANDS == {"micronet.cli.inspect_artifact"}
