"""How the progress of a search is passed on: with the time that its work takes, and without the lines of stages."""

from micronet.compression.notes import Notes
from micronet.core.progress import Progress


class Beating:
    """Progress that keeps the notes of how long its work has taken."""

    def __init__(self, progress: Progress, notes: Notes) -> None:
        self._progress, self._notes = progress, notes
        self.line = progress.line

    def step(self, label: str, done: int, total: int, **numbers: float) -> None:
        """Pass a step on."""
        self._notes.beat()
        self._progress.step(label, done, total, **numbers)


class Steps:
    """Progress of a candidate's stages: their bars, without their lines."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def step(self, label: str, done: int, total: int, **numbers: float) -> None:
        """Pass a step on."""
        self._progress.step(label, done, total, **numbers)

    def line(self, text: str) -> None:
        """Leave a line out."""
