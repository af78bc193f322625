"""`InitConfig`: all choices of an initialisation as plain values. Data is an argument of the call."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from .messages import check_flag, check_integer, check_number, unknown_name, warn_caller
from .methods.method import (
    EARLIER_DEFAULTS,
    METHODS,
    Method,
    all_options,
    at_earlier_default,
    find,
    from_flat,
    option_names,
    own_default,
)

Base = Literal["offset", "paired", "subtract", "keep"]
WITH_LOSS, WITHOUT_LOSS = "whitened", "self"
"""The methods that are taken where none is named: where gradients of a loss can be read, and where not."""
BASES: tuple[Base, ...] = ("offset", "paired", "subtract", "keep")


@dataclass(frozen=True, init=False)
class InitConfig:
    """Choices of an initialisation: the method, the base policy, what is read, ranks.

    Options of a method are given to the method: `InitConfig(method=Self(root="cholesky"))`. In TOML files and in
    `from_dict` they are flat keys beside the others; the command line has the common ones (`cntlora init --help`).

    Attributes:
        method: a method such as `cntlora.Self()` or its name, see `cntlora.methods()`. Or a function of tensors of
            yours, or its place "file.py:function" (`cntlora.from_function`). None leaves it to what is there: whitened
            where there is a loss and weights whose gradients can be read, else self.
        base: what keeps the model's function at the start. "offset": rank 2r, the negative half frozen, starts at
            zero; "paired": the same at rank r with r/2 directions, both halves train; "subtract": W ← W − s·B·A;
            "keep": as printed in the paper, the function moves by s·B·A. None for the method's own: "keep" for
            descent, "offset" for the others. r is the rank of `LoraConfig`. Methods that start at B = 0 (lora, eva,
            whitened) keep the function anyway and write rank r for every base policy.
        num_batches: number of batches that are read from the start of the data; fewer if there are fewer. With several
            processes each reads as many of its own, and the number of batches in eq. 18 is the total.
        adaptive_ranks: variable adapter structure (eq. 19): ranks by the top-K rule instead of the same r for all.
        rank_budget: K; None for the sum of the adapter's ranks. Needs adaptive_ranks.
        min_rank, max_rank: bounds of a site's rank with adaptive_ranks; None for no upper bound.
        exact_svd: compute all singular values in float64. Otherwise the leading ones of a large layer come from a
            truncated SVD with an error bound, in the model's precision (float32 at least): B·A is the same within 1e-3
            of ‖ΔW‖.
        learning_rate: the peak rate of AdamW that you will train with, for a method whose start is made for one rate
            (whitened: 1e-3). A start for another rate is brought to it: A and B are divided by f and the scaling is
            multiplied by f², with f the method's rate divided by yours. It then learns at your rate what it learns at
            the method's own (docs/math/learning_rate.md). None leaves it as it is made.
        fit_head: fit a new head (a linear layer that trains whole, as PEFT's `modules_to_save`) to the features of the
            pretrained model first, so that gradients come through no random one (`cntlora.fit_head`). None does it
            where there is such a head and no method is named; True raises where it cannot be done.
        fold_alpha: write the factors for scaling 1 (alpha = rank, no rsLoRA), so that a reader that ignores
            `rank_pattern` and `alpha_pattern` gets the same function. The scaling that trains is then 1.
        seed: of everything random: the Gaussian C of shift mode, the A of lora and gora, and the noise of a loss that
            draws some while descent tries sizes.

    Raises:
        ValueError, TypeError: for an unknown name or a value out of range; the message lists the valid ones.
    """

    method: Method | None
    base: Base | None
    num_batches: int
    adaptive_ranks: bool
    rank_budget: int | None
    min_rank: int
    max_rank: int | None
    exact_svd: bool
    learning_rate: float | None
    fit_head: bool | None
    fold_alpha: bool
    seed: int

    def __init__(
        self,
        method: str | Method | Callable[..., Any] | None = None,
        base: Base | None = None,
        *,
        num_batches: int = 8,
        adaptive_ranks: bool = False,
        rank_budget: int | None = None,
        min_rank: int = 0,
        max_rank: int | None = None,
        exact_svd: bool = False,
        learning_rate: float | None = None,
        fit_head: bool | None = None,
        fold_alpha: bool = False,
        seed: int = 0,
        **options: Any,
    ) -> None:
        given = locals()
        chosen = _method_of(method, options)
        for field in fields(self):
            object.__setattr__(self, field.name, chosen if field.name == "method" else given[field.name])
        self._check()
        if options:
            warn_caller(
                "options of a method are given to the method since version 0.2, and here no longer in 0.3; with `from "
                f"cntlora import {type(self.method).__name__}` write {_written(self)}",
                DeprecationWarning,
            )

    if not TYPE_CHECKING:  # where attributes that are not there are errors

        def __getattr__(self, name: str) -> Any:
            """Options of a method were attributes of the configuration in version 0.1."""
            if name not in EARLIER_DEFAULTS:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            warn_caller(f"InitConfig.{name} is an option of the method since version 0.2; read config.method.{name}",
                        DeprecationWarning)  # fmt: skip
            return getattr(self.method, name, EARLIER_DEFAULTS[name])

    def _check(self) -> None:
        if self.base is not None and self.base not in BASES:
            raise ValueError(unknown_name("base", self.base, BASES))
        check_integer("num_batches", self.num_batches, 1)
        check_integer("seed", self.seed, 0)
        for name in ("adaptive_ranks", "exact_svd", "fold_alpha"):
            check_flag(name, getattr(self, name))
        if self.fit_head is not None:
            check_flag("fit_head", self.fit_head)
        check_integer("min_rank", self.min_rank, 0)
        if self.max_rank is not None:
            check_integer("max_rank", self.max_rank, max(self.min_rank, 1))
        if self.rank_budget is not None:
            check_integer("rank_budget", self.rank_budget, 1)
        self._check_rate()
        given = [name for name in ("rank_budget", "min_rank", "max_rank") if getattr(self, name)]
        if self.adaptive_ranks and self.method is not None and not self.method.ranked:
            raise ValueError(
                f"adaptive_ranks: method {self.method.name!r} has no spectrum to share ranks out by; use another "
                "method, or the same rank everywhere"
            )
        if given and not self.adaptive_ranks:
            raise ValueError(f"{given[0]} has no effect without adaptive_ranks=True; set it, or leave {given[0]} out")

    def _check_rate(self) -> None:
        if self.learning_rate is None:
            return
        check_number(
            "learning_rate", self.learning_rate, 0.0, math.inf, "the peak rate of your training", open_low=True
        )
        if self.fold_alpha:
            raise ValueError(
                "learning_rate: it is met by the scaling, which fold_alpha=True sets to 1; leave one of them out"
            )
        if self.method is not None and self.method.rate is None:
            able = ", ".join(name for name, cls in METHODS.items() if cls.rate is not None)
            raise ValueError(
                f"learning_rate: method {self.method.name!r} is made for no rate of its own ({able} are); leave it "
                "out, and call cntlora.fit_learning_rate(model, rate, batches) after initialize"
            )

    @property
    def pace(self) -> float:
        """f: the rate that the method's start is made for, divided by `learning_rate`; 1 without one of them."""
        return 1.0 if self.learning_rate is None else (self.chosen.rate or self.learning_rate) / self.learning_rate

    @property
    def chosen(self) -> Method:
        """The method in force.

        Raises:
            ValueError: while it is left open; a plan has the one that was chosen.
        """
        if self.method is None:
            raise ValueError("method: None leaves it to the data, and none was read yet; the plan has the chosen one")
        return self.method

    @property
    def effective_base(self) -> str:
        """The base policy in force: methods that start at B = 0 need none, which is what "keep" does."""
        return "keep" if self.method is not None and self.method.zero_start else self.stated_base

    @property
    def stated_base(self) -> str:
        """The base policy that is given, else the method's own."""
        return self.chosen.base if self.base is None else self.base

    def to_dict(self) -> dict[str, Any]:
        """Plain values with flat keys, ready for JSON or TOML: the method by its name, and its options."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        options = {} if self.method is None else asdict(self.method)  # type: ignore[call-overload]
        lists = {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
        return {**own, "method": None if self.method is None else self.method.name, **lists}

    def stated(self) -> dict[str, Any]:
        """Convert to the plain values of the records: with the options of all methods, and what is in force.

        The base policy is the one in force. An option is at its default of version 0.1 where it is at the method's own
        or is none of its options. The tolerance is None where it is NumPy's, or there is none; "rounding" where it
        follows from the inputs.
        """
        values = self.to_dict()
        own = option_names(self.chosen)
        for name, earlier in EARLIER_DEFAULTS.items():
            if name not in own or getattr(self.method, name) == own_default(self.method, name):
                values[name] = earlier
        for name in ("learning_rate", "fit_head"):  # which earlier records do not have
            if not values[name]:
                del values[name]
        rtol = getattr(self.method, "rtol", 0.0)
        return {**values, "base": self.stated_base, "rtol": "rounding" if rtol is None else rtol or None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> InitConfig:
        """Make it from plain values with flat keys; an unknown key is an error that names the nearest right one.

        It reads what version 0.1 wrote, too, where the options of all methods stand beside each other.
        """
        own = {name: value for name, value in values.items() if name not in all_options()}
        options = {name: value for name, value in values.items() if name not in own}
        return cls(**{**own, "method": _method_of(own.get("method"), options)})


def _method_of(method: object, options: Mapping[str, Any]) -> Method | None:
    """The method with options beside it: flat keys.

    Options without a method are those of self, as in version 0.1, or of descent where self has one of them not.

    Raises:
        ValueError: for options without a method that neither has; names the methods that have them.
    """
    for name in options:
        if name not in all_options():
            known = (*(field.name for field in fields(InitConfig)), *all_options())
            raise TypeError(unknown_name("InitConfig option", name, known))
    if isinstance(method, type) and method in METHODS.values():
        raise TypeError(f"method: expected a method or its name, got the class {method.__name__}; {method.__name__}()")
    if inspect.isfunction(method):
        method = METHODS.of_function(method)()
    if isinstance(method, Method):
        given: Any = method
        return from_flat(type(given), {**asdict(given), **options}) if options else given
    if method is None and all(value is None for value in options.values()):
        return None
    return from_flat(_method_with(options) if method is None else find(method), options)


def _method_with(options: Mapping[str, Any]) -> type[Method]:
    """The method that options without one are of."""
    given = [name for name, value in options.items() if not at_earlier_default(name, value)]
    for name in ("self", "descent"):
        if set(given) <= set(option_names(METHODS[name])):
            return METHODS[name]
    having = [name for name, cls in METHODS.items() if set(given) <= set(option_names(cls))]
    if having:
        METHODS[having[0]](**{name: options[name] for name in given})  # a wrong value is named first
    cure = f"name one that has it, method={having[0]!r}" if having else "no method has all of them"
    raise ValueError(f"{', '.join(given)}: an option of a method, and no method is named; {cure}")


def _written(config: InitConfig) -> str:
    """The call that makes a configuration, as short as it can be."""
    method: Any = config.chosen  # options were given, so that there is one
    changed = [name for name in option_names(method) if getattr(method, name) != own_default(method, name)]
    options = ", ".join(f"{name}={getattr(method, name)!r}" for name in changed)
    plain = InitConfig()
    rest = [
        f", {field.name}={getattr(config, field.name)!r}"
        for field in fields(config)
        if field.name != "method" and getattr(config, field.name) != getattr(plain, field.name)
    ]
    return f"InitConfig(method={type(method).__name__}({options}){''.join(rest)})"
