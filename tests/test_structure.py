"""The rooms of the house: imports run one way, heavy libraries stay where they belong."""

import ast
import subprocess
import sys
from pathlib import Path

from micronet import registry

ROOT = Path(__file__).parents[1] / "micronet"
# From the ground up; a module may import modules of its own level and of the levels below.
LEVELS = [
    {"errors", "registry"},
    {"core"},
    {"models"},
    {"artifact", "data", "tasks", "graph", "evaluation"},
    {"training"},
    {"pruning", "quantization"},
    {"onnx", "packed", "runtimes"},
    {"reporting"},
    {"stages"},
    {"recipe"},
    {"compression"},
    {"cli", "__init__"},
]
FORBIDDEN = [("pruning", "quantization"), ("quantization", "pruning"), ("runtimes", "training")]
CLI_ONLY = {"typer", "rich", "click"}
TORCH = {"torch", "torchvision"}
# What the command line may import: it parses, calls a stage and prints.
CLI_MAY_IMPORT = {"cli", "compression", "recipe", "stages", "core", "errors", "registry"}
CLI_LINES = 1500


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


def _modules():
    return [(path, path.relative_to(ROOT)) for path in sorted(ROOT.rglob("*.py"))]


def test_imports_run_downwards():
    for path, name in _modules():
        room = _room(path)
        for module in _imports(path):
            top, _, rest = module.partition(".")
            assert top not in CLI_ONLY or room == "cli", f"{name} imports {module}"
            if top == "micronet" and rest and room not in ("__init__", "__main__"):
                other = rest.partition(".")[0]
                if other not in set().union(*LEVELS):  # a name of the API
                    continue
                assert _level(other) <= _level(room), f"{name} imports {module}, which is above it"
                assert (room, other) not in FORBIDDEN, f"{name} imports {module}"


def test_core_and_the_command_line_import_no_torch():
    for path, name in _modules():
        if _room(path) == "core":
            assert not {module.partition(".")[0] for module in _imports(path)} & TORCH, name
    for path in sorted((ROOT / "cli").rglob("*.py")):
        for module in _imports(path):
            top, _, rest = module.partition(".")
            assert top not in TORCH, f"{path.name} imports {module}"
            if top == "micronet" and rest:
                assert rest.partition(".")[0] in CLI_MAY_IMPORT, f"{path.name} imports {module}"


def test_the_command_line_is_thin():
    assert sum(len(path.read_text().splitlines()) for path in (ROOT / "cli").rglob("*.py")) < CLI_LINES


def test_files_hold_one_noun():
    for path, name in _modules():
        assert len(path.read_text().splitlines()) <= 300, name


def test_the_typed_face_of_the_api_is_up_to_date():
    subprocess.run([sys.executable, ROOT.parent / "scripts" / "api_stub", "--check"], check=True)


def test_every_module_says_what_it_computes():
    for path in ROOT.rglob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path


OWN_COMMANDS = {each.stage.partition(":")[0] for each in registry.COMMANDS.values()}
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
HELPS = [[name, "--help"] for name in registry.COMMANDS]
MODULES = "import sys; from micronet.cli.app import run; code = run(sys.argv[1:]); print(*sys.modules); sys.exit(code)"


def _modules_after(*arguments):
    """Return the top-level modules that a command line has imported when it ends."""
    done = subprocess.run([sys.executable, "-c", MODULES, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def test_help_imports_nothing_heavy():
    """One process shows every help and the version: what none of them imports, none imports alone."""
    lines = "; ".join(f"assert run({words}) == 0, {words}" for words in (["--version"], ["--help"], *HELPS))
    code = f"import sys; from micronet.cli.app import run; {lines}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not set(done.stdout.splitlines()[-1].split()) & HEAVY


def test_the_list_of_commands_imports_none_of_them():
    assert not _modules_after("--help") & OWN_COMMANDS


def test_inspect_imports_nothing_heavy_and_no_other_command(chain):
    found = _modules_after("inspect", str(chain / "int8.safetensors"))
    assert not found & {*HEAVY, "pydantic", "rich.progress"}  # Typer imports pydantic only to convert what is typed
    assert found & OWN_COMMANDS == {"micronet.stages.inspect_artifact"}


def test_no_room_has_the_name_of_a_function():
    """Importing a room would put the module in the place of ``micronet.NAME``."""
    rooms = {path.stem for path in ROOT.iterdir() if path.is_dir() or path.suffix == ".py"}
    assert not rooms & registry.API.keys()
