"""Open any network file as a predictor."""

from pathlib import Path

from micronet import registry
from micronet.artifact.kinds import check_file_kind
from micronet.errors import MicronetError
from micronet.evaluation.network import Network
from micronet.runtimes.config import RuntimeOptions


def open_network(path: Path, options: RuntimeOptions) -> Network:
    """Open a file with the runtime for its suffix; raise MicronetError if it is missing, damaged or of another kind."""
    check_file_kind(path, *registry.PREDICTORS)
    if path.suffix not in registry.PREDICTORS:
        raise MicronetError(f"{path}: expected {' or '.join(registry.PREDICTORS)}, got {path.suffix or 'no suffix'}")
    runtime = registry.load_object(registry.PREDICTORS[path.suffix])
    network: Network = runtime(path, options)
    return network
