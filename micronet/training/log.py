"""The metrics of every epoch: JSON lines beside the artifact, and TensorBoard if it is installed."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from micronet.errors import FailedError


class MetricsLog:
    """The log files of a training, from the end of the first epoch. ``output``: the artifact's path."""

    def __init__(self, output: Path) -> None:
        self._output, self._written = output, 0
        self._board: Any = None

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Add the epochs' metrics that are not written yet; all but the last are older than a resumed training."""
        path = self._output.with_suffix(".metrics.jsonl")
        try:
            with path.open("a" if self._written else "w", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows[self._written :])
        except OSError as error:
            raise FailedError(
                f"{path} could not be written ({error.strerror or error}); free some disk space, then run again with "
                "--resume"
            ) from error
        if not self._written:
            with suppress(ImportError):
                from torch.utils.tensorboard import SummaryWriter

                self._board = SummaryWriter(str(self._output.with_suffix(".tensorboard")))
        self._written = len(rows)
        if self._board is not None:
            for name, value in rows[-1].items():
                self._board.add_scalar(name, value, rows[-1]["epoch"])
            self._board.flush()

    def close(self) -> None:
        """Close TensorBoard's files."""
        if self._board is not None:
            self._board.close()
