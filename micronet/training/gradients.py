"""Gradients of a loss."""

from torch import Tensor

from micronet.errors import MicronetError


def add_gradients(loss: Tensor) -> None:
    """Add a loss's gradients to those of the parameters.

    Raises MicronetError if the forward has overwritten a tensor that they are computed from.
    """
    try:
        loss.backward()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        raise MicronetError(
            "the network has no gradients, because forward() overwrites a tensor that they are computed from; use "
            "operations that are not in place, such as ReLU() for ReLU(inplace=True)"
        ) from error
