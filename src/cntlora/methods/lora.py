"""LoRA (Hu et al. 2021; eq. 22): A random, B zero."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .estimator import Estimator
from .method import Method, Settings, WeightOf
from .statistics import WeightEstimator
from .target import SiteTarget, site_generator, zero_up


@dataclass(frozen=True, kw_only=True)
class Lora(Method):
    """A uniform in ±1/√d and B = 0. It has no options."""

    name = "lora"
    summary = "A random, B zero"
    source = "Hu et al. 2021; eq. 22"
    reads = "weights"
    zero_start = True
    ranked = False

    def estimator(self, weight_of: WeightOf, settings: Settings) -> Estimator:
        return WeightEstimator(weight_of)

    def factors(self, site: SiteTarget, settings: Settings) -> tuple[Tensor, Tensor]:
        d = site.shape[1]
        return zero_up(lora_down(site.r, d, site_generator(settings.seed, site.name)), site.shape[0])


def lora_down(r: int, d: int, generator: torch.Generator) -> Tensor:
    """A (r, d) uniform in ±1/√d (LoRA, Hu et al. 2021; eq. 22), as its authors' code and PEFT draw it.

    Equation 22 prints N(0, I), which is larger by √(3d); `kaiming_uniform_(a=√5)` of the code is this.
    """
    return (2.0 * torch.rand(r, d, generator=generator, dtype=torch.float64) - 1.0) / math.sqrt(d)
