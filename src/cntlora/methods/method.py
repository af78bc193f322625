"""`Method`: its options, what it reads of the data, how its factors are made; and the table of methods."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from functools import cache
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Literal,
    Protocol,
    get_args,
    get_origin,
    get_type_hints,
    runtime_checkable,
)

from torch import Tensor

from ..linalg import allocation
from ..messages import check_flag, check_integer, check_number, quoted, unknown_name

if TYPE_CHECKING:
    from .estimator import Estimator
    from .target import RankFacts, SiteTarget

WeightOf = Callable[[str], Tensor]
"""Site name → its weight W (k, d), float32 or float64, made on demand."""

Range = tuple[float, float, str]
"""The least and the largest value of an option, and a hint for the message."""


class Settings(Protocol):
    """Settings that a method may ask for besides its own options (`cntlora.InitConfig` has it)."""

    @property
    def exact_svd(self) -> bool: ...
    @property
    def seed(self) -> int: ...


@runtime_checkable
class Method(Protocol):
    """One initialisation: a frozen dataclass whose fields are its options, in a file of its own.

    The attributes are facts of the class, with defaults that most methods keep.

    Attributes:
        name: as in `InitConfig(method=...)`, in TOML files and on the command line.
        summary: one line for tables and `--help`.
        source: paper and equation.
        reads: "inputs" of the layers, "gradients" of the loss by W (and inputs too, where the estimator is an
            `InputReader`), or "weights" alone.
        base: base policy where `InitConfig.base` is None.
        zero_start: whether B = 0, so that the function starts unchanged whatever becomes of W.
        width: singular triplets that it uses, as a multiple of r.
        ranked: whether it has a spectrum to share ranks out by.
        has_step_size: whether `strength` is the largest ‖scaling·B·A‖/‖W‖ of all sites, and the loss finds it where it
            is None (`execution.step_size`).
        least_gain: the share of the loss by which the step has to lower it, or else is left out (B = 0); None to take
            it in any case.
        rate: the peak learning rate of AdamW that its start is made for; None where it is made for none.
        site_sums: whether its estimator may need a sum for each site besides the one for each input.
        gram: G of a batch as the "sum" over its tokens, or the "mean".
        batch_weights: weight w_j of each batch in all sums; None for 1 each.
        ranges: of its numeric options, by name; without an entry any finite number is taken.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    reads: ClassVar[Literal["inputs", "gradients", "weights"]]
    base: ClassVar[str] = "offset"
    zero_start: ClassVar[bool] = False
    width: ClassVar[int] = 1
    ranked: ClassVar[bool] = True
    has_step_size: ClassVar[bool] = False
    least_gain: ClassVar[float | None] = None
    rate: ClassVar[float | None] = None
    site_sums: ClassVar[bool] = False
    ranges: ClassVar[Mapping[str, Range]] = {}

    @property
    def gram(self) -> str:
        return "sum"

    @property
    def batch_weights(self) -> tuple[float, ...] | None:
        return None

    def __new__(cls, *values: Any, **options: Any) -> Any:
        names = option_names(cls)
        for name in options:
            if name not in names:  # a dataclass only says that this one is not known
                raise TypeError(unknown_name(f"{cls.__name__} option", name, names))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        check_options(self)

    def estimator(self, weight_of: WeightOf, settings: Settings) -> Estimator:
        """The accumulator of what the method reads, over all batches and for all sites."""

    def factors(self, site: SiteTarget, settings: Settings) -> tuple[Tensor, Tensor]:
        """B (k, r) and A (r, d) of one site."""

    def strength_at(self, scaling: float) -> float:
        """The strength in scaling·B·A = strength·[ΔW]_r at a layer of this scaling.

        It is the scaling itself where `strength` is None: the source does not divide by it, so that B·A = [ΔW]_r. Of
        a method whose step size is found when the factors are there it is 1.
        """
        if self.has_step_size:
            return 1.0
        strength: float | None = getattr(self, "strength", 1.0)
        return scaling if strength is None else float(strength)

    def ranks(self, sites: Mapping[str, RankFacts], budget: int, low: int, high: int | None) -> dict[str, int]:
        """The rank of every site with adaptive ranks: by the top-K rule of eq. 19.

        Args:
            budget: sum of all ranks. low, high: `min_rank` and `max_rank`.
        """
        return allocation.allocate({name: site.variances for name, site in sites.items()}, budget, low, high)

    def rtol_at(self, k: int, d: int, tokens: int) -> float | None:
        """The tolerance of † at a site; None where there is no †, or where it follows from the inputs.

        Args:
            k, d: shape of W.
            tokens: of the largest batch.
        """
        return None

    @property
    def finds_step_size(self) -> bool:
        """Return whether the loss finds the size of the start, for which the first batches are kept."""
        return self.has_step_size and getattr(self, "strength", None) is None

    @property
    def needs_matrix(self) -> bool:
        """Return whether the factors are made from M itself, and not from its singular triplets alone."""
        return getattr(self, "decomposition", "svd") != "svd"


class MethodTable(dict[str, type[Method]]):
    """Name → class of every method, in the order of tables.

    Attributes:
        of_function: makes a method of a function and adds it (`methods.function.from_function`).
    """

    of_function: Callable[[Callable[..., Any] | str], type[Method]]


METHODS = MethodTable()
"""All methods; `cntlora.methods` fills it."""


def methods() -> tuple[str, ...]:
    """Names that `InitConfig(method=...)` takes.

    `cntlora.methods()` calls it; the package of that name holds the methods' modules.
    """
    return tuple(METHODS)


def find(name: object) -> type[Method]:
    """The class of a method by its name, or of a function by "path/to/file.py:function" or "module:function".

    Raises:
        ValueError: for an unknown name; lists those that are known.
    """
    if isinstance(name, str) and ":" in name and name not in METHODS:
        return METHODS.of_function(name)
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(unknown_name("method", name, [*METHODS, "or file.py:function, of yours"]))
    return METHODS[name]


def all_options() -> tuple[str, ...]:
    """The names of the options of all methods."""
    return tuple(dict.fromkeys(option for cls in METHODS.values() for option in option_names(cls)))


def from_flat(cls: Any, values: Mapping[str, Any]) -> Method:
    """A method from flat keys, among which options of other methods may stand at their earlier defaults.

    None leaves an option to the method, as it did in version 0.1.

    Raises:
        ValueError, TypeError: for a wrong value, or an option of another method that is set.
    """
    own, given = option_names(cls), {}
    for name, value in values.items():
        if name in own:
            unset = value is None or (at_earlier_default(name, value) and value not in choices(cls).get(name, (value,)))
            if not unset:
                given[name] = tuple(value) if isinstance(value, list) else value
        elif not at_earlier_default(name, value):
            owner: Any = next(other for other in METHODS.values() if name in option_names(other))
            owner(**{name: value})  # a wrong value is named first
            raise ValueError(
                f"{name}: {quoted(value)} has no effect with method {cls.name!r}; leave it out (of the options of "
                f"methods, this one reads {', '.join(sorted(own)) or 'none of them'})"
            )
    method: Method = cls(**given)
    return method


_SHARED_RANGES: Mapping[str, Range] = {
    "p": (0.0, 1.0, "0.5 balances A and B, 1 gives the whole spectrum to A"),
    "rtol": (0.0, 1.0, "0 takes max(d, b)·eps"),
    "damping": (0.0, math.inf, "0.01 is CorDA's own"),
}
"""Ranges of options that several methods have."""
_ANY: Range = (-math.inf, math.inf, "any number will do")

EARLIER_DEFAULTS: Mapping[str, Any] = {
    "decomposition": "svd",
    "p": 0.5,
    "strength": None,
    "gram": "sum",
    "root": "paper",
    "rtol": None,
    "shift_constant": 1.0,
    "center": True,
    "damping": 0.01,
    "batch_weights": None,
    "initial_weight": "pretrained",
}
"""Defaults of version 0.1, whose configurations, and so its plans and records, have the options of all methods."""


def option_names(method: type | Any) -> tuple[str, ...]:
    """The options of a method, or of its class."""
    return tuple(f.name for f in fields(method))


def own_default(method: type | Any, name: str) -> Any:
    """The default of an option of a method."""
    return next(f.default for f in fields(method) if f.name == name)


@cache
def choices(cls: Any) -> dict[str, tuple[str, ...]]:
    """The options of a method that take one of a few names, with those names."""
    hints = get_type_hints(cls)
    found = {name: hints[name] for name in option_names(cls)}
    return {name: get_args(hint) for name, hint in found.items() if get_origin(hint) is Literal}


def check_options(method: Any) -> None:
    """Check every option of a method, and make plain numbers of its batch weights.

    Raises:
        ValueError, TypeError: for a value that the option does not take; names it and what is expected.
    """
    cls: Any = type(method)
    named = choices(cls)
    for option in fields(method):
        name, value = option.name, getattr(method, option.name)
        if name in named:
            if value not in named[name]:
                raise ValueError(unknown_name(name, value, named[name]))
        elif value is None and option.default is None:
            continue
        elif name == "batch_weights":
            object.__setattr__(method, name, _weights(value))
        elif isinstance(option.default, bool):
            check_flag(name, value)
        elif name == "strength":
            check_number(name, value, 0.0, math.inf, "1 starts at [ΔW]_r itself", open_low=True)
        elif isinstance(option.default, int):
            check_integer(name, value, cls.ranges.get(name, (1,))[0])
        elif name == "shift_constant" and isinstance(value, str):
            if value != "gaussian":
                raise ValueError(unknown_name(name, value, ["gaussian", "or a number"]))
        else:
            check_number(name, value, *{**_SHARED_RANGES, **cls.ranges}.get(name, _ANY))


def at_earlier_default(name: str, value: object) -> bool:
    """Return whether an option has the value that version 0.1 wrote where it was not set."""
    plain = isinstance(value, (str, int, float))
    return value is None or (plain and name in EARLIER_DEFAULTS and value == EARLIER_DEFAULTS[name])


def _weights(values: object) -> tuple[float, ...]:
    """Convert any iterable of numbers to plain floats."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise TypeError(f"batch_weights: expected one number a batch, such as (1.0, 0.5), got {quoted(values)}")
    weights = tuple(values)
    for w in weights:
        if isinstance(w, (str, bytes, bool)) or not hasattr(w, "__float__"):
            raise TypeError(f"batch_weights: expected a number for each batch, got {quoted(w)}")
    if not weights or not all(map(math.isfinite, weights)):
        raise ValueError(f"batch_weights: expected one number a batch, all of them finite, got {weights}")
    return tuple(float(w) for w in weights)
