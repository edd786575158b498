"""The ``import`` stage: any network becomes an artifact."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from micronet.core.config import group, setting
from micronet.core.image_size import spell_size
from micronet.errors import MicronetError
from micronet.stages.config import DataConfig, ModelConfig, OutputConfig
from micronet.stages.stage import Context, Outcome, Stage

if TYPE_CHECKING:
    from micronet.artifact.artifact import Artifact
    from micronet.data.dataset import DataSpec


@dataclass(frozen=True)
class Import(Stage):
    """Makes an artifact of a network from elsewhere."""

    name = "import"
    details = (
        "Imports torchvision networks, networks built by your own factory function, and checkpoints from the "
        "original micronet (2021)."
    )
    example = (
        "micronet import --model torchvision:resnet18 --model-args '{\"num_classes\": 10}' -o resnet18.safetensors"
    )
    begins = True
    leads_to = "quantize --mode ptq"
    optional_data = True

    weights: Path | None = setting(
        None, "Weights file (.safetensors, .pth, .pt). Default: random initial weights from --seed.", basic=True
    )
    mean: str | None = setting(
        None,
        "Per-channel mean for input normalization (pixels are scaled to 0..1), for example 0.485,0.456,0.406.",
        basic=True,
    )
    std: str | None = setting(
        None, "Per-channel standard deviation for input normalization, for example 0.229,0.224,0.225.", basic=True
    )
    seed: int = setting(1, "Seed for the initial weights.", low=0, high=2**31)
    model: ModelConfig = group(ModelConfig)
    data: DataConfig = group(DataConfig)
    output: OutputConfig = group(OutputConfig)

    def run(self, context: Context) -> Outcome:
        """Build the network and fill it."""
        from micronet.artifact.foreign import import_model, preprocessing
        from micronet.data.load import load_data
        from micronet.models.calling import take_in_order
        from micronet.models.precision import WAY_ON, half_precision
        from micronet.stages.inputs import with_grey
        from micronet.stages.words import describe_inputs
        from micronet.tasks.task import CLASSIFICATION
        from micronet.training.fits import check_model_fits

        model, data = self.model, self.data
        arguments = model.arguments if model.width is None else {"width": model.width, **model.arguments}
        imported = import_model(model.name, arguments, self.weights, self.seed)
        if found := half_precision(imported.model):
            context.progress.line(f"{found}, but prune and quantize need float32; {WAY_ON}")
        spec = preprocessing(model.name, self.mean, self.std)
        if data.data is not None:
            dataset = load_data(
                data.data, image_size=data.image_size, limit=data.limit, like=spec, task=data.task,
                network=imported.model,
            )  # fmt: skip
            if spec.channels is None and spec.mean is None:
                dataset = with_grey(dataset, spec, imported.model, data)
            spec = dataset.spec
            if self.mean is not None and spec.inputs is not None:
                raise MicronetError(
                    "--mean and --std have no effect, because only images are normalized, and the inputs are "
                    f"{describe_inputs(spec.inputs)}; drop them"
                )
            take_in_order(imported.model, spec.inputs)
            if spec.task != CLASSIFICATION:
                check_model_fits(imported.model, dataset)
        artifact = replace(imported, data=spec.to_json())
        return Outcome(artifact, {"data": spec.name, **_described(artifact, spec)})


def _described(artifact: "Artifact", spec: "DataSpec") -> dict[str, Any]:
    """Return the network, its MACs for one sample of the recorded size, and the input they are for."""
    from micronet.evaluation.cost import count_macs
    from micronet.models.device import head
    from micronet.stages.inputs import example_input
    from micronet.stages.words import describe_inputs, describe_network

    network = describe_network(artifact)
    if spec.inputs is None and (spec.image_size is None or spec.channels is None):
        return {"network": network, "macs": None}
    size = f"{spec.channels}x{spell_size(spec.image_size or 0)}"
    try:
        macs = count_macs(artifact.model, head(example_input(artifact), 1))
    except Exception:  # a forward may raise anything; the next command says what does not fit
        macs = None
    return {"network": network, "macs": macs, "input": size if spec.inputs is None else describe_inputs(spec.inputs)}
