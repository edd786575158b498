"""Whether a network fits its data, and the memory format in which it does."""

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from micronet.data.batches import eval_batches, resized
from micronet.data.dataset import Dataset
from micronet.evaluation.accuracy import check_scores, evaluating
from micronet.models.device import is_about_format, memory_format, place_inputs, use_contiguous
from micronet.models.modes import random_kept, state_kept
from micronet.tasks.task import outputs_of


def check_model_fits(model: nn.Module, data: Dataset, size: int | None = None, name: str = "the network") -> None:
    """Raise MicronetError if a model does not return what the task expects for a validation image or sample.

    ``size``: the height and width in pixels that the image is scaled to; None: its own. ``name``: what errors call it.
    """
    inputs, _ = next(resized(eval_batches(data.validation, data.spec, batch_size=1), size or data.image_height))
    with evaluating(model) as predict:
        check_scores(predict, inputs, data.spec, name, data.task)


def prepare_training(model: nn.Module, data: Dataset, device: torch.device) -> None:
    """Put a model on a device, in the memory format that its training takes, and check that it fits the data.

    What its forward does in training mode alone, and the user's loss, may need contiguous tensors, too.
    """
    model.to(device).to(memory_format=memory_format(model))
    check_model_fits(model, data)
    if memory_format(model) is torch.contiguous_format:
        model.to(memory_format=torch.contiguous_format)
        return
    given, targets = next(iter(data.referenced(eval_batches(data.validation, data.spec, batch_size=2))))
    try:
        with state_kept(model), random_kept(model), torch.no_grad():
            outputs = outputs_of(model.train()(*place_inputs(given, device, torch.channels_last)))
            data.task.loss(outputs, tree_map_only(torch.Tensor, lambda x: x.to(device), targets))
    except Exception as error:  # whatever a user's forward and loss may raise; the first step will say it
        if is_about_format(error):
            use_contiguous(model)
