"""What ``quantize`` says before it works on a network whose forward cannot be traced."""

from torch import nn

from micronet.core.progress import Progress
from micronet.errors import MicronetError
from micronet.graph.record import describe_example, record_network
from micronet.graph.trace import trace_modes
from micronet.models.device import Example, as_inputs
from micronet.models.inputs import make_inputs
from micronet.models.modes import copy_model


def warn_untraced(model: nn.Module, example: Example | None, progress: Progress) -> bool:
    """Say why a network cannot be traced, and what follows; return True if so."""
    if example is None or trace_modes(model) is not None:
        return False
    inputs = as_inputs(model, example)
    try:
        for given in (inputs, make_inputs(describe_example(inputs))):  # a restored network is recorded on the latter
            record_network(copy_model(model), given)
    except MicronetError as error:
        progress.line(
            f"warning: {error}; as it is, only the weights and the inputs of its layers are quantized, and the network "
            "cannot be exported"
        )
        return True
    return False
