"""A user's own task: its loss trains, its main metric chooses and is compared, its mistakes end in one line."""

import json

import numpy as np
import pytest

from micronet.tasks.task import load_task

FILE = "tests/tasks/detector.py"
OWN = ["--model", f"{FILE}:Finder", "--task", f"{FILE}:Find"]


def test_a_users_task_trains_prunes_quantizes_and_compares(tmp_path, micronet):
    plain, thin, int8 = (tmp_path / f"{name}.safetensors" for name in ("a", "p", "q"))
    done = micronet("train", *OWN, "--data", "anywhere", "--epochs", "6", "--batch-size", "4", "-o", plain, "--json")
    assert done.code == 0
    assert done.json["test_misses"] < 0.1 and done.json["test_seen"] == done.json["test_images"] == 40
    log = [json.loads(line) for line in plain.with_suffix(".metrics.jsonl").read_text().splitlines()]
    best = min(log, key=lambda row: (row["validation_misses"], row["validation_loss"]))
    assert done.json["epoch"] == best["epoch"]
    assert micronet("prune", plain, *OWN, "--percent", "0.25", "--criterion", "taylor", "-o", thin).code == 0
    assert micronet("quantize", plain, *OWN, "--mode", "ptq", "-o", int8).code == 0
    rows = json.loads(micronet("compare", plain, int8, *OWN, "--json").out)["rows"]
    assert rows[1]["drop"] == rows[1]["metrics"]["misses"] - rows[0]["metrics"]["misses"]
    untold = ["--percent", "0.25", "--criterion", "l2", "--skip-timing", "-o", tmp_path / "n.safetensors"]
    said = micronet("prune", plain, *OWN[:2], *untold).out.splitlines()[-1]
    assert said.startswith("next: ") and said.endswith(f"--task {FILE}:Find")
    untold = micronet("evaluate", plain, "--model", f"{FILE}:Finder")
    assert untold.code == 2 and f"add --task {FILE}:Find" in untold.err


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("none", "generates images, but this network takes float32 1x6x6; pass inputs with --calib-data"),
        (".", "holds no inputs of this network, float32 1x6x6; specify an .npz file"),
        ("x.npz", "the network does not accept float32 (N, 2, 6, 6) at "),
    ],
)
def test_calibration_inputs_that_a_users_network_does_not_take_are_refused(place, message, tmp_path, micronet):
    plain = tmp_path / "a.safetensors"
    np.savez(tmp_path / "x.npz", x=np.zeros((3, 2, 6, 6), np.float32))
    place = tmp_path / place if place == "x.npz" else place
    assert micronet("import", *OWN, "--data", "anywhere", "-o", plain).code == 0
    done = micronet("quantize", plain, *OWN, "--mode", "ptq", "--calib-data", place, "-o", tmp_path / "q.safetensors")
    assert done.code == 2 and message in done.err.splitlines()[-1]


def test_a_users_accuracy_is_one_of_its_metrics_and_its_samples_are_no_images(tmp_path, micronet):
    plain = tmp_path / "a.safetensors"
    own = ["--model", f"{FILE}:Finder", "--task", f"{FILE}:Hits"]
    done = micronet("train", *own, "--data", "anywhere", "--epochs", "1", "-o", plain)
    assert done.code == 0 and " samples/s" in done.err and " on 40 samples" in done.out
    shown = [done, micronet("evaluate", plain, *own), micronet("compare", plain, plain, *own, "--skip-timing")]
    assert all(each.code == 0 and "image" not in f"{each.err}{each.out}" for each in shown)
    assert all("accuracy" in each.out and "misses" in each.out for each in shown[1:])
    assert "latency, 64 samples" in shown[1].out and "40 test samples" in shown[2].out


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("import", ["--mean", "0.5", "--std", "0.5"], "only images are normalized, and the inputs are float32 1x6x6"),
        ("train", ["--epochs", "0", "--label-smoothing", "0.1"], "--label-smoothing has no effect on the loss of"),
    ],
)
def test_options_without_effect_on_a_users_task_are_refused(command, options, message, tmp_path, micronet):
    done = micronet(command, *OWN, "--data", "anywhere", *options, "-o", tmp_path / "a.safetensors")
    assert done.code == 2 and message in done.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("Broken", "loss failed (AttributeError: 'list' object has no attribute 'sum'); the network returned float32 "
                   "(N, 1, 6, 6) and float32 (N, 2, 6, 6)"),
        ("NoNumbers", "it must return a dict that contains misses"),
        ("Half", "has no method update(outputs, targets) or compute()"),
        ("Missing", "allowed: Find"),
    ],
)  # fmt: skip
def test_mistakes_in_a_users_task_end_in_one_line(task, message, tmp_path, micronet):
    train = ["train", "--model", f"{FILE}:Finder", "--task", f"{FILE}:{task}", "--data", "x", "--epochs", "1"]
    done = micronet(*train, "-o", tmp_path / "a.safetensors")
    assert done.code == 2 and message in done.err.splitlines()[-1]


def test_the_last_word_of_a_metric_or_the_users_list_says_that_less_is_better(tmp_path):
    task = load_task("segmentation")
    assert [task.prefers_more(name) for name in ("mean_iou", "iou_flower", "mae", "test/rmse", "loss")] == [
        True, True, False, False, False,
    ]  # fmt: skip
    (tmp_path / "task.py").write_text(
        "class Task:\n main, lower_is_better = 'gap', ('gap', 'span')\n"
        " data = loss = update = compute = lambda self, *_: None\n"
    )
    own = load_task(f"{tmp_path / 'task.py'}:Task")
    assert not own.higher_is_better and own.quality({"gap": 2.0}) == -2.0
    assert not own.prefers_more("span") and own.prefers_more("auc")
