import numpy as np
import pytest
import torch

from micronet.artifact.artifact import load, save
from micronet.cli.measures import pruned_latency
from micronet.stages import prune as prune_stage
from micronet.stages import prune_latency
from tests.data.test_data import make_folder


@pytest.fixture
def pruned(chain, tmp_path, micronet):
    path = tmp_path / "pruned.safetensors"
    done = micronet("prune", chain / "float.safetensors", "--percent", 0.5, "-o", path, "--json")
    assert done.code == 0, done.err
    return path


def test_prune_reports_what_the_files_hold(micronet, chain, tmp_path):
    path = tmp_path / "p.safetensors"
    shown = micronet("prune", chain / "float.safetensors", "--percent", 0.5, "-o", path, "--json").json
    assert shown["before"]["size_bytes"] == (chain / "float.safetensors").stat().st_size
    assert shown["after"]["size_bytes"] == path.stat().st_size < shown["before"]["size_bytes"]
    assert shown["after"]["params"] == sum(p.numel() for p in load(path).model.parameters())
    assert shown["cut"] == shown["asked"] == shown["total"] // 2
    assert sum(group["before"] - group["after"] for group in shown["groups"]) == shown["cut"]
    row = micronet("compare", path, "--json").json["rows"][0]
    assert row["macs"] == shown["after"]["macs"]


def test_prune_times_what_it_wrote_and_says_what_would_be_faster(micronet, chain, tmp_path, monkeypatch):
    monkeypatch.setattr(prune_stage, "LARGEST_TIMED", 10**9)
    network = chain / "float.safetensors"
    shown = micronet("prune", network, "--percent", 0.5, "-o", tmp_path / "p.safetensors", "--json").json["latency"]
    assert shown.keys() == {"before_ms", "after_ms", "regular_8_ms"}
    assert all(value > 0 for value in shown.values())
    skipped = micronet("prune", network, "--skip-timing", "-o", tmp_path / "s.safetensors", "--json")
    assert "latency" not in skipped.json
    example, whole = torch.rand(2, 3, 32, 32), load(network)
    quick = prune_latency.in_onnxruntime(whole, example)(example[:1].numpy())
    monkeypatch.setattr(prune_latency, "_traced", lambda *_: 1 / 0)  # then the exporter of export-onnx serves
    np.testing.assert_allclose(quick, prune_latency.in_onnxruntime(whole, example)(example[:1].numpy()), atol=1e-5)
    monkeypatch.setattr(prune_latency, "session_predictor", lambda *_: 1 / 0)
    failed = micronet("prune", network, "-o", tmp_path / "f.safetensors")
    assert failed.code == 0
    assert "not measured (division by zero)" in failed.out


TWO = """
import torch
from torch import nn


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 12, 3), nn.Linear(5, 12)
        self.one, self.other = nn.Conv2d(12, 4, 1), nn.Linear(12, 2)
        self.stale = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))

    def forward(self, images, numbers):
        x = self.left(images).relu() * self.right(numbers)[:, :, None, None]
        return {"maps": self.one(x), "numbers": self.other(x.mean((2, 3)))}
"""


def test_a_network_of_several_inputs_and_outputs_is_timed_and_the_next_command_runs(micronet, tmp_path, monkeypatch):
    monkeypatch.setattr(prune_stage, "LARGEST_TIMED", 10**9)
    (tmp_path / "two.py").write_text(TWO)
    model, path = f"{tmp_path / 'two.py'}:Two", {name: tmp_path / f"{name}.safetensors" for name in ("float", "pruned")}
    np.savez(tmp_path / "x.npz", np.ones((20, 3, 8, 8), np.float32), np.ones((20, 5), np.float32))
    given = ["--task", "agreement", "--data", tmp_path / "x.npz", "-o", path["float"]]
    assert micronet("import", "--model", model, *given).code == 0
    ask = ["prune", path["float"], "--percent", 0.5, "--criterion", "l2", "--model", model, "--measure"]
    done = micronet(*ask, "-o", path["pruned"], "--json")
    assert done.json["latency"].keys() == {"before_ms", "after_ms", "regular_8_ms"}
    assert done.json["after"]["latency_ms"] == done.json["latency"]["after_ms"]
    assert done.json["after"]["test_error"] > 0
    assert done.json["not_pruned"] == ["stale (never called; 24 parameters)"]
    whole, pruned = (load(path[name], model).model.eval() for name in ("float", "pruned"))
    kept = [torch.where((whole.left.weight == row).flatten(1).all(1))[0].item() for row in pruned.left.weight]
    for reader in (whole.one, whole.other):
        reader.weight.data[:, [channel for channel in range(12) if channel not in kept]] = 0
    inputs = torch.rand(2, 3, 8, 8), torch.rand(2, 5)
    torch.testing.assert_close(pruned(*inputs), whole(*inputs))
    assert micronet(*done.json["next"].split()[1:], "--epochs", 1, "-o", tmp_path / "tuned.safetensors").code == 0


EXPERTS = """
import torch
from torch import nn


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)
        self.experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])

    def forward(self, x):
        y, choice = self.first(x), (x[:, 0] > 2).long()
        out = torch.zeros_like(y)
        for number, expert in enumerate(self.experts):
            rows = torch.where(choice == number)[0]
            if len(rows):
                out.index_add_(0, rows, expert(y[rows]))
        return self.last(out)
"""


@pytest.mark.parametrize("moved", [False, True], ids=["data_there", "data_moved"])
def test_experts_that_two_random_inputs_do_not_reach_are_pruned_along_the_data(micronet, tmp_path, moved):
    (tmp_path / "net.py").write_text(EXPERTS)
    model, path, data = f"{tmp_path / 'net.py'}:Experts", tmp_path / "f.safetensors", tmp_path / "x.npz"
    np.savez(data, np.random.default_rng(0).uniform(0, 4, (20, 4)).astype(np.float32))
    assert micronet("import", "--model", model, "--task", "agreement", "--data", data, "-o", path).code == 0
    if moved:
        data.unlink()
    out = tmp_path / "p.safetensors"
    done = micronet("prune", path, "--percent", 0.5, "--model", model, "-o", out, "--json")
    if moved:
        assert done.code == 2
        assert "does not call experts.1" in done.err
    else:
        assert [expert.out_features for expert in load(out, model).model.experts] == [4, 4]


@pytest.mark.parametrize(
    ("measured", "first", "others"),
    [
        ({"before_ms": 2.0, "after_ms": 1.0, "regular_8_ms": 0.97}, "latency   1.00 ms vs. 2.00 ms before", []),
        (
            {"before_ms": 2.0, "after_ms": 1.0, "regular_8_ms": 0.5},
            "latency   1.00 ms vs.",
            ["--regular 8", "0.50"],
        ),
        (
            {"before_ms": 1.0, "after_ms": 2.0, "regular_8_ms": 0.5},
            "the pruned network is slower: 2.00 ms",
            ["0.50 ms"],
        ),
        ({"before_ms": 1.0, "after_ms": 2.0}, "the pruned network is slower: 2.00 ms vs. 1.00", ["--regular 16"]),
        ({"skipped": "no"}, "latency   not measured (no)", []),
        ({}, "", []),
    ],
)
def test_a_slower_network_is_said_with_the_option_that_helps(measured, first, others):
    lines = [*pruned_latency(measured), "", ""]
    assert lines[0].startswith(first)
    assert all(word in lines[1] for word in others)
    assert bool(lines[1]) == bool(others)


def test_a_dry_run_prints_the_plan_and_writes_nothing(micronet, chain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = micronet("prune", chain / "float.safetensors", "--dry-run", "--percent", 0.99)
    assert done.code == 0
    assert "limited by the minimum" in done.out
    assert "output" in done.out
    assert not list(tmp_path.iterdir())
    assert not list(chain.glob("*pruned*"))


def test_the_chain_goes_on_from_a_pruned_artifact(micronet, pruned, chain, tmp_path):
    tuned, int8, fused, onnx = (
        tmp_path / name for name in ("t.safetensors", "q.safetensors", "f.safetensors", "q.onnx")
    )
    few = ["--epochs", 1, "--limit", 160]
    assert micronet("finetune", pruned, *few, "--distill", chain / "float.safetensors", "-o", tuned).code == 0
    assert micronet("quantize", tuned, *few, "-o", int8).code == 0
    assert micronet("finetune", int8, *few, "-o", tmp_path / "again.safetensors").code == 0
    assert micronet("bn-fuse", int8, "-o", fused).code == 0
    assert micronet("export-onnx", fused, "-o", onnx).code == 0
    assert onnx.stat().st_size < (chain / "int8.onnx").stat().st_size
    stages = [record["stage"] for record in micronet("inspect", fused, "--json").json["history"]]
    assert stages == ["train", "prune", "finetune", "quantize", "bn-fuse"]
    for stage in ("prune", "sparse-train"):
        done = micronet(stage, int8, "-o", tmp_path / "x.safetensors")
        assert done.code == 2
        assert "prune first, then quantize" in done.err


def test_finetuning_a_quantized_artifact_moves_its_ranges(micronet, chain, tmp_path):
    path = tmp_path / "a.safetensors"
    before = load(chain / "int8.safetensors").model.state_dict()
    assert micronet("finetune", chain / "int8.safetensors", "--epochs", 1, "--lr", 0.01, "-o", path).code == 0
    after = load(path).model.state_dict()
    moved = [name for name in before if name.endswith("output_quantizer.scale") and before[name] != after[name]]
    assert moved


def test_a_teacher_changes_what_is_learned_and_resumes(micronet, chain, tmp_path, monkeypatch):
    def tune(name, *more):
        path = tmp_path / name
        done = micronet("finetune", chain / "float.safetensors", "--epochs", 2, "--limit", 100, "-o", path, *more)
        assert done.code == 0, done.err
        return load(path)

    teacher = ["--distill", chain / "int8.safetensors"]
    alone, taught = tune("a.safetensors"), tune("b.safetensors", *teacher, "--distill-weight", 0.9)
    weights = [next(artifact.model.parameters()) for artifact in (alone, taught)]
    assert not torch.equal(*weights)
    assert taught.history[-1].config["distill"] == "int8.safetensors"  # not where it was
    assert "distill" not in alone.history[-1].config
    changed = tmp_path / "teacher.safetensors"
    changed.write_bytes((chain / "int8.safetensors").read_bytes())
    kept = tmp_path / "d.checkpoint.safetensors"
    with monkeypatch.context() as patched:
        patched.setattr("micronet.artifact.artifact.save", lambda *_: (_ for _ in ()).throw(OSError("full")))
        few = ["--epochs", 2, "--limit", 100, "--distill", changed, "-o", tmp_path / "d.safetensors"]
        assert micronet("finetune", chain / "float.safetensors", *few).code == 1
    assert kept.exists()
    changed.write_bytes((chain / "float.safetensors").read_bytes())
    done = micronet("finetune", chain / "float.safetensors", *few, "--resume")
    assert done.code == 2
    assert "teacher" in done.err
    zero = tune("c.safetensors", *teacher, "--distill-weight", 0)
    torch.testing.assert_close(next(zero.model.parameters()), weights[0])


def test_a_folder_with_other_images_is_not_resumed(micronet, tmp_path, monkeypatch):
    folder, start = make_folder(tmp_path / "images"), tmp_path / "start.safetensors"
    assert micronet("train", "--data", folder, "--width", 0.1, "--epochs", 1, "-o", start).code == 0
    ask = ["finetune", start, "--data", folder, "--epochs", 1, "-o", tmp_path / "a.safetensors"]
    with monkeypatch.context() as patched:
        patched.setattr("micronet.artifact.artifact.save", lambda *_: (_ for _ in ()).throw(OSError("full")))
        assert micronet(*ask).code == 1
    first = next((folder / "train").rglob("*.png"))
    first.with_stem("added").write_bytes(first.read_bytes())
    done = micronet(*ask, "--resume")
    assert done.code == 2
    assert "different settings (images)" in done.err
    first.with_stem("added").unlink()
    original, other = start.read_bytes(), load(start)
    torch.nn.init.zeros_(next(other.model.parameters()))
    save(other, start)
    refused = micronet(*ask, "--resume")
    assert refused.code == 2
    assert "started from different weights" in refused.err
    start.write_bytes(original)
    assert micronet(*ask, "--resume").code == 0


def test_the_loss_with_a_teacher_is_hintons():
    from micronet.tasks.classification import Classification
    from micronet.training.distillation import Teacher

    teacher = torch.nn.Linear(4, 3)
    inputs, scores = torch.randn(5, 4), torch.randn(5, 3)
    blended = Teacher(teacher, 0.3, 2.0).blend(torch.tensor(1.5), scores, (inputs,), Classification())
    p, q = (teacher(inputs) / 2).softmax(1), (scores / 2).softmax(1)
    expected = 0.7 * 1.5 + 0.3 * 4 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(blended, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prune", "FLOAT", "--percent", "1"], "at least 0 and less than 1"),
        (["prune", "FLOAT", "--percent", "-0.1"], "at least 0 and less than 1"),
        (["prune", "FLOAT", "--percent", "nan"], "any finite number"),
        (["prune", "FLOAT", "--regular", "0"], "--regular"),
        (["prune", "FLOAT", "--regular", "999"], "too few for a multiple of 999"),
        (["prune", "FUSED"], "prune first, then quantize"),
        (["finetune", "FUSED"], "from before bn-fuse"),
        (["sparse-train", "FLOAT", "--s", "-1"], "--s"),
        (["sparse-train", "FLOAT", "--width", "0.5"], "drop them"),
        (["sparse-train", "FLOAT", "--model", "lenet"], "not lenet"),
        (["quantize", "FLOAT", "--model", "lenet"], "not lenet"),
        (["finetune", "FLOAT", "--distill", "nowhere.safetensors"], "does not exist"),
        (["finetune", "FLOAT", "--temperature", "0"], "--temperature"),
        (["predict", "FLOAT", "nowhere.png"], "does not exist"),
        (["predict", "FLOAT", "broken.png"], "cannot be read as an image"),
        (["predict", "FLOAT", "."], "cannot be read as an image"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line_and_exit_2(micronet, chain, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG garbage")
    before = sorted(tmp_path.iterdir())
    places = {"FLOAT": chain / "float.safetensors", "FUSED": chain / "fused.safetensors"}
    output = [] if arguments[0] == "predict" else ["-o", "x.safetensors"]
    done = micronet(*(places.get(argument, argument) for argument in arguments), *output)
    assert done.code == 2
    assert message in done.err
    assert done.err.strip().count("\n") == 0
    assert sorted(tmp_path.iterdir()) == before


def test_a_teacher_of_other_images_or_classes_is_refused(micronet, chain, tmp_path):
    from tests.data.test_data import make_folder

    folder = make_folder(tmp_path / "images", sizes=((32, 32),), count=8)
    few = ["--model", "lenet", "--epochs", 1, "--data", folder]
    done = micronet("train", *few, "--distill", chain / "float.safetensors", "-o", tmp_path / "a.safetensors")
    assert done.code == 2
    assert "was trained with" in done.err


def test_predict_says_what_evaluate_counts(micronet, chain, tmp_path):
    """The classes it names are those that the network gives to the same pixels."""
    from PIL import Image

    from micronet.data.load import load_data

    dataset = load_data("digits")
    places = torch.arange(6)
    images = dataset.test.images(places)
    folder = tmp_path / "digits"
    folder.mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{index}.png")
    for name in ("float.safetensors", "int8.onnx"):
        shown = micronet("predict", chain / name, folder, "--top", 10, "--json").json
        assert [entry["image"] for entry in shown] == [str(folder / f"{index}.png") for index in range(6)]
        for entry in shown:
            scores = [ranked["score"] for ranked in entry["classes"]]
            assert scores == sorted(scores, reverse=True)
            assert sum(scores) == pytest.approx(1, abs=1e-5)
    from micronet.data.batches import Normalize

    model = load(chain / "float.safetensors").model.eval()
    shown = micronet("predict", chain / "float.safetensors", folder, "--json").json
    expected = model(Normalize(dataset.spec)(images)).argmax(1).tolist()
    assert [entry["classes"][0]["name"] for entry in shown] == [dataset.spec.classes[index] for index in expected]
    assert "%" in micronet("predict", chain / "float.safetensors", folder / "0.png", "--top", 1).out


def test_compare_fails_on_a_drop(micronet, chain, tmp_path):
    worse = tmp_path / "worse.safetensors"
    assert micronet("prune", chain / "float.safetensors", "--percent", 0.9, "-o", worse).code == 0
    files = [chain / "float.safetensors", worse]
    rows = micronet("compare", *files, "--json").json["rows"]
    drop = 100 * rows[1]["drop"]
    assert micronet("compare", *files, "--max-drop", drop + 0.01).code == 0
    done = micronet("compare", *files, "--max-drop", drop - 0.01)
    assert done.code == 1
    assert "worse.safetensors" in done.err
