"""A function of tensors as a method: its parameters say what it reads, and it returns ΔW, or B and A."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal, get_origin, get_type_hints

from torch import Tensor

from ..linalg.sums import SharedSums
from ..messages import quoted, unknown_name
from .estimator import Estimator
from .factors import product_factors, site_generator
from .facts import Facts
from .method import METHODS, Method, Settings, WeightOf
from .statistics import GradientSums, InputEstimator
from .target import SiteTarget, Target

PARAMETERS = {
    "W": "the pretrained weight (k, d)",
    "C": "X Xᵀ / n (d, d), the second moment of the inputs over all tokens",
    "mean": "the mean of the inputs (d,)",
    "n": "the number of tokens",
    "G": "∂L/∂W (k, d), the mean over batches",
    "r": "the rank; then B (k, r) and A (r, d) are returned, else ΔW (k, d)",
    "generator": "a torch.Generator of the seed and the site",
}
"""Parameters that a function may have besides its options, with what each is. Tensors are float64."""

OF_INPUTS = {"C", "mean", "n"}
_FIELDS = ("base", "num_batches", "adaptive_ranks", "rank_budget", "min_rank", "max_rank", "exact_svd",
           "learning_rate", "fit_head", "fold_alpha", "seed", "method")  # fmt: skip


@dataclass(frozen=True)
class FunctionTarget(Target):
    """A target whose factors the function makes once the rank is known."""

    make: Callable[[int], Any] = field(kw_only=True)


class FunctionMethod(Method):
    """The base of the methods that `from_function` makes.

    Attributes:
        function: of the user.
        wanted: those of `PARAMETERS` that it has.
        code: a digest of its source; empty where there is none.
    """

    function: ClassVar[Callable[..., Any]]
    wanted: ClassVar[frozenset[str]]
    code: ClassVar[str]

    def estimator(self, weight_of: WeightOf, settings: Settings) -> Estimator:
        def make(name: str, **read: Any) -> Target:
            if "W" in self.wanted or "r" not in self.wanted:  # a shape to check ΔW against
                read["W"] = weight_of(name).double()
            return self._target(name, settings, read)

        totals = "mean" in self.wanted
        if self.wanted & OF_INPUTS:
            return _OfBoth(make, totals) if self.reads == "gradients" else _OfInputs(make, totals)
        return _OfGradients(make) if self.reads == "gradients" else _OfWeights(make)

    def factors(self, site: SiteTarget, settings: Settings) -> tuple[Tensor, Tensor]:
        if not isinstance(site.target, FunctionTarget):
            return product_factors(site)
        (k, d), r = site.shape, site.r
        made = site.target.make(r)
        shapes = [tuple(M.shape) for M in made] if _all_tensors(made, 2) else None
        if shapes != [(k, r), (r, d)]:
            raise ValueError(
                f"site {site.name}: {self.name}: expected B {(k, r)} and A {(r, d)}, got {_shown(made)}; a function "
                "without the parameter r returns ΔW instead"
            )
        B, A = made
        return B * site.scale, A

    def _target(self, name: str, settings: Settings, read: dict[str, Any]) -> Target:
        """The target of one site from what was read there."""
        given: dict[str, Any] = {key: value for key, value in read.items() if key in self.wanted}
        given |= {option: getattr(self, option) for option in self.__dataclass_fields__}  # type: ignore[attr-defined]
        if "generator" in self.wanted:
            given["generator"] = site_generator(settings.seed, name)
        if "r" in self.wanted:
            return FunctionTarget(make=lambda r: self._called(name, {**given, "r": r}))
        delta, W = self._called(name, given), read["W"]
        if not _all_tensors([delta], 1) or delta.shape != W.shape:
            raise ValueError(
                f"site {name}: {self.name}: expected ΔW {tuple(W.shape)}, got {_shown(delta)}; a function that returns "
                "B and A has the parameter r"
            )
        return Target(M=delta, is_delta=True)

    def _called(self, name: str, given: dict[str, Any]) -> Any:
        try:
            return type(self).function(**given)
        except Exception as error:
            raise RuntimeError(f"site {name}: {self.name} raised {type(error).__name__}: {error}") from error


class _OfWeights:
    """Nothing is read of the data."""

    def __init__(self, make: Callable[..., Target]) -> None:
        self.make = make
        self.accumulated: tuple[SharedSums, ...] = ()
        self.facts = Facts()

    def target(self, name: str, batches: int) -> Target:
        return self.make(name)


class _OfGradients(GradientSums):
    def __init__(self, make: Callable[..., Target]) -> None:
        super().__init__()
        self.make = make
        self.accumulated: tuple[SharedSums, ...] = (self.gradients,)
        self.facts = Facts()

    def target(self, name: str, batches: int) -> Target:
        return self.make(name, G=self.mean_gradient(name, batches).double())


class _OfInputs(InputEstimator[dict[str, Any]]):
    def __init__(self, make: Callable[..., Target], totals: bool) -> None:
        super().__init__(_moments, lambda name, batches, read: make(name, **read), totals)


class _OfBoth(InputEstimator[dict[str, Any]], GradientSums):
    def __init__(self, make: Callable[..., Target], totals: bool) -> None:
        GradientSums.__init__(self)
        InputEstimator.__init__(self, _moments, None, totals)
        self.make_site = make
        self.accumulated = (self.sums, self.counts, self.gradients)

    def made(self, name: str, batches: int, shared: dict[str, Any]) -> Target:
        return self.make_site(name, **shared, G=self.mean_gradient(name, batches).double())


def _moments(gram: Tensor, total: Tensor, tokens: float) -> dict[str, Any]:
    return {"C": gram / tokens, "mean": total / tokens, "n": int(tokens)}


def from_function(function: Callable[..., Any] | str) -> type[FunctionMethod]:
    """Make a method of a function of tensors, and add it to the table of methods.

    Its parameters are among `PARAMETERS`, which says what each is; further ones, with a default, are options of the
    method. With the parameter r it returns B (k, r) and A (r, d), else ΔW (k, d), of which B·A is the truncated SVD.
    scaling·B·A is then what it returned, whatever alpha, r and rsLoRA say.

    Args:
        function: is called once a site, and gives the method its name; a second one of the same name takes the place
            of the first. Or "path/to/file.py:function" or "module:function", which is then the name.

    Returns:
        The class of the method. `InitConfig(method=function)` makes it by itself.

    Raises:
        TypeError, ValueError: for a parameter that is not known and has no default, a name of another method, a
            function without a name, or a file or function that is not there.
    """
    if isinstance(function, str):
        name, function = function, _loaded(function)
    else:
        name = getattr(function, "__name__", "")
    if not name.rpartition(":")[2].isidentifier():
        raise TypeError(f"method: expected a function with a name, made by def, got {quoted(function)}")
    earlier = METHODS.get(name)
    if earlier is not None and not issubclass(earlier, FunctionMethod):
        raise ValueError(f"method: {name!r} is a method of cntlora; give your function another name")
    if earlier is not None and earlier.function is function:
        return earlier
    known, options = _parameters(function, name)
    cls = make_dataclass(
        "".join(part.title() for part in name.rpartition(":")[2].split("_")),
        options,
        bases=(FunctionMethod,),
        frozen=True,
        kw_only=True,
        namespace={
            "name": name,
            "summary": (inspect.getdoc(function) or "a function of yours").splitlines()[0].rstrip("."),
            "source": getattr(function, "__module__", ""),
            "reads": "gradients" if "G" in known else "inputs" if known & OF_INPUTS else "weights",
            "ranked": "r" not in known,
            "ranges": {option: (-math.inf, math.inf, "any number will do") for option, _, _ in options},
            "function": staticmethod(function),
            "wanted": frozenset(known),
            "code": _digest(function),
        },
    )
    METHODS[name] = cls
    return cls


def _parameters(function: Callable[..., Any], name: str) -> tuple[set[str], list[tuple[str, Any, Any]]]:
    """The parameters of `PARAMETERS` that a function has, and its options as (name, type, default)."""
    known, options, hints = set(), [], get_type_hints(function)
    for parameter in inspect.signature(function).parameters.values():
        default, given = parameter.default, parameter.name
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise TypeError(f"method {name!r}: parameter {parameter}: expected parameters that can be given by name")
        if given in PARAMETERS:
            known.add(given)
        elif default is parameter.empty:
            hint = unknown_name(f"method {name!r}: parameter", given, PARAMETERS)
            raise TypeError(f"{hint}; or give it a default, and it is an option")
        elif given in _FIELDS:
            raise TypeError(f"method {name!r}: option {given!r} is an option of InitConfig; give it another name")
        elif get_origin(hints.get(given)) is not Literal and not isinstance(default, (bool, int, float)):
            raise TypeError(
                f"method {name!r}: option {given}: expected a number or True or False as its default, or a Literal "
                f"with its choices as its type, got {quoted(default)}"
            )
        else:
            options.append((given, hints.get(given, type(default)), default))
    return known, options


def _loaded(name: str) -> Callable[..., Any]:
    """The function that "path/to/file.py:function" or "module:function" names."""
    place, _, function = name.rpartition(":")
    module = _module(place, name)
    if not callable(getattr(module, function, None)):
        names = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise ValueError(unknown_name(f"method {name!r}: function", function, names))
    found: Callable[..., Any] = getattr(module, function)
    return found


def _digest(function: Callable[..., Any]) -> str:
    try:
        return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:16]
    except (OSError, TypeError):  # typed in where no source is kept
        return ""


def _module(place: str, name: str) -> ModuleType:
    """Import a file by its path, or a module by its name."""
    if not place.endswith(".py"):
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as error:
            raise ValueError(f"method {name!r}: {error}; expected file.py:function or module:function") from error
    if not Path(place).is_file():
        raise ValueError(f"method {name!r}: there is no file {place}")
    spec = importlib.util.spec_from_file_location(f"cntlora_function_{Path(place).stem}", place)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # for annotations that are resolved by the name of the module
    spec.loader.exec_module(module)
    return module


def _all_tensors(values: Any, count: int) -> bool:
    return isinstance(values, (tuple, list)) and len(values) == count and all(isinstance(v, Tensor) for v in values)


def _shown(value: Any) -> str:
    """Describe what a function returned, for a message."""
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__} of {', '.join(map(_shown, value)) or 'nothing'}"
    return quoted(value)
