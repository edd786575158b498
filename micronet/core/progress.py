"""How long work reports its progress; only the command line prints."""

from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar

T = TypeVar("T")


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


def reported(items: Sequence[T], label: str, progress: Progress) -> Iterator[T]:
    """Yield items, and report before each one how many are done."""
    for done, item in enumerate(items):
        progress.step(label, done, len(items))
        yield item
