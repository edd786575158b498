"""The metrics of every epoch: JSON lines beside the artifact, and TensorBoard or MLflow."""

import json
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from micronet.errors import FailedError, MicronetError, first_line


class Tracker(Protocol):
    """Where metrics go besides the JSON lines."""

    def add(self, row: dict[str, Any]) -> None:
        """Add an epoch's metrics."""

    def close(self) -> None:
        """Finish its files."""


class TensorBoard:
    """Event files in a folder beside the artifact."""

    def __init__(self, output: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(output.with_suffix(".tensorboard")))

    def add(self, row: dict[str, Any]) -> None:
        """Add an epoch's metrics."""
        for name, value in row.items():
            self._writer.add_scalar(name, value, row["epoch"])
        self._writer.flush()

    def close(self) -> None:
        """Close the files."""
        self._writer.close()


class MLflow:
    """A run where ``MLFLOW_TRACKING_URI`` and ``MLFLOW_EXPERIMENT_NAME`` say, named like the artifact."""

    def __init__(self, output: Path) -> None:
        import mlflow

        self._client: Any = mlflow.MlflowClient()
        with mlflow.start_run(run_name=output.stem) as run:
            self._run_id = run.info.run_id

    def add(self, row: dict[str, Any]) -> None:
        """Add an epoch's metrics."""
        for name, value in row.items():
            self._client.log_metric(self._run_id, name, value, step=row["epoch"])

    def close(self) -> None:
        """Do nothing: the run has ended for MLflow, which takes metrics nevertheless."""


TRACKERS: dict[str, type[TensorBoard | MLflow]] = {"tensorboard": TensorBoard, "mlflow": MLflow}


class MetricsLog:
    """The logs of a training. Nothing is written before the end of the first epoch.

    Args:
        output: The artifact's path.
        tracker: A name in TRACKERS, auto (TensorBoard if it is installed) or none.

    Raises:
        MicronetError: The tracker that is named is not installed.
    """

    def __init__(self, output: Path, tracker: str = "auto") -> None:
        self._output, self._written, self._name = output, 0, tracker
        self._tracker: Tracker | None = None
        if tracker in TRACKERS and find_spec(tracker) is None:
            raise MicronetError(f"--log {tracker}: {tracker} is not installed; run pip install {tracker}")

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
            self._tracker = _open(self._name, self._output)
        self._written = len(rows)
        if self._tracker is not None:
            try:
                self._tracker.add(rows[-1])
            except Exception as error:  # as in _open
                raise _failed(self._name, error) from error

    def close(self) -> None:
        """Close the tracker's files."""
        if self._tracker is not None:
            self._tracker.close()


def _open(name: str, output: Path) -> Tracker | None:
    if name == "auto":
        with suppress(ImportError):
            return TensorBoard(output)
    if name not in TRACKERS:
        return None
    try:
        return TRACKERS[name](output)
    except Exception as error:  # whatever a server or its client raises
        raise _failed(name, error) from error


def _failed(name: str, error: Exception) -> FailedError:
    return FailedError(f"--log {name}: {first_line(error)}; continue with --resume")
