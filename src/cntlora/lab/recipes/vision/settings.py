"""`[task]` of the image classification tasks."""

from __future__ import annotations

from dataclasses import dataclass

from ..values import at_least, one_of, within
from .models import POOLINGS
from .pixels import AUGMENTATIONS, IMAGENET_MEAN, IMAGENET_STD
from .vtab import CLASSES, PARTS


@dataclass(frozen=True)
class ImageSettings:
    """Settings that the two tasks have in common.

    Attributes:
        name: of the task.
        model: hub name or folder of a backbone for `AutoModel`, or "sample:dinov2", which a package ships.
        data: where the images are.
        pooling: what the head sees: "cls", the first token; "mean" of the patches; "pooler", the model's own pooled
            output (ConvNeXt, Swin); or "own": the model and head of `AutoModelForImageClassification`.
        feature_layer: the backbone ends after this layer (1 is the first), then comes its last norm; None for all.
        size: pixels of each side that images are resized to, bicubic.
        batch_size: images a batch.
        augment: of training images: "none", "flip" or "crop", see `ImageBatches`.
        mean, std: of the channels, for normalisation; ImageNet's unless the model was trained with others.
        head_std: standard deviation of the new head's weights; its biases start at 0.
        cache_mib: memory for decoded images, each of training and held-out ones.
    """

    name: str = "vision"
    model: str = ""
    data: str = ""
    pooling: str = "cls"
    feature_layer: int | None = None
    size: int = 224
    batch_size: int = 16
    augment: str = "none"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    head_std: float = 2e-5
    cache_mib: int = 1024

    def __post_init__(self) -> None:
        needed = {"model": "hub name or folder", "data": "folder, table or data set with images"}
        missing = [key for key in needed if not getattr(self, key)]
        if missing:
            raise ValueError(f"task.{missing[0]}: task {self.name!r} needs it, a {needed[missing[0]]}")
        at_least("task", self, size=1, batch_size=1, cache_mib=0)
        one_of("task.pooling", self.pooling, (*POOLINGS, "own"))
        one_of("task.augment", self.augment, AUGMENTATIONS)
        within("task.head_std", self.head_std, 0.0, 10.0, "the paper has 2e-5")
        for key in ("mean", "std"):
            if len(getattr(self, key)) != 3:
                raise ValueError(f"task.{key}: expected three numbers, got {getattr(self, key)}")
        if self.feature_layer is not None:
            at_least("task", self, feature_layer=1)


@dataclass(frozen=True)
class VisionSettings(ImageSettings):
    """`[task]` of "vision": your own images, see `images.read_images`.

    Attributes:
        image, label: columns of a table or published data set.
        split, eval_split: of a published data set; without `eval_split`, images of `split` are held out.
        eval_size: held-out images: a number from 1, or a share below 1; unused where the data has them apart.
        train_size: train on so many images only; None for all.
        split_seed: of the split into training and held-out images, the same for every run.
    """

    image: str = "image"
    label: str = "label"
    split: str = "train"
    eval_split: str | None = None
    eval_size: float = 0.2
    train_size: int | None = None
    split_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("task", self, split_seed=0)
        within("task.eval_size", self.eval_size, 0.0, float("inf"), "such as 0.2 or 500", open_low=True)


@dataclass(frozen=True)
class VtabSettings(ImageSettings):
    """`[task]` of "vtab": a task of VTAB-1K, see `vtab.read_vtab`.

    Attributes:
        dataset: the task's folder, such as "caltech101".
        part: "test" trains on 1,000 images and scores the official test images; "val" trains on 800 and scores the
            other 200, to choose a learning rate.
    """

    name: str = "vtab"
    dataset: str = "caltech101"
    part: str = "test"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("task.dataset", self.dataset, CLASSES)
        one_of("task.part", self.part, PARTS)
