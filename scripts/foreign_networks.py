"""Other people's networks for ``foreign_zoo``: how each is built, with random weights, and its inputs."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BATCH = 8
WORDS, TOKENS = 8000, 128
Network = tuple[Callable[[], nn.Module], Callable[[], Tensor]]


def _timm(name: str, size: int = 96, **options: Any) -> Network:
    def build() -> nn.Module:
        import timm

        made: nn.Module = timm.create_model(name, num_classes=10, **options)
        return made

    return build, partial(_images, size)


def _torchvision(name: str, size: int = 96, **options: Any) -> Network:
    def build() -> nn.Module:
        import torchvision

        made: nn.Module = torchvision.models.get_model(name, weights=None, **options)
        for parameter in made.parameters():  # the head of vit starts at zero
            if parameter.dim() > 1 and not parameter.any():
                nn.init.normal_(parameter, std=0.02)
        return made

    return build, partial(_images, size)


def _segmentation(name: str) -> Network:
    build, _ = _torchvision(name, weights_backbone=None, num_classes=21)
    return lambda: _Output(build(), "out"), partial(_images, 96)


def _yolo(name: str) -> Network:
    def build() -> nn.Module:
        from ultralytics.nn.tasks import DetectionModel

        model = DetectionModel(f"{name}.yaml", nc=10, verbose=False)
        model.model[-1].export, model.model[-1].format = True, "onnx"
        return model

    return build, partial(_images, 128)


def _smp(kind: str, encoder: str) -> Network:
    def build() -> nn.Module:
        import segmentation_models_pytorch as smp

        made: nn.Module = getattr(smp, kind)(encoder, encoder_weights=None, classes=3)
        return made

    return build, partial(_images, 64)


def _transformers(kind: str, draw: Callable[[], Tensor], **options: Any) -> Network:
    """Return a network of Hugging Face's by the name of its class; its configuration's has the same first part."""

    def build() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{kind.partition('For')[0].removesuffix('LMHeadModel')}Config")(**options)
        return _Output(getattr(transformers, kind)(config), 0)

    return build, draw


def _images(size: int) -> Tensor:
    """Return random images that are smooth like photographs, (BATCH, 3, size, size)."""
    coarse = sum(F.interpolate(torch.randn(BATCH, 3, n, n), (size, size), mode="bilinear") for n in (2, 5, 12, size))
    return coarse * 0.5  # type: ignore[no-any-return]


def _tokens() -> Tensor:
    """Return random tokens, (BATCH, TOKENS)."""
    return torch.randint(0, WORDS, (BATCH, TOKENS))


def _sound() -> Tensor:
    """Return a second of noise, (BATCH, 16000)."""
    return torch.randn(BATCH, 16_000)


class _Output(nn.Module):
    """A network that returns one output of several."""

    def __init__(self, network: nn.Module, key: int | str) -> None:
        super().__init__()
        self.network, self.key = network, key

    def forward(self, x: Tensor) -> Tensor:
        """Return the output."""
        out: Tensor = self.network(x)[self.key]
        return out


TEXT = {"vocab_size": WORDS, "use_cache": False}
NETWORKS: dict[str, Network] = {
    **{
        f"timm {name}": _timm(name)
        for name in (
            "mobilenetv4_conv_small", "repvgg_a0", "lcnet_050", "ese_vovnet19b_dw", "ese_vovnet39b", "efficientnet_b0",
            "efficientnet_lite0", "tf_efficientnet_lite0", "mobilevit_xxs", "convnext_atto", "regnetx_002",
            "regnety_002", "ghostnet_050", "resnet18", "densenet121", "mobileone_s0", "dla34", "hrnet_w18_small",
            "mnasnet_050",
        )
    },
    "timm deit_tiny_patch16_224": _timm("deit_tiny_patch16_224", img_size=96),
    "timm vit_tiny_patch16_224": _timm("vit_tiny_patch16_224", img_size=96),
    "timm swin_tiny_patch4_window7_224": _timm("swin_tiny_patch4_window7_224", size=112, img_size=112),
    **{
        f"torchvision {name}": _torchvision(name, num_classes=10)
        for name in ("mobilenet_v3_small", "efficientnet_b0", "convnext_tiny", "shufflenet_v2_x1_0", "squeezenet1_1")
    },
    "torchvision vit_b_32": _torchvision("vit_b_32", num_classes=10, image_size=96),
    "torchvision lraspp_mobilenet_v3_large": _segmentation("lraspp_mobilenet_v3_large"),
    "ultralytics yolov8n": _yolo("yolov8n"),
    "smp Unet resnet18": _smp("Unet", "resnet18"),
    "smp Unet mobilenet_v2": _smp("Unet", "mobilenet_v2"),
    "transformers BertForSequenceClassification": _transformers(
        "BertForSequenceClassification", _tokens, vocab_size=WORDS, num_hidden_layers=4
    ),
    "transformers GPT2LMHeadModel": _transformers("GPT2LMHeadModel", _tokens, n_layer=4, **TEXT),
    "transformers LlamaForCausalLM": _transformers(
        "LlamaForCausalLM", _tokens, hidden_size=512, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4,
        intermediate_size=1536, **TEXT,
    ),
    "transformers ViTForImageClassification": _transformers(
        "ViTForImageClassification", partial(_images, 224), hidden_size=384, num_hidden_layers=4, num_attention_heads=6,
        intermediate_size=1536,
    ),
    "transformers SegformerForSemanticSegmentation": _transformers(
        "SegformerForSemanticSegmentation", partial(_images, 128), num_labels=20
    ),
    "transformers Wav2Vec2ForSequenceClassification": _transformers(
        "Wav2Vec2ForSequenceClassification", _sound, hidden_size=384, num_hidden_layers=4, num_attention_heads=6,
        intermediate_size=1536,
    ),
}  # fmt: skip
