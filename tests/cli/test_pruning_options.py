"""The prune command's ways of choosing, and what it measures."""

import re

import pytest
import torch
from torch import nn

import micronet as api
from micronet.artifact.artifact import load


def fresh(channels=8):
    return nn.Sequential(
        nn.Conv2d(1, channels, 3), nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, 4, 3),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


@pytest.mark.parametrize("options", [["--criterion", "taylor"], ["--target-macs", 0.6], ["--criterion", "fpgm", "--scope", "layer"]], ids=str)  # fmt: skip  # noqa: E501
def test_prune_by_other_ways_reloads(micronet, chain, tmp_path, options):
    path = tmp_path / "p.safetensors"
    done = micronet("prune", chain / "float.safetensors", *options, "-o", path, "--json")
    assert done.code == 0, done.err
    assert load(path).model(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    if "--target-macs" in options:
        assert done.json["after"]["macs"] <= 0.6 * done.json["before"]["macs"]
    assert not any(p.grad is not None for p in load(path).model.parameters())


def test_latency_is_a_target_and_is_measured(micronet, chain, tmp_path):
    path = tmp_path / "p.safetensors"
    shown = micronet(
        "prune", chain / "float.safetensors", "--percent", 0.5, "--measure", "--limit", 100, "-o", path, "--json"
    ).json
    for row in (shown["before"], shown["after"]):
        assert row["latency_ms"] > 0
        assert 0 <= row["test_accuracy"] <= 1


def test_sensitivity_is_printed_drawn_and_writes_no_network(micronet, chain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ask = ["prune", chain / "float.safetensors", "--sensitivity", "--limit", 100]
    rows = micronet(*ask, "--plot", "s.png", "--json").json
    assert len(rows) == 8
    assert {"0.25", "0.5", "0.75"} >= set(rows[0]["drops"])
    worst = [max(row["drops"].values()) for row in rows]
    assert worst == sorted(worst, reverse=True)
    assert [path.name for path in tmp_path.iterdir()] == ["s.png"]
    assert "75% removed" in micronet(*ask).out


def test_steps_prune_and_train_and_resume(micronet, chain, tmp_path):
    path = tmp_path / "p.safetensors"
    ask = ["prune", chain / "float.safetensors", "--steps", 2, "--epochs", 1, "--limit", 100, "-o", path]
    shown = micronet(*ask)
    assert shown.code == 0 and [line.split()[0] for line in shown.out.splitlines()[:3]] == ["params", "MACs", "bytes"]
    stages = [record["stage"] for record in micronet("inspect", path, "--json").json["history"]]
    assert stages == ["train", "prune", "finetune", "prune", "finetune"]
    whole, cut = (sum(p.numel() for p in load(file).model.parameters()) for file in (chain / "float.safetensors", path))
    assert cut < 0.7 * whole
    weights = load(path).model.state_dict()
    path.unlink()
    (tmp_path / "p-step2.safetensors").unlink()
    done = micronet(*ask, "--resume")
    assert done.code == 0, done.err
    assert "step 1" not in done.err
    again = load(path).model.state_dict()
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    for other in (["--epochs", 2], ["--limit", 50], ["--seed", 2]):
        assert "created with different settings" in micronet(*ask, *other, "--resume", "--force").err


def test_the_originals_widths_are_taken_by_prune(micronet, tmp_path):
    whole, cut = tmp_path / "gc.safetensors", tmp_path / "cut.safetensors"
    assert micronet("import", "--model", "nin_gc", "-o", whole).code == 0
    done = micronet("prune", whole, "--gc_refine", *["154", "162", "144", "304", "320", "320", "608", "584"], "--input-shape", "3,32,32", "-o", cut)  # fmt: skip  # noqa: E501
    assert done.code == 0, done.err
    assert load(cut).model(torch.rand(1, 3, 32, 32)).shape == (1, 10)


def test_training_is_gentle_with_a_trained_network_and_says_so_if_it_was_not(micronet, chain, tmp_path):
    path = tmp_path / "s.safetensors"
    ask = ["sparse-train", chain / "float.safetensors", "--epochs", 1, "--limit", 160, "--force", "-o", path]
    harsh = micronet(*ask, "--lr", 0.5)
    said = r"the validation accuracy was \S+ before the training and is \S+ now; .*--lr 0.05, or "
    assert re.search(f"{said}a smaller --s", harsh.err), harsh.err
    assert micronet(*ask).code == 0
    assert micronet("inspect", path, "--json").json["history"][-1]["config"]["lr"] == 0.005


@pytest.mark.parametrize("criterion", ["l1", "l2"])
def test_sparse_training_pushes_weights_too(micronet, chain, tmp_path, criterion):
    paths = [tmp_path / name for name in ("none.safetensors", "much.safetensors")]
    for path, s in zip(paths, (0, 0.01), strict=True):
        few = ["--epochs", 1, "--limit", 160, "--lr", 0.01, "--s", s, "--criterion", criterion]
        assert micronet("sparse-train", chain / "float.safetensors", *few, "-o", path).code == 0
    free, pushed = (load(path).model.features[1].conv.weight.abs().mean() for path in paths)
    assert pushed < 0.97 * free
    refused = micronet("sparse-train", chain / "float.safetensors", *few, "--optimizer", "muon", "-o", tmp_path / "no")
    assert refused.code == 2 and "Muon keeps their norms constant; add --optimizer adam" in refused.err


def test_a_network_of_ones_own_needs_its_input_shape(micronet, tmp_path):
    path = tmp_path / "own.safetensors"
    api.save(fresh(), path, build="tests.cli.test_pruning_options:fresh")
    ask = ["prune", path, "--trust-code", "-o", tmp_path / "p.safetensors"]
    assert "cannot run on the example input" in micronet(*ask).err
    assert "channels,height,width" in micronet(*ask, "--input-shape", "1x9x9").err
    assert "specify one with --data" in micronet(*ask, "--input-shape", "1,9,9", "--criterion", "taylor").err
    done = micronet(*ask, "--input-shape", "1,9,9", "--json")
    assert done.code == 0, done.err
    assert done.json["after"]["macs"] < done.json["before"]["macs"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epochs", 3], "add --steps 1"),
        (["--steps", 2, "--dry-run"], "drop one of them"),
        (["--plot", "a.png"], "--sensitivity"),
        (["--steps", -1], "0 to 1000"),
        (["--widths", "1,2"], "this network needs 8"),
        (["--percent", 0.5, "--target-params", 0.5], "--percent and --target-params both set how much"),
        (["--sensitivity", "--percent", 0.3], "drop --percent"),
        (["--steps", 1, "--measure"], "--measure cannot be combined"),
        (["--measure", "--skip-timing"], "drop one of them"),
        (["--widths", "8,8,8,8,8,8,8,8", "--min-channels", 8], "--min-channels has no effect"),
    ],
)
def test_options_without_use_are_answered(micronet, chain, tmp_path, options, message):
    done = micronet("prune", chain / "float.safetensors", *options, "-o", tmp_path / "p.safetensors")
    assert done.code == 2
    assert message in done.err
