"""How long work reports its progress; only the command line prints."""

from typing import Protocol


class Progress(Protocol):
    """Receives progress. It is called often; implementations decide what to show."""

    def step(self, label: str, done: int, total: int, **numbers: float) -> None:
        """Report that ``done`` of ``total`` steps of the work called ``label`` are done, with current metrics."""

    def line(self, text: str) -> None:
        """Report a line that stays on the screen."""


class Silent:
    """Progress that shows nothing."""

    def step(self, label: str, done: int, total: int, **numbers: float) -> None:
        """Do nothing."""

    def line(self, text: str) -> None:
        """Do nothing."""
