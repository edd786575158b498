"""A teacher in memory teaches what the same teacher in a file teaches."""

from pathlib import Path

import torch
from torch import nn

import micronet
from micronet.artifact.artifact import Artifact, weights_hash
from micronet.data.dataset import DataSpec
from micronet.models.build import ModelSpec
from micronet.training.config import RunContext, TrainConfig
from micronet.training.distillation import load_teacher


def test_a_teacher_may_be_in_memory(tmp_path):
    inputs, labels = torch.rand(48, 3, 12, 12), torch.arange(48) % 4
    how = {"data": (inputs, labels), "epochs": 1, "batch_size": 16}
    teacher = micronet.train(model="nin", width=0.1, output=tmp_path / "teacher.safetensors", **how)
    before = weights_hash(teacher.model)
    taught = [
        micronet.finetune(teacher, distill=each, distill_weight=0.9, **how)
        for each in (teacher, tmp_path / "teacher.safetensors")
    ]
    alone = micronet.finetune(teacher, **how)
    hashes = [weights_hash(each.model) for each in (*taught, alone)]
    assert hashes[0] == hashes[1] != hashes[2]
    assert weights_hash(teacher.model) == before


def test_a_classifier_teaches_its_outputs_where_the_task_has_no_classes():
    teacher, path = Artifact(nn.Flatten(), ModelSpec("flat"), [], data={"classes": ["a"]}), Path("teacher.safetensors")
    run = RunContext(Path("a.safetensors"), torch.device("cpu"), artifacts={path: teacher})
    assert load_teacher(TrainConfig(distill=path), teacher, DataSpec(task="agreement"), run) is not None
