"""Image classification: a pretrained backbone with a new linear head, on your own images or on VTAB-1K."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from ....files.public_names import is_local, public_name
from ....messages import counted
from ..labels import describe_classes
from ..scoring import CLASSIFIER_METRICS, classifier_metrics
from ..task import Defaults, Recipe
from ..values import one_of
from .images import LabelledImages, read_images
from .models import build_classifier, check_backbone, new_modules, tiny_backbone
from .pixels import ImageBatches, Pixels
from .settings import VisionSettings, VtabSettings
from .vtab import PARTS, read_vtab

LINEAR_LAYERS = (
    r"re:.*\.(q_proj|k_proj|v_proj|o_proj|out_proj|query|key|value|qkv|output\.dense|intermediate\.dense|"
    r"fc1|fc2|gate_proj|up_proj|down_proj|weights_in|weights_out|pwconv1|pwconv2)"
)
"""Attention (query, key, value, output) and MLP of vision transformers, by the names that transformers gives them."""


Settings = VisionSettings | VtabSettings
Sources = tuple[LabelledImages, LabelledImages]


def read_vision(settings: VisionSettings) -> Sources:
    """Training and held-out images of task "vision"."""
    s = settings
    if s.data.startswith("sample:"):
        train, held_out = sample_images(s.data.removeprefix("sample:")), None
    else:
        train, held_out = read_images(s.data, image=s.image, label=s.label, split=s.split, eval_split=s.eval_split)
    if held_out is None:
        train, held_out = train.split(s.eval_size, s.split_seed)
    return train.limited(s.train_size, s.split_seed), held_out


def sample_images(name: str) -> LabelledImages:
    """Images that packages ship, made square with a white border; see `cntlora.lab.recipes.samples.pictures`.

    Raises:
        ValueError: for an unknown name.
        RuntimeError: if they cannot be downloaded.
    """
    from ..samples import pictures

    samples = {
        "stamps": pictures.stamps,
        "emoji": pictures.emoji,
        "textiles": pictures.textiles,
        "fashion_mnist": pictures.fashion_mnist,
        "digits": pictures.digits,
    }
    one_of("task.data", name, samples)
    some = samples[name]()
    return LabelledImages(range(len(some)), some.labels, tuple(some.names), f"sample:{name}", some.open)


@dataclass(frozen=True)
class VisionTask(Defaults):
    """Image classification; the same split for every seed of training.

    Attributes:
        settings: of "vision" or "vtab".
        read: settings → training and held-out images.
    """

    settings: Any
    read: Callable[[Any], Sources]
    metrics: ClassVar[dict[str, str]] = CLASSIFIER_METRICS
    main_metric: ClassVar[str] = "accuracy"
    peft_type: ClassVar[str | None] = None
    targets: ClassVar[tuple[str, ...]] = (LINEAR_LAYERS,)

    @cached_property
    def modules_to_save(self) -> tuple[str, ...]:  # type: ignore[override]
        """The new head."""
        return new_modules(self.settings.model, self.settings.pooling)

    @cached_property
    def images(self) -> Sources:
        """Training and held-out images, not opened yet."""
        return self.read(self.settings)

    def check_data(self) -> None:
        """Decode up to 2,000 of the training and of the held-out images each; any other when it is first used.

        Raises:
            ValueError: for images or tables that cannot be used; names the file or row.
        """
        for images in self.images:
            if not self.settings.data.startswith("sample:"):
                images.check()

    def check_model(self) -> None:
        """Check the sizes of the backbone by its configuration.

        Raises:
            ValueError: for a model that is not there, or settings that do not fit it.
        """
        s = self.settings
        check_backbone(s.model, s.size, s.feature_layer)

    def describe(self) -> str:
        """The index of each class with its training images."""
        train, held_out = self.images
        classes = describe_classes(train.names, train.labels, "images")
        return f"classes: {classes}; {counted(len(held_out), 'image')} held out"

    def build_model(self, seed: int) -> nn.Module:
        """The pretrained model in float32 with a new head, drawn under `seed`."""
        s = self.settings
        return build_classifier(
            s.model,
            self.images[0].names,
            pooling=s.pooling,
            feature_layer=s.feature_layer,
            head_std=s.head_std,
            seed=seed,
        )

    @cached_property
    def _pixels(self) -> tuple[Pixels, Pixels]:
        s = self.settings
        train, held_out = self.images
        return Pixels(train, s.size, s.cache_mib), Pixels(held_out, s.size, s.cache_mib)

    def train_batches(self, seed: int) -> ImageBatches:
        """All training images, in another order and augmented anew in every pass."""
        s = self.settings
        return ImageBatches(self._pixels[0], s.batch_size, seed, s.augment, s.mean, s.std)

    def init_batches(self, seed: int) -> ImageBatches:
        """The first pass of the training batches, whenever it is read."""
        return self.train_batches(seed)

    def eval_batches(self) -> ImageBatches:
        """The held-out images in their order."""
        return ImageBatches(self._pixels[1], self.settings.batch_size, mean=self.settings.mean, std=self.settings.std)

    def evaluate(self, model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> dict[str, float]:
        """Mean loss (nats), accuracy and macro F1 (both in [0, 1])."""
        return classifier_metrics(model, batches)

    def save(self, model: nn.Module, folder: Path) -> None:
        """The adapter and the head as PEFT saves them, and `vision.json`: what `load_classifier` needs beside them.

        Of a base model that is a local folder only its name is kept.
        """
        super().save(model, folder)
        s = self.settings
        keys = ("pooling", "feature_layer", "size", "mean", "std")
        values = {"model": public_name(s.model), "local": is_local(s.model), **{key: getattr(s, key) for key in keys}}
        text = json.dumps({**values, "names": self.images[0].names}, indent=2, ensure_ascii=False)
        (folder / "vision.json").write_text(text + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Classifier:
    """A trained classifier of images.

    Attributes:
        model: gives `logits` (b, classes) for `pixel_values`.
        names: of the classes.
        size, mean, std: of the images that it was trained on.
    """

    model: nn.Module
    names: tuple[str, ...]
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def probabilities(self, files: Sequence[str | Path]) -> Tensor:
        """Probability of each class (len(files), classes) for image files.

        Raises:
            ValueError: for a file that is no image.
        """
        images = LabelledImages(list(files), [0] * len(files), self.names, "files")
        batches = ImageBatches(Pixels(images, self.size), 16, mean=self.mean, std=self.std)
        with torch.no_grad():
            return torch.cat([self.model(pixel_values=b["pixel_values"]).logits.softmax(-1) for b in batches])


def load_classifier(folder: str | Path, model: str | Path | None = None) -> Classifier:
    """Load what `VisionTask.save` wrote, on its base model.

    Args:
        model: the base model, a folder or a name; needed where it was a local folder. None for the one that was named.

    Raises:
        ValueError: if the folder has no `vision.json`, or the base model is not named or not found.
    """
    from peft import PeftModel

    path = Path(folder) / "vision.json"
    if not path.is_file():
        raise ValueError(f"{folder}: there is no vision.json; expected the folder of a trained image classifier")
    s = json.loads(path.read_text(encoding="utf-8"))
    names = tuple(s["names"])
    if model is None and s.get("local", False):
        raise ValueError(f"{path}: the base model was a local folder ({s['model']}); give the folder as model=")
    named = s["model"] if model is None else str(model)
    base = build_classifier(named, names, pooling=s["pooling"], feature_layer=s["feature_layer"], head_std=0.0, seed=0)
    trained = PeftModel.from_pretrained(base, str(folder)).eval()
    return Classifier(trained, names, s["size"], tuple(s["mean"]), tuple(s["std"]))


def tiny_settings(settings: Settings, folder: Path) -> Settings:
    """The same task on a random backbone of 3 layers and 16 images of noise in two classes, written in `folder`."""
    swiglu = "giant" in settings.model or "gated" in settings.model
    tiny_backbone(folder / "model", swiglu)
    layer = None if settings.feature_layer is None else 2
    paths = {"model": str(folder / "model"), "data": str(folder / "data")}
    common: dict[str, Any] = {**paths, "size": 28, "batch_size": 4, "feature_layer": layer}
    if isinstance(settings, VtabSettings):
        _tiny_vtab(folder / "data" / settings.dataset)
        return dataclasses.replace(settings, **common)
    for index, name in enumerate(("cat", "dog")):
        for row in range(8):
            _noise(folder / "data" / name / f"{row}.png", 8 * index + row)
    return dataclasses.replace(settings, **common, eval_size=4, train_size=None)


def _tiny_vtab(root: Path) -> None:
    """16 images in the layout of VTAB-1K."""
    lines = [f"images/{row}.png {row % 2}" for row in range(16)]
    for row, line in enumerate(lines):
        _noise(root / line.split()[0], row)
    for train, held_out in PARTS.values():
        (root / train).write_text("\n".join(lines[:12]), encoding="utf-8")
        (root / held_out).write_text("\n".join(lines[12:]), encoding="utf-8")


def _noise(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = torch.randint(0, 256, (28, 28, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    Image.fromarray(values.numpy()).save(path)


def _vision(settings: VisionSettings) -> VisionTask:
    return VisionTask(settings, read_vision)


def _vtab(settings: VtabSettings) -> VisionTask:
    return VisionTask(settings, lambda s: read_vtab(s.data, s.dataset, s.part))


RECIPES = {
    "vision": Recipe(VisionSettings, _vision, tiny_settings),
    "vtab": Recipe(VtabSettings, _vtab, tiny_settings),
}
"""The tasks of this module."""
