"""How long work in the core tells whoever asked for it how far it is; the core itself never prints."""

from typing import Protocol


class Progress(Protocol):
    """Called often; implementations decide what to show."""

    def step(self, label: str, done: int, total: int, **numbers: float) -> None:
        """Report ``done`` of ``total`` steps of the work called ``label``."""

    def line(self, text: str) -> None:
        """Report one finished piece of work, worth keeping on the screen."""


class Silent:
    """Reports nothing."""

    def step(self, label: str, done: int, total: int, **numbers: float) -> None:
        """Ignore it."""

    def line(self, text: str) -> None:
        """Ignore it."""
