"""Where a forward goes another way for other inputs, though it never reads their values in plain sight."""

import traceback
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from micronet.graph.user_lines import user_line
from micronet.models.device import copied
from micronet.models.modes import eval_mode, random_kept, state_kept


def parting_line(model: nn.Module, inputs: tuple[Any, ...], others: tuple[Any, ...]) -> str:
    """Return " at FILE:LINE (code)" for the last line that runs alike for both inputs, or "" if all lines do.

    The branch that differs is in this line, or follows it: for example ``if rows.numel() == 0`` after ``torch.where``.
    """
    one, other = (_Lines.of(model, each) for each in (inputs, others))
    same = 0
    for same, (ours, theirs) in enumerate(zip(one, other, strict=False)):
        if ours != theirs:
            return one[same - 1][1] if same else ""
    return "" if len(one) == len(other) else one[same][1]


class _Lines(TorchFunctionMode):
    """Notes every call of a torch function, and the line of the user's code that it comes from."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, str]] = []

    @classmethod
    def of(cls, model: nn.Module, inputs: tuple[Any, ...]) -> list[tuple[Any, str]]:
        """Return the calls of a forward in eval mode, up to an error if it raises one."""
        lines = cls()
        try:
            with state_kept(model), eval_mode(model), torch.no_grad(), random_kept(model), lines:
                model(*copied(inputs))
        except Exception:  # a user's forward may raise anything
            pass
        return lines.calls

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function, and note it."""
        self.calls.append((func, user_line(traceback.extract_stack())))
        return func(*args, **(kwargs or {}))
