"""Batches of pixels: images resized, kept in memory, shuffled and augmented anew in every pass, normalised."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from .images import LabelledImages

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
AUGMENTATIONS = ("none", "flip", "crop")
SMALLEST_CROP = 0.5  # share of the area


@dataclass
class Pixels:
    """Images as uint8 (3, size, size), resized (bicubic, the aspect is not kept), each decoded once while they fit.

    Attributes:
        images: the images.
        size: pixels of each side.
        cache_mib: memory for decoded images; those beyond are decoded at every use.
    """

    images: LabelledImages
    size: int
    cache_mib: int = 1024
    _cache: dict[int, Tensor] = field(default_factory=dict, repr=False)

    def rows(self, rows: Sequence[int]) -> Tensor:
        """The given images, (len(rows), 3, size, size)."""
        threads = min(torch.get_num_threads(), len(rows))
        if threads < 2 or all(row in self._cache for row in rows):
            return torch.stack([self._row(row) for row in rows])
        with ThreadPoolExecutor(threads) as pool:
            return torch.stack(list(pool.map(self._row, rows)))

    def _row(self, row: int) -> Tensor:
        if row in self._cache:
            return self._cache[row]
        image = self.images.load(self.images.sources[row], self.size)
        image = image.resize((self.size, self.size), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        if len(self._cache) < self.cache_mib * 2**20 // pixels.numel():
            self._cache[row] = pixels
        return pixels


@dataclass
class ImageBatches:
    """Batches {"pixel_values": (b, 3, size, size) float32, "labels": (b,) int64} that can be read again.

    Attributes:
        pixels: the images.
        batch_size: images a batch; the last one may have fewer.
        seed: order and augmentation depend on it and on the pass alone; None for the images as they come.
        augment: "none"; "flip": half of the images mirrored left to right; "crop": flip, and a random square of 50 to
            100 % of the area brought to the full size.
        mean, std: of the three channels, in [0, 1].
        epoch: the number of the pass that is read next; every reading from the start adds one.
    """

    pixels: Pixels
    batch_size: int
    seed: int | None = None
    augment: str = "none"
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD
    epoch: int = 0

    def __len__(self) -> int:
        return -(-len(self.pixels.images) // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Set the pass that is read next, from 0."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        return self._read(epoch)

    def _read(self, epoch: int) -> Iterator[dict[str, Tensor]]:
        count, labels = len(self.pixels.images), self.pixels.images.labels
        generator = None
        order = list(range(count))
        if self.seed is not None:
            generator = torch.Generator().manual_seed(self.seed * 100_003 + epoch)
            order = torch.randperm(count, generator=generator).tolist()
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        for start in range(0, count, self.batch_size):
            rows = order[start : start + self.batch_size]
            values = self.pixels.rows(rows).float() / 255
            if generator is not None:
                values = augmented(values, self.augment, generator)
            yield {"pixel_values": (values - mean) / std, "labels": torch.tensor([labels[row] for row in rows])}


def augmented(values: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    """Images (b, 3, size, size) in [0, 1], each changed at random as `ImageBatches.augment` says."""
    if kind == "none":
        return values
    flips = torch.rand(len(values), generator=generator) < 0.5
    values = torch.where(flips.view(-1, 1, 1, 1), values.flip(-1), values)
    if kind == "flip":
        return values
    return torch.stack([_cropped(value, generator) for value in values])


def _cropped(value: Tensor, generator: torch.Generator) -> Tensor:
    size = value.shape[-1]
    share, across, down = torch.rand(3, generator=generator).tolist()
    side = round(size * (SMALLEST_CROP + (1 - SMALLEST_CROP) * share) ** 0.5)
    top, left = round(down * (size - side)), round(across * (size - side))
    part = value[None, :, top : top + side, left : left + side]
    whole = nn.functional.interpolate(part, size=(size, size), mode="bicubic", align_corners=False)
    return whole[0].clamp(0, 1)
