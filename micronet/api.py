"""The stages as functions on any ``torch.nn.Module``, around any training loop."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from micronet.artifact import artifact as artifacts
from micronet.artifact.history import StageRecord, check_order
from micronet.core.files import check_output_path
from micronet.errors import unknown
from micronet.models.build import ModelSpec, make_spec
from micronet.pruning.config import PruneConfig
from micronet.models.inputs import Example
from micronet.pruning.prune import prune_model
from micronet.quantization.config import QuantConfig
from micronet.quantization.fold import fold_model
from micronet.quantization.quantize import quantize_model

_HISTORY = "_micronet_history"  # a plain attribute of a model: the records of what was done to it


def quantize(model: nn.Module, **config: Any) -> nn.Module:
    """Return a copy of a float model with quantizers placed.

    ``config``: the fields of ``QuantConfig`` (``w_bits=8, a_bits=8, q_type="sym", …``). Give the quantizers their
    ranges with ``calibrate(model, batches)`` or by training inside ``observing(model)``.
    Raises MicronetError for an impossible config or a model with nothing to quantize.
    """
    check_order(history(model), "quantize")
    return _extend(model, *quantize_model(model, _config(QuantConfig, config)))


def prune(
    model: nn.Module,
    example_input: Example,
    *,
    cost: Callable[[nn.Module], float] | None = None,
    in_place: bool = False,
    **config: Any,
) -> nn.Module:
    """Return a copy of a float model with channels cut, which goes on training as it is.

    ``example_input``: a batch, or a tuple of a model's several inputs; from its shapes follows which channels belong
    together, and on it the copy is held against the whole model with the cut channels silenced.
    ``cost``: what a network costs, for ``target_latency``. ``in_place``: cut ``model`` itself and return it; its
    parameters are new ones, so make the optimizer afterwards.
    ``config``: the fields of ``PruneConfig`` (``percent=0.5, regular=8, criterion="l2"``).
    Raises MicronetError for an impossible config or a model that cannot be traced.
    """
    check_order(history(model), "prune")
    pruned, record, _ = prune_model(model, _config(PruneConfig, config), example_input, cost, in_place=in_place)
    return _extend(model, pruned, record)


def fuse(model: nn.Module) -> nn.Module:
    """Return a copy of a model with every batch norm folded into the layer before it. Raises as ``bn-fuse`` does."""
    check_order(history(model), "bn-fuse")
    return _extend(model, *fold_model(model, history(model)))


def export_onnx(model: nn.Module, example_input: Tensor, path: str | Path, *, force: bool = False) -> None:
    """Write a model's ONNX file, weights as the integers they are; the batch is dynamic.

    ``example_input``: any input (N, ...), float32. Raises MicronetError where torch cannot export the model, a
    quantizer has no range, or the path is taken.
    """
    from micronet.onnx.export import to_onnx, write_onnx

    check_output_path(Path(path), force, ".onnx")
    artifact = artifacts.Artifact(model, ModelSpec(type(model).__name__, {}), history(model))
    write_onnx(to_onnx(artifact, example_input), Path(path))


def save(
    model: nn.Module, path: str | Path, build: str, args: dict[str, Any] | None = None, *, force: bool = False
) -> None:
    """Write a model as an artifact that every command reads.

    ``build``: how to make the float network again, ``pkg.mod:factory``, ``path/to/file.py:factory`` or one of
    micronet's names; ``args``: the factory's arguments. Raises MicronetError where the path is taken.
    """
    check_output_path(Path(path), force)
    records = history(model)
    if not records or records[0].stage != "import":
        records = [StageRecord("import", {"model": build}), *records]
    artifacts.save(artifacts.Artifact(model, make_spec(build, args), records), Path(path))


def load(path: str | Path, model: str | nn.Module | None = None, *, trust_code: bool = False) -> nn.Module:
    """Read an artifact's model, in eval mode.

    ``model``: a freshly built float network to fill, or the name of the code again, where the network is the user's.
    Raises MicronetError where the file is damaged or does not fit.
    """
    loaded = artifacts.load(Path(path), model, trust_code=trust_code)
    setattr(loaded.model, _HISTORY, loaded.history)
    return loaded.model.eval()


def history(model: nn.Module) -> list[StageRecord]:
    """Return what was done to a model through this API."""
    records: list[StageRecord] = getattr(model, _HISTORY, [])
    return records


def _config(kind: Any, fields: dict[str, Any]) -> Any:
    """Build a config. Raises MicronetError that names the fields there are, where another is given."""
    for name in fields:
        if name not in kind.__dataclass_fields__:
            raise unknown("setting", name, kind.__dataclass_fields__)
    return kind(**fields)


def _extend(before: nn.Module, after: nn.Module, record: StageRecord) -> nn.Module:
    setattr(after, _HISTORY, [*history(before), record])
    return after
