"""What a method is: its options, what it reads of the data, and how its factors are made; and the table of methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

from torch import Tensor

from ..linalg import allocation
from ..messages import quoted, unknown_name
from .options import at_earlier_default, check_options, choices, option_names

if TYPE_CHECKING:
    from .estimator import Estimator
    from .target import RankFacts, SiteTarget

WeightOf = Callable[[str], Tensor]
"""Site name → its weight W (k, d), float32 or float64, made on demand."""


class Settings(Protocol):
    """What a method may ask for besides its own options (`cntlora.InitConfig` has it)."""

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
        sized: whether `strength` is the largest ‖scaling·B·A‖/‖W‖ of all sites, and the loss finds it where it is None
            (`execution.step_size`).
        site_sums: whether its estimator may need a sum for each site besides the one for each input.
        gram: G of a batch as the "sum" over its tokens, or the "mean".
        batch_weights: weight w_j of each batch in all sums; None for 1 each.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    reads: ClassVar[Literal["inputs", "gradients", "weights"]]
    base: ClassVar[str] = "offset"
    zero_start: ClassVar[bool] = False
    width: ClassVar[int] = 1
    ranked: ClassVar[bool] = True
    sized: ClassVar[bool] = False
    site_sums: ClassVar[bool] = False

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

        It is the scaling itself where `strength` is None: the source does not divide by it, so that B·A = [ΔW]_r.
        """
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
    def finds_size(self) -> bool:
        """Whether the loss finds the size of the start, for which the first batches are kept."""
        return self.sized and getattr(self, "strength", None) is None

    @property
    def needs_matrix(self) -> bool:
        """Whether the factors are made from M itself, and not from its singular triplets alone."""
        return getattr(self, "decomposition", "svd") != "svd"


METHODS: dict[str, type[Method]] = {}
"""Name → class of every method, in the order of tables; `cntlora.methods` fills it."""


def methods() -> tuple[str, ...]:
    """Names that `InitConfig(method=...)` takes.

    `cntlora.methods` is this function. The modules of the package of that name are imported by their own names:
    `from cntlora.methods.self_mode import self_map`.
    """
    return tuple(METHODS)


def find(name: object) -> type[Method]:
    """The class of a method.

    Raises:
        ValueError: for an unknown name; lists those that are known.
    """
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(unknown_name("method", name, METHODS))
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
