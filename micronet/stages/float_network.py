"""The float network that ``quantize`` trains if it is given none."""

from dataclasses import replace
from pathlib import Path

from micronet.artifact.artifact import Artifact, load
from micronet.core.files import check_output_path
from micronet.errors import MicronetError
from micronet.stages.quantize import Quantize
from micronet.stages.train import fit_new, keep
from micronet.training import distributed
from micronet.training.config import RunContext, TrainConfig


def float_artifact(config: Quantize, run: RunContext) -> tuple[Artifact, Path]:
    """Train the float network if none is given, and keep it beside the output; return it and its path."""
    model = config.model
    path = run.output.with_name(f"{run.output.stem}-float.safetensors")
    if run.resume and distributed.from_rank_zero(path.exists):
        artifact = load(path, model.model if ":" in model.name else None)
        if artifact.spec.name != model.name:
            raise MicronetError(
                f"{path} is a {artifact.spec.name} network, not {model.name}; choose another output with -o, or add "
                "--force"
            )
        return artifact, path
    distributed.from_rank_zero(lambda: check_output_path(path, run.force))
    artifact = fit_new(model, config.data, TrainConfig(), replace(run, output=path))
    keep(artifact, path)
    tested = {name: value for name, value in artifact.metrics.items() if name not in ("test_images", "test_loss")}
    main = next(name for name in tested if name.startswith("test_"))
    value = f"{tested[main]:.2%}" if main == "test_accuracy" else f"{tested[main]:.4f}"
    run.progress.line(f"wrote {path}  {main.replace('_', ' ')} {value}")
    return artifact, path
