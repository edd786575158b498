"""The checks of the stages, called through the Python API with ``device=``, and of a training loop of one's own."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.nn import functional as F

import micronet
from micronet.evaluation import latency
from tests.devices.network import DATA, FACTORY, batches, dataset, trained
from tests.devices.table import FLOAT, LEVEL, Outcome, check, outcome

TRAINING: dict[str, Any] = {"epochs": 1, "batch_size": 16, "lr": 0.02, "optimizer": "sgd"}


@check("stages float", FLOAT)
def float_stages(device: torch.device, folder: Path) -> Outcome:
    """Train, train with a penalty, and prune by gradients in two steps."""
    place = {"device": str(device), "data": DATA, **TRAINING}
    net = micronet.train(model=FACTORY, **place)
    sparse = micronet.sparse_train(net, criterion="l2", s=0.01, **place)
    pruned = micronet.prune(sparse, criterion="taylor", percent=0.4, steps=2, **place)
    return outcome(pruned.model, loss=pruned.metrics["test_loss"])


@check("stages qat", LEVEL)
def qat_stages(device: torch.device, folder: Path) -> Outcome:
    """Quantize and train, train on with frozen ranges, fuse and evaluate."""
    place = {"device": str(device), "data": DATA, **TRAINING}
    trained_on = micronet.quantize(trained(device), w_bits=4, **place)
    qaft = micronet.quantize(trained_on, mode="qaft", **place)
    fused = micronet.fuse(qaft)
    with patch.multiple(latency, WARM_UP_SECONDS=0.0, MEASURE_SECONDS=0.0):
        row = micronet.evaluate(fused, device=str(device), data=DATA)
    return outcome(fused.model, loss=[qaft.metrics["test_loss"], row.loss])


@check("stages ptq", LEVEL)
def ptq_stages(device: torch.device, folder: Path) -> Outcome:
    """Quantize without training, with every recovery, on images in memory."""
    images = [batch.cpu() for batch in batches(device)]
    recovery = {"equalize": True, "bias_correct": True}
    int8 = micronet.quantize(
        trained(device), mode="ptq", w_bits=4, calibrator="mse", data=images, device=str(device), **recovery
    )
    return outcome(int8.model)


@check("own training loop", LEVEL)
def own_loop(device: torch.device, folder: Path) -> Outcome:
    """Prune, quantize, train in a loop of one's own, freeze and fuse a model."""
    pruned = micronet.prune(trained(device), percent=0.25, data=torch.zeros(2, 3, 8, 8))
    quantized = micronet.quantize(pruned, w_bits=4, device=str(device))
    model = quantized.model
    micronet.calibrate(model, batches(device))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model.train()
    with micronet.observing(model):
        for images, labels in zip(batches(device), dataset().train.labels.to(device).split(32), strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
    micronet.freeze(model)
    return outcome(micronet.fuse(quantized).model)


@check("networks in memory", LEVEL)
def in_memory(device: torch.device, folder: Path) -> Outcome:
    """Quantize and fuse a model that is on a device: without ``device=`` it stays there."""
    int8 = micronet.quantize(trained(device), mode="ptq", w_bits=4, data=batches(device))
    fused = micronet.fuse(int8).model
    places = {tensor.device.type for tensor in fused.state_dict().values()}
    assert places == {device.type}, f"the model is on {places}"
    return outcome(fused)
