"""The table of methods. A method is one row: what it reads, how its factors come about, and where it is published."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

from torch import Tensor

from ..linalg.factors import Spectrum, qr_factors, svd_factors
from ..linalg.moments import Moments
from .constraints import cross_map, cross_quick, self_map, self_quick
from .descent import DescentEstimator, descent_factors
from .estimator import Estimator
from .peers import (
    Target,
    corda_target,
    damped_inverse,
    eva_target,
    lora_down,
    lora_ga_factors,
    lora_one_target,
    pissa_target,
    zero_up,
)
from .solve import (
    GradientEstimator,
    InputEstimator,
    MapEstimator,
    ShiftEstimator,
    WeightEstimator,
    WeightOf,
    site_generator,
)


class Options(Protocol):
    """What of the configuration a method may read (`cntlora.InitConfig` has it)."""

    @property
    def root(self) -> str: ...
    @property
    def effective_rtol(self) -> float | None: ...
    @property
    def shift_constant(self) -> float | str: ...
    @property
    def effective_decomposition(self) -> str: ...
    @property
    def p(self) -> float: ...
    @property
    def center(self) -> bool: ...
    @property
    def damping(self) -> float: ...
    @property
    def exact_svd(self) -> bool: ...
    @property
    def seed(self) -> int: ...


@dataclass(frozen=True)
class Goal:
    """One site's factors to be made: of rank `r`, with B·A times `scale`.

    Attributes:
        name, shape: of the site; shape is (k, d).
        target, spectrum: what its estimator gave, and its singular triplets.
    """

    name: str
    shape: tuple[int, int]
    target: Target
    spectrum: Spectrum
    r: int
    scale: float


Factors = Callable[[Goal, Options], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Method:
    """One initialisation.

    Attributes:
        name: as in `InitConfig(method=...)`.
        summary: one line for `--help` and tables.
        source: paper and equation.
        estimator: makes the accumulator of what the method reads.
        factors: makes B (k, r) and A (r, d).
        strength: default of `InitConfig.strength`: scaling·B·A = strength·[ΔW]_r; None for the layer's scaling s,
            where the source does not divide by it (B·A = [ΔW]_r).
        reads: "inputs" of the layers, "gradients" of the loss by W (of inputs too, where its estimator is an
            `InputReader`), or "weights" alone.
        zero_start: whether B = 0, so that the function starts unchanged whatever becomes of W.
        width: singular triplets that it uses, as a multiple of r.
        ranked: whether it has a spectrum to share ranks out by.
        base: its own, where `InitConfig.base` is at its default.
        sized: whether the size of the start is found by the loss (`cntlora.sizing`), and `strength` is that size.
        decomposition: its own, where `InitConfig.decomposition` is at its default.
        rtol: its own tolerance of †, where `InitConfig.rtol` is at its default; None for that of the rounding of its
            inputs.
        options: those of `InitConfig` that have an effect on it, of `METHOD_OPTIONS`.
    """

    name: str
    summary: str
    source: str
    estimator: Callable[[WeightOf, Options], Estimator]
    factors: Factors
    strength: float | None = 1.0
    reads: Literal["inputs", "gradients", "weights"] = "inputs"
    zero_start: bool = False
    width: int = 1
    ranked: bool = True
    base: str = "offset"
    sized: bool = False
    decomposition: Literal["svd", "qr"] = "svd"
    rtol: float | None = None
    options: frozenset[str] = frozenset()


def product_factors(goal: Goal, o: Options) -> tuple[Tensor, Tensor]:
    """B·A = scale·[M]_r·right by SVD with the fraction p, or by QR."""
    M, right = goal.target.M, goal.target.right
    if o.effective_decomposition == "svd":
        B, A = svd_factors(goal.spectrum, goal.r, o.p, goal.scale)
    else:
        assert M is not None
        B, A = qr_factors(M, goal.r, o.effective_decomposition == "qr_pivoted", goal.scale)
    return B, A if right is None else A @ right


def _eva(goal: Goal, o: Options) -> tuple[Tensor, Tensor]:
    return zero_up(goal.spectrum.Vh[: goal.r], goal.shape[0])


def _lora(goal: Goal, o: Options) -> tuple[Tensor, Tensor]:
    return zero_up(lora_down(goal.r, goal.shape[1], site_generator(o.seed, goal.name)), goal.shape[0])


def _lora_ga(goal: Goal, o: Options) -> tuple[Tensor, Tensor]:
    return lora_ga_factors(goal.spectrum, goal.r, goal.scale)


def _cross(weight_of: WeightOf, o: Options) -> Estimator:
    rtol = o.effective_rtol
    return MapEstimator(weight_of, partial(cross_map, rtol=rtol), partial(cross_quick, rtol=rtol))


def _self(weight_of: WeightOf, o: Options) -> Estimator:
    rtol = o.effective_rtol
    quick = partial(self_quick, rtol=rtol) if o.root == "cholesky" else None
    noise = Moments.noise_rtol if rtol is None else None
    return MapEstimator(weight_of, partial(self_map, root=o.root, rtol=rtol), quick, noise)


def _shift(weight_of: WeightOf, o: Options) -> Estimator:
    return ShiftEstimator(weight_of, o.shift_constant, o.effective_rtol, o.seed)


def _corda_sums(weight_of: WeightOf, o: Options) -> Estimator:
    return InputEstimator(
        lambda gram, total, tokens: damped_inverse(gram / tokens, o.damping),
        lambda name, batches, C: corda_target(weight_of(name).to(C[0]), *C),
    )


def _descent_sums(weight_of: WeightOf, o: Options) -> Estimator:
    return DescentEstimator(weight_of, o.damping)


def _eva_sums(weight_of: WeightOf, o: Options) -> Estimator:
    return InputEstimator(
        lambda gram, total, tokens: eva_target(gram, total, tokens, o.center, o.exact_svd),
        lambda name, batches, target: target,
        o.center,
    )


def _descent(goal: Goal, o: Options) -> tuple[Tensor, Tensor]:
    return descent_factors(*product_factors(goal, o))


def _weights(make: Callable[[Tensor], Target] | None) -> Callable[[WeightOf, Options], Estimator]:
    return lambda weight_of, o: WeightEstimator(weight_of, make)


def _gradients(make: Callable[[Tensor], Target]) -> Callable[[WeightOf, Options], Estimator]:
    return lambda weight_of, o: GradientEstimator(make)


_PRODUCT = frozenset({"decomposition", "p", "strength"})
_ESTIMATE = _PRODUCT | {"rtol", "gram", "initial_weight", "batch_weights"}
METHOD_OPTIONS = _ESTIMATE | {"root", "shift_constant", "center", "damping"}
"""Options of `InitConfig` that some methods read and others do not."""

METHODS: dict[str, Method] = {
    m.name: m
    for m in (
        Method("cross", "equal outputs, inputs correlated with the source's", "Das et al. 2025, eq. 4",
               _cross, product_factors, strength=2.0, rtol=1e-3, options=_ESTIMATE),
        Method("self", "equal output covariances, whitened source", "Das et al. 2025, eq. 12",
               _self, product_factors, strength=2.0, options=_ESTIMATE | {"root"}),
        Method("shift", "output covariances differ by a constant", "Das et al. 2025, eq. 17",
               _shift, product_factors, strength=2.0, rtol=1e-3, options=_ESTIMATE | {"shift_constant"}),
        Method("descent", "outputs one step down the loss, of a size that the loss finds",
               "cntlora, eq. 4 with targets W X − η ∂L/∂Y", _descent_sums, _descent,
               reads="gradients", base="keep", sized=True, options=frozenset({"strength", "damping", "batch_weights"})),
        Method("lora", "A random, B zero", "Hu et al. 2021; eq. 22",
               _weights(None), _lora, reads="weights", zero_start=True, ranked=False),
        Method("pissa", "principal singular triplets of W", "Meng et al. 2024; eq. 24",
               _weights(pissa_target), product_factors, reads="weights", options=_PRODUCT),
        Method("olora", "QR of W", "Büyükakyüz 2024; eq. 28",
               _weights(pissa_target), product_factors, strength=None, reads="weights", decomposition="qr",
               options=frozenset({"decomposition", "strength"})),
        Method("eva", "A = principal directions of the inputs, B zero", "Paischer et al. 2024; eq. 39",
               _eva_sums, _eva, zero_start=True, options=frozenset({"center", "batch_weights"})),
        Method("corda", "SVD of W times the input covariance", "Yang et al. 2024; eq. 33",
               _corda_sums, product_factors, options=_PRODUCT | {"damping", "batch_weights"}),
        Method("lora_ga", "singular vectors of the gradient", "Wang et al. 2024, theorems 3.1 and 3.2",
               _gradients(lambda G: Target(M=G)), _lora_ga, strength=None, reads="gradients", width=2,
               options=frozenset({"strength", "batch_weights"})),
        Method("lora_one", "one step of gradient descent", "Zhang et al. 2025, algorithm 1",
               _gradients(lora_one_target), product_factors, strength=None, reads="gradients",
               options=_PRODUCT | {"batch_weights"}),
    )
}  # fmt: skip


def methods() -> tuple[str, ...]:
    """Names that `InitConfig(method=...)` takes."""
    return tuple(METHODS)
