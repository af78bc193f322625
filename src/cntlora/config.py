"""`InitConfig`: every choice of the method as plain values. Data is an argument of the call, never configuration."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from .messages import quoted, unknown_name
from .methods.family import METHOD_OPTIONS, METHODS

CHOICES: dict[str, tuple[str, ...]] = {
    "method": tuple(METHODS),
    "base": ("offset", "paired", "subtract", "keep"),
    "decomposition": ("svd", "qr", "qr_pivoted"),
    "gram": ("sum", "mean"),
    "root": ("paper", "symmetric", "cholesky"),
    "initial_weight": ("pretrained", "zero"),
}


@dataclass(frozen=True)
class InitConfig:
    """How adapters are initialised.

    An option that has no effect on the method is an error where it is not at its default.

    Attributes:
        method: constraint set: "cross" (eq. 4), "self" (eq. 12) or "shift" (eq. 17), "descent" (eq. 4 with targets a
            step down the loss), or a published peer: "lora", "pissa", "olora", "eva", "corda", "lora_ga", "lora_one";
            see `cntlora.methods()`.
        base: what keeps the model's function at the start. "offset": rank 2r, the negative half frozen, starts at
            zero; "paired": the same at rank r with r/2 directions, both halves train; "subtract": W ← W − s·B·A;
            "keep": the paper's letter, the function moves by s·B·A. None for the method's own: "keep" for descent,
            "offset" for the others. r is the rank that trains in all of them. Methods
            that start at B = 0 (lora, eva) keep the function as it is and need none of them: all write rank r.
        decomposition: "svd", "qr" as printed in the paper, or "qr_pivoted" (column pivoting, reveals the rank). olora
            is QR in any case.
        p: share of the singular values that goes to A (B gets 1 − p), in [0, 1]. SVD only.
        strength: scaling·B·A = strength·[ΔW]_r, whatever alpha, r and rsLoRA say. None for the method's own: 2 for
            the paper's modes (the α = 2r of its runs), 1 for pissa and corda, and the layer's scaling s for olora,
            lora_ga and lora_one, whose sources do not divide by it. Of descent it is the largest ‖scaling·B·A‖/‖W‖ of
            all sites, and None is the one that lowers the loss on the first batches most.
        gram: G as the "sum" over tokens (the paper) or the "mean".
        root: square root in self mode, "paper" (D^(−½) Pᵀ), "symmetric" (P D^(−½) Pᵀ) or "cholesky" (L⁻¹ of G = L Lᵀ,
            the fastest).
        rtol: singular values at or under rtol·σ_max are dropped by †. None for the method's own: 1e-3 for cross and
            shift, which blow up at less (docs/results.md); for self whatever may be rounding of the inputs, by the
            dtype that they come in (docs/math.md). 0 for max(d, b)·eps of the statistics' dtype, as NumPy has it: the
            paper's letter.
        shift_constant: C in shift mode: a multiple of the identity, or "gaussian".
        center: eva: subtract the mean token, as its own code does; False for eq. 39 as printed.
        damping: corda, descent: the input covariance gets damping·mean(diag C)·I before it is inverted.
        num_batches: how many batches are read from the data, from its start; fewer if there are fewer. Where several
            processes run, each reads so many of its own, and B of eq. 18 is their number together.
        batch_weights: w_j of eq. 18, one a batch; None for 1 each.
        initial_weight: W_0 of eq. 18, "pretrained" or "zero".
        adaptive_ranks: variable adapter structure (eq. 19): ranks by the top-K rule instead of one r for all.
        rank_budget: K; None for the sum of the ranks that the adapter has. Needs adaptive_ranks.
        min_rank, max_rank: bounds of a site's rank with adaptive_ranks; None for no upper bound.
        exact_svd: all singular values in float64; else the leading ones of a large layer come from a truncated
            SVD with an error bound, in the model's precision (float32 at least): B·A is the same within 1e-3 of ‖ΔW‖.
        fold_alpha: write the factors for scaling 1 (alpha = rank, no rsLoRA), so that a reader that ignores
            `rank_pattern` and `alpha_pattern` gets the same function. The scaling that trains is then 1.
        seed: of what is random (the Gaussian C, lora's A).

    Raises:
        ValueError, TypeError: for an unknown name or a value out of range; the message lists what is right.
    """

    method: str = "self"
    base: str | None = None
    decomposition: str = "svd"
    p: float = 0.5
    strength: float | None = None
    gram: str = "sum"
    root: str = "paper"
    rtol: float | None = None
    shift_constant: float | str = 1.0
    center: bool = True
    damping: float = 0.01
    num_batches: int = 8
    batch_weights: tuple[float, ...] | None = None
    initial_weight: str = "pretrained"
    adaptive_ranks: bool = False
    rank_budget: int | None = None
    min_rank: int = 0
    max_rank: int | None = None
    exact_svd: bool = False
    fold_alpha: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed and not (name == "base" and self.base is None):
                raise ValueError(unknown_name(name, getattr(self, name), allowed))
        if self.batch_weights is not None:
            object.__setattr__(self, "batch_weights", _weights(self.batch_weights))
        self._check_numbers()
        self._check_ranks()
        self._check_effects()

    def _check_numbers(self) -> None:
        _number("p", self.p, 0.0, 1.0, "0.5 balances A and B, 1 gives the whole spectrum to A")
        if self.strength is not None:
            _number("strength", self.strength, 0.0, math.inf, "1 starts at [ΔW]_r itself", open_low=True)
        if self.rtol is not None:
            _number("rtol", self.rtol, 0.0, 1.0, "0 takes max(d, b)·eps")
        if self.shift_constant != "gaussian":
            if isinstance(self.shift_constant, str):
                raise ValueError(unknown_name("shift_constant", self.shift_constant, ["gaussian", "or a number"]))
            _number("shift_constant", self.shift_constant, -math.inf, math.inf, "1 is the identity")
        _number("damping", self.damping, 0.0, math.inf, "0.01 is CorDA's own")
        _integer("num_batches", self.num_batches, 1)
        _integer("seed", self.seed, 0)
        for name in ("adaptive_ranks", "exact_svd", "fold_alpha", "center"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected True or False, got {quoted(getattr(self, name))}")

    def _check_effects(self) -> None:
        """Nothing is silent: an option that is set must have an effect on the method."""
        reads = METHODS[self.method].options
        for option in fields(self):
            value = getattr(self, option.name)
            if option.name in METHOD_OPTIONS - reads and value != option.default:
                own = ", ".join(sorted(reads)) or "none of them"
                raise ValueError(
                    f"{option.name}: {quoted(value)} has no effect with method {self.method!r}; leave it out (of the "
                    f"options of methods, this one reads {own})"
                )

    def _check_ranks(self) -> None:
        _integer("min_rank", self.min_rank, 0)
        if self.max_rank is not None:
            _integer("max_rank", self.max_rank, max(self.min_rank, 1))
        if self.rank_budget is not None:
            _integer("rank_budget", self.rank_budget, 1)
        given = [n for n in ("rank_budget", "min_rank", "max_rank") if getattr(self, n)]
        if self.adaptive_ranks and not METHODS[self.method].ranked:
            raise ValueError(
                f"adaptive_ranks: method {self.method!r} has no spectrum to share ranks out by; use another method, or "
                "the same rank everywhere"
            )
        if given and not self.adaptive_ranks:
            raise ValueError(f"{given[0]} has no effect without adaptive_ranks=True; set it, or leave {given[0]} out")

    @property
    def searches(self) -> bool:
        """Whether the size of the start is found by the loss, for which the first batches are kept."""
        return METHODS[self.method].sized and self.strength is None

    @property
    def effective_base(self) -> str:
        """The base policy in force: methods that start at B = 0 need none, which is what "keep" does."""
        return "keep" if METHODS[self.method].zero_start else self.stated_base

    @property
    def stated_base(self) -> str:
        """The base policy that is given, else the method's own."""
        return METHODS[self.method].base if self.base is None else self.base

    @property
    def effective_rtol(self) -> float | None:
        """The tolerance of † in force: the one given, else the method's own.

        0 for that of the sums, as NumPy has it; None for that of the rounding of the inputs.
        """
        return METHODS[self.method].rtol if self.rtol is None else self.rtol

    @property
    def effective_decomposition(self) -> str:
        """The decomposition in force: the one given, else the method's own."""
        return METHODS[self.method].decomposition if self.decomposition == "svd" else self.decomposition

    def strength_at(self, scaling: float) -> float:
        """The strength in force at a layer of this scaling: the one given, else the method's own.

        1 where the size of the start is found when the factors are there.
        """
        own = METHODS[self.method].strength
        if self.strength is not None and not METHODS[self.method].sized:
            return float(self.strength)
        return scaling if own is None else own

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON or TOML."""
        values = asdict(self)
        values["batch_weights"] = None if self.batch_weights is None else list(self.batch_weights)
        return values

    def stated(self) -> dict[str, Any]:
        """As `to_dict`, with base and tolerance in force where they are left to the method.

        The tolerance is None where it is NumPy's, or there is none; "rounding" where it follows from the inputs.
        """
        follows = self.effective_rtol is None and "rtol" in METHODS[self.method].options
        rtol = "rounding" if follows else self.effective_rtol or None
        return {**self.to_dict(), "base": self.stated_base, "rtol": rtol}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> InitConfig:
        """From plain values; an unknown key is an error that names the nearest right one."""
        return cls(**values)


def _number(name: str, value: object, low: float, high: float, hint: str, *, open_low: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__} {quoted(value)}; {hint}")
    inside = math.isfinite(value) and (low < value if open_low else low <= value) and value <= high
    if not inside:
        left = "(" if open_low else "["
        raise ValueError(f"{name}: expected a finite number in {left}{low:g}, {high:g}], got {quoted(value)}; {hint}")


def _weights(values: object) -> tuple[float, ...]:
    """Any iterable of numbers as plain floats."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise TypeError(f"batch_weights: expected one number a batch, such as (1.0, 0.5), got {quoted(values)}")
    weights = tuple(values)
    for w in weights:
        if isinstance(w, (str, bytes, bool)) or not hasattr(w, "__float__"):
            raise TypeError(f"batch_weights: expected a number for each batch, got {quoted(w)}")
    if not weights or not all(map(math.isfinite, weights)):
        raise ValueError(f"batch_weights: expected one number a batch, all of them finite, got {weights}")
    return tuple(float(w) for w in weights)


def _integer(name: str, value: object, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected a whole number, got {type(value).__name__} {quoted(value)}")
    if value < low:
        raise ValueError(f"{name}: expected at least {low}, got {value}")


def _name_unknown_options() -> None:
    """Makes `InitConfig(methd="self")` say which names exist; a dataclass only says that this one does not."""
    plain = InitConfig.__init__
    names = [f.name for f in fields(InitConfig)]

    @functools.wraps(plain)
    def checked(self: InitConfig, *args: Any, **options: Any) -> None:
        for name in options:
            if name not in names:
                raise TypeError(unknown_name("InitConfig option", name, names))
        plain(self, *args, **options)

    InitConfig.__init__ = checked  # type: ignore[method-assign]


_name_unknown_options()
