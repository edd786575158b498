"""The pages in docs/: generated ones are up to date, links lead somewhere, and the code of "Extending" works."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import typer.main
from torch import nn

from micronet import registry
from micronet.cli.app import app, run
from micronet.cli.old_spellings import modern
from micronet.pruning.config import PruneConfig
from micronet.pruning.prune import Pruner
from micronet.quantization.config import QuantConfig
from micronet.runtimes.config import RuntimeOptions
from micronet.runtimes.network import open_network

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
LINK = re.compile(r"\]\(([^)#\s]+)(?:#([^)]*))?\)")


def test_the_pages_of_commands_are_up_to_date():
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "command_pages", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        found = (page.parent / target).resolve()
        assert found.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.*)$", found.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}, anchor


MIGRATING = (ROOT / "docs" / "migrating.md").read_text(encoding="utf-8")
ROWS = [
    (old.split(), new.split()[1:])
    for old, new in re.findall(r"^\| `python (\S.*?)` \| `(.*?)` \|$", MIGRATING, re.MULTILINE)
]
# Old options without a counterpart: checkpoints are artifacts, which know their network and their widths.
GONE = {"--model_type", "--refine", "--gc_refine", "--model", "--save", "-sr", "--cpu"}


def test_every_command_line_of_2021_has_its_row():
    assert len(ROWS) == 36


@pytest.mark.parametrize(("old", "new"), ROWS, ids=[" ".join(old) for old, _ in ROWS])
def test_old_options_mean_what_todays_command_says(old, new):
    """The old options, typed after today's command, say what its own options say."""
    command = typer.main.get_command(app).commands[new[0]]
    options = []
    for word in old[1:]:
        if word.startswith("-"):
            options.append([word])
        else:
            options[-1].append(word)
    named = [word for option in options if option[0] not in GONE for word in option]
    if "bn_fuse.py" in old:
        named = []
    given = [word for word in new if word.endswith(".safetensors") and new[new.index(word) - 1] != "-o"]
    typed = modern([new[0], *given, *named])
    with command.make_context(new[0], new[1:]) as today, command.make_context(typed[0], typed[1:]) as then:
        extra = {"method", "output", "model", "device"}
        chosen = {name: value for name, value in today.params.items() if name not in extra}
        assert chosen == {name: value for name, value in then.params.items() if name not in extra}


@pytest.mark.slow
def test_every_row_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    short = ["--epochs", "1", "--limit", "160", "--batch-size", "32"]
    rows = [new for _, new in ROWS if not {"cuda:0", "cuda:1", "0,1", "0,1,2"}.intersection(new)]
    order = ("train", "sparse-train", "prune", "finetune", "quantize", "bn-fuse", "compare")
    for new in sorted(rows, key=lambda row: order.index(row[0])):
        trains = new[0] in ("train", "sparse-train", "finetune", "quantize")
        small = ["--width", "0.1"] * ("--model" in new)
        words = [*new, *short * trains, *small, *["--force"] * (new[0] != "compare")]
        assert run(words) == 0, (words, capsys.readouterr().err)


@pytest.fixture(scope="module")
def written():
    """Return the modules that "Extending" writes, by name."""
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    found = {}
    for path, code in re.findall(r"`micronet/(\S+)\.py`\n\n```python\n(.*?)```", text, re.DOTALL):
        module = ModuleType(path)
        exec(code, module.__dict__)
        found[path.rpartition("/")[2]] = module
    assert set(found) == {"variance", "shift", "mine"}
    return found


def test_the_criterion_ranks_channels(written, monkeypatch):
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    with torch.no_grad():
        network[0].weight[3:].mul_(1e-3)
    monkeypatch.setitem(sys.modules, "micronet.pruning.criteria.variance", written["variance"])
    monkeypatch.setitem(registry.CRITERIA, "l2", "micronet.pruning.criteria.variance")
    pruner = Pruner(network, PruneConfig(criterion="l2"), torch.rand(1, 3, 8, 8))
    pruned, _ = pruner.cut(pruner.planner.plan(5 / 8))
    assert torch.equal(pruned[0].weight, network[0].weight[:3])


def test_the_schemes_scales_are_powers_of_two(written):
    quantizer = written["shift"].weight_quantizer(QuantConfig(), 4, 0, 8)
    weight = torch.randn(8, 3, 3, 3)
    quantizer.observe(weight)
    scale = quantizer.qparams(weight).scale
    assert torch.equal(scale.log2(), scale.log2().round())
    on_grid = quantizer(weight)
    assert torch.equal(on_grid, quantizer.integers(weight) * scale.view(-1, 1, 1, 1))
    assert bool(((on_grid - weight).abs() <= scale.view(-1, 1, 1, 1) / 2).all())


def test_the_runtime_opens_its_files(written, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "micronet.runtimes.mine", written["mine"])
    monkeypatch.setitem(registry.PREDICTORS, ".mine", "micronet.runtimes.mine:MinePredictor")
    (tmp_path / "a.mine").write_bytes(b"123")
    network = open_network(tmp_path / "a.mine", RuntimeOptions())
    assert network(torch.rand(2, 3, 4, 4).numpy()).shape == (2, 10) and network.params == 3


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/*.ipynb")), ids=lambda path: path.stem)
def test_the_notebook_runs(path, tmp_path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    script = tmp_path / f"{path.stem}.py"
    script.write_text(code, encoding="utf-8")
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
