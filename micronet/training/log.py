"""The metrics of every epoch: JSON lines beside the artifact, and TensorBoard if it is installed."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from micronet.errors import FailedError
from micronet.training import distributed


class MetricsLog:
    """The log files of a training, which only rank 0 writes, from the end of the first epoch.

    ``output``: the artifact's path; ``rows``: the metrics of earlier epochs if a training is resumed.
    """

    def __init__(self, output: Path, rows: list[dict[str, Any]]) -> None:
        self._path, self._mode = output.with_name(f"{output.stem}.metrics.jsonl"), "w"
        self._unwritten = list(rows)
        self._board: Any = None
        if distributed.rank() == 0:
            with suppress(ImportError):
                from torch.utils.tensorboard import SummaryWriter

                self._board = SummaryWriter(str(output.with_name(f"{output.stem}.tensorboard")))

    def append(self, row: dict[str, Any]) -> None:
        """Add the metrics of one epoch."""
        if distributed.rank() > 0:
            return
        self._unwritten.append(row)
        try:
            with self._path.open(self._mode, encoding="utf-8") as file:
                file.writelines(json.dumps(each) + "\n" for each in self._unwritten)
        except OSError as error:
            raise FailedError(
                f"{self._path} could not be written ({error.strerror or error}); free some space, then add --resume"
            ) from error
        self._unwritten, self._mode = [], "a"
        if self._board is not None:
            for name, value in row.items():
                self._board.add_scalar(name, value, row["epoch"])

    def close(self) -> None:
        """Write what is buffered and close the files."""
        if self._board is not None:
            self._board.close()
