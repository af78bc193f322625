"""LoRA (Hu et al. 2021; eq. 22): A random, B zero."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .estimator import Estimator
from .factors import lora_down, site_generator, zero_up
from .method import Method, Settings, WeightOf
from .statistics import WeightEstimator
from .target import SiteTarget


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
