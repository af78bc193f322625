"""Image classifiers from pretrained backbones: a new linear head, or the head of the model's own class."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ....messages import first_line, quiet_transformers

if TYPE_CHECKING:  # transformers takes seconds to import, and the images are checked without it
    from transformers.modeling_outputs import ImageClassifierOutput

POOLINGS: dict[str, Callable[[Any], Tensor]] = {
    "cls": lambda output: output.last_hidden_state[:, 0],
    "mean": lambda output: output.last_hidden_state[:, 1:].mean(dim=1),
    "pooler": lambda output: output.pooler_output.flatten(1),
}
"""What the head sees of a backbone's output, (b, width). Token 0 is the class token."""


class ImageClassifier(nn.Module):
    """A backbone and a linear head.

    Attributes:
        backbone: its output has `last_hidden_state` (b, 1 + patches, width), or `pooler_output` for "pooler".
        head: the new layer.
        pooling: a key of `POOLINGS`.
        config: the backbone's.
        base_model_prefix: where it is, as PEFT asks of a model whose configuration is one of transformers.
    """

    base_model_prefix = "backbone"

    def __init__(self, backbone: nn.Module, classes: int, pooling: str) -> None:
        super().__init__()
        self.config: Any = backbone.config
        self.backbone, self.pooling = backbone, pooling
        self.head = nn.Linear(feature_width(self.config), classes)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        """Logits (b, classes), and the mean cross-entropy if there are labels (b,).

        Args:
            pixel_values: (b, 3, height, width), normalised.
            labels: class indices.
        """
        from transformers.modeling_outputs import ImageClassifierOutput

        logits = self.head(POOLINGS[self.pooling](self.backbone(pixel_values=pixel_values)))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


def feature_width(config: Any) -> int:
    """Features that a backbone gives to the head."""
    return config.hidden_size if hasattr(config, "hidden_size") else config.hidden_sizes[-1]


def folder_or_name(model: str) -> str:
    """Return what `from_pretrained` takes: "sample:dinov2" is a folder of a package, anything else is as given."""
    if not model.startswith("sample:"):
        return model
    if model != "sample:dinov2":
        raise ValueError(f"task.model: {model!r} is not known; the sample for images is 'sample:dinov2'")
    from ..samples.models import dinov2_folder

    return str(dinov2_folder())


def load_config(model: str) -> Any:
    """The model's configuration.

    Raises:
        ValueError: if there is no such model; says what was tried.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder_or_name(model))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model {model!r}: cannot be loaded ({first_line(error)}); expected a folder or a hub name"
        ) from error


def check_backbone(model: str, size: int, feature_layer: int | None) -> None:
    """Return whether the model exists, and has that layer and patches that fit the images' size.

    Raises:
        ValueError: if not; says which values do.
    """
    config = load_config(model)
    patch = getattr(config, "patch_size", None)
    if isinstance(patch, int) and size % patch:
        near = max(patch, round(size / patch) * patch)
        raise ValueError(f"task.size: expected a multiple of the model's patches of {patch}, got {size}; take {near}")
    layers = getattr(config, "num_hidden_layers", None)
    if feature_layer is not None and not (layers and feature_layer <= layers):
        raise ValueError(f"task.feature_layer: expected 1 to {layers}, the layers of {model!r}, got {feature_layer}")


def build_classifier(
    model: str, names: tuple[str, ...], *, pooling: str, feature_layer: int | None, head_std: float, seed: int
) -> nn.Module:
    """The pretrained model in float32 with a new head, weights ~ N(0, head_std²) under `seed`, biases 0.

    The classes are named in its configuration. Global random generators are left as found.

    Args:
        model: hub name, folder, or "sample:dinov2".
        names: of the classes.
        pooling: a key of `POOLINGS`, or "own" for the class of `AutoModelForImageClassification`.
        feature_layer: the backbone ends after this layer; None for all layers.

    Raises:
        ValueError: if there is no such model, or weights that `pooling` needs are not in it.
    """
    from transformers import AutoModel, AutoModelForImageClassification

    load_config(model)
    name = folder_or_name(model)
    options: dict[str, Any] = {} if feature_layer is None else {"num_hidden_layers": feature_layer}
    options |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    with torch.random.fork_rng(), quiet_transformers():
        torch.manual_seed(seed)
        if pooling == "own":
            built: nn.Module = AutoModelForImageClassification.from_pretrained(
                name, num_labels=len(names), ignore_mismatched_sizes=True, **options
            )
        else:
            backbone, info = AutoModel.from_pretrained(name, output_loading_info=True, **options)
            if pooling == "pooler" and any("pooler" in key for key in info["missing_keys"]):
                raise ValueError(f"model {model!r} comes without its pooler's weights; take pooling 'cls' or 'mean'")
            built = ImageClassifier(backbone, len(names), pooling)
        draw_head(built, new_modules(model, pooling), head_std)
    return built.float()


def draw_head(model: nn.Module, heads: tuple[str, ...], std: float) -> None:
    """Draw the linear layers of the new modules: weights ~ N(0, std²), biases 0 (the paper, appendix A: σ = 2e-5)."""
    for head in heads:
        for module in model.get_submodule(head).modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=std)
                nn.init.zeros_(module.bias)


def new_modules(model: str, pooling: str) -> tuple[str, ...]:
    """Names of what is new in `build_classifier`'s model: "head", or the own class's modules beside its backbone."""
    if pooling != "own":
        return ("head",)
    from transformers import AutoModelForImageClassification

    config = load_config(model)
    with torch.device("meta"), quiet_transformers():
        shell: Any = AutoModelForImageClassification.from_config(config)
    return tuple(
        name
        for name, module in shell.named_children()
        if name != shell.base_model_prefix and any(True for _ in module.parameters())
    )


def tiny_backbone(folder: Path, swiglu: bool = False) -> None:
    """Write a random DINOv2 of 3 layers (hidden size 24, patches of 14); `swiglu`: with its giant's gated MLP."""
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        mlp_ratio=2,
        patch_size=14,
        image_size=28,
        use_swiglu_ffn=swiglu,
        initializer_range=0.2,
        architectures=["Dinov2Model"],
    )
    with torch.random.fork_rng(), quiet_transformers():
        torch.manual_seed(0)
        Dinov2Model(config).save_pretrained(folder)
