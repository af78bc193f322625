"""The table of methods. A method is one row: how its estimate is made, its strength, and where it comes from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from .constraints import cross_map, self_map
from .solve import Estimator, MapEstimator, ShiftEstimator, WeightOf


class Options(Protocol):
    """What of the configuration a method may read (`cntlora.InitConfig` has it)."""

    @property
    def root(self) -> str: ...
    @property
    def rtol(self) -> float | None: ...
    @property
    def shift_constant(self) -> float | str: ...
    @property
    def seed(self) -> int: ...


@dataclass(frozen=True)
class Method:
    """One initialisation.

    Attributes:
        name: as in `InitConfig(method=...)`.
        summary: one line for `--help` and tables.
        source: paper and equation.
        strength: default of `InitConfig.strength`: scaling·B·A = strength·[ΔW]_r.
        estimator: makes the accumulator of Σ_j w_j W_tar,j.
    """

    name: str
    summary: str
    source: str
    strength: float
    estimator: Callable[[WeightOf, Options], Estimator]


def _cross(weight_of: WeightOf, o: Options) -> Estimator:
    return MapEstimator(weight_of, partial(cross_map, rtol=o.rtol))


def _self(weight_of: WeightOf, o: Options) -> Estimator:
    return MapEstimator(weight_of, partial(self_map, root=o.root, rtol=o.rtol))


def _shift(weight_of: WeightOf, o: Options) -> Estimator:
    return ShiftEstimator(weight_of, o.shift_constant, o.rtol, o.seed)


METHODS: dict[str, Method] = {
    m.name: m
    for m in (
        Method("cross", "equal outputs, inputs correlated with the source's", "Das et al. 2025, eq. 4", 2.0, _cross),
        Method("self", "equal output covariances, whitened source", "Das et al. 2025, eq. 12", 2.0, _self),
        Method("shift", "output covariances differ by a constant", "Das et al. 2025, eq. 17", 2.0, _shift),
    )
}


def methods() -> tuple[str, ...]:
    """Names that `InitConfig(method=...)` takes."""
    return tuple(METHODS)
