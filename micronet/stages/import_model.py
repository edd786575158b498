"""The ``import`` stage: any network becomes an artifact."""

from dataclasses import dataclass, replace
from pathlib import Path

from micronet.core.config import group, setting
from micronet.stages.config import DataConfig, ModelConfig, OutputConfig
from micronet.stages.stage import Context, Outcome, Stage


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
        from micronet.tasks.task import CLASSIFICATION
        from micronet.training.loop import check_model_fits

        model, data = self.model, self.data
        arguments = model.arguments if model.width is None else {"width": model.width, **model.arguments}
        imported = import_model(model.name, arguments, self.weights, self.seed)
        spec = preprocessing(model.name, self.mean, self.std)
        if data.data is not None:
            dataset = load_data(data.data, image_size=data.image_size, limit=data.limit, like=spec, task=data.task)
            spec = dataset.spec
            if spec.task != CLASSIFICATION:
                check_model_fits(imported.model, dataset)
        return Outcome(replace(imported, data=spec.to_json()), {"data": spec.name})
