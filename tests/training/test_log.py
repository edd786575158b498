"""Where the metrics of trainings go."""

import json
import sys
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest

from micronet.errors import FailedError, MicronetError
from micronet.training import log
from micronet.training.log import MetricsLog

ROWS = [{"epoch": 1, "loss": 2.0}, {"epoch": 2, "loss": 1.0}]


def test_a_tracker_that_is_not_installed_is_refused_before_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr(log, "find_spec", lambda name: None)
    for name in log.TRACKERS:
        with pytest.raises(MicronetError, match=f"--log {name}: {name} is not installed; run pip install {name}"):
            MetricsLog(tmp_path / "a.safetensors", name)
    MetricsLog(tmp_path / "a.safetensors", "none").write(ROWS)
    assert [json.loads(line) for line in (tmp_path / "a.metrics.jsonl").read_text().splitlines()] == ROWS


def test_a_tracker_that_fails_later_ends_the_training_in_one_line(tmp_path, monkeypatch):
    class Tracker:
        def __init__(self, output):
            pass

        def add(self, row):
            if row["epoch"] == 2:
                raise ConnectionError("the server is away")

    monkeypatch.setitem(log.TRACKERS, "tensorboard", Tracker)
    monkeypatch.setattr(log, "find_spec", lambda name: name)
    metrics = MetricsLog(tmp_path / "a.safetensors", "tensorboard")
    metrics.write(ROWS[:1])
    with pytest.raises(FailedError, match="--log tensorboard: the server is away; continue with --resume"):
        metrics.write(ROWS)


def test_mlflow_gets_each_epoch_once(tmp_path, monkeypatch):
    logged = []

    @contextmanager
    def start_run(run_name):
        yield SimpleNamespace(info=SimpleNamespace(run_id=run_name))

    module = ModuleType("mlflow")
    module.__spec__ = ModuleSpec("mlflow", None)
    module.start_run = start_run
    module.MlflowClient = lambda: SimpleNamespace(log_metric=lambda *values, step: logged.append((*values, step)))
    monkeypatch.setitem(sys.modules, "mlflow", module)
    metrics = MetricsLog(tmp_path / "a.safetensors", "mlflow")
    for end in (1, 2):
        metrics.write(ROWS[:end])
    metrics.close()
    assert logged == [("a", "epoch", 1, 1), ("a", "loss", 2.0, 1), ("a", "epoch", 2, 2), ("a", "loss", 1.0, 2)]
