"""The arguments of `initialize` and its kin: written, documented and checked once."""

from __future__ import annotations

import inspect
import os
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import wraps
from typing import Any, ParamSpec, TypeVar, get_type_hints

from torch import nn

from ..config import InitConfig
from ..data.batches import Forward
from ..data.memory import MaxMemory
from ..data.padding import TokenMask
from ..messages import quoted, unknown_name

P = ParamSpec("P")
A = TypeVar("A")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Keyword arguments of every call that reads data.

    Attributes:
        forward: how to call the model, `forward(model, batch)`; None for model(**batch), (*batch) or (batch).
        loss: for the methods that read gradients (README, Methods): `loss(model, batch)`, a scalar; None for the loss
            in the model's own output, which transformers models give when the batch has labels.
        token_mask: which tokens count. None for the masks in the batch, each for its own stream of tokens; without a
            mask, the decoder of an encoder-decoder model counts tokens with a label other than −100. "labels" for
            those that also have a label, "none" for all tokens. Or a function of the batch that returns one
            (batch, tokens) mask, or a mapping from streams ("text", "decoder", "encoder", "frames") or site names to
            masks (None in it: all tokens count). For methods that read gradients, tokens that the loss does not reach
            do not count either, if the labels tell which: with the model's own loss; with `loss` the masks alone
            decide.
        adapter_name: of the adapter, if the model has several.
        on_missing: "raise" if a site cannot be initialised, or "warn" and leave it as plain LoRA. With methods that
            read gradients, in either case, sites that get no gradient stay plain LoRA with a warning; if most get none,
            it is an error.
        progress: whether to show a progress bar on a terminal.
        max_memory: bound on the memory of the statistics, besides the model and its forward pass: bytes or "6GiB" on
            the model's device, or {"device": …, "cpu": …, "disk": …}. Statistics that do not fit on the device go to
            the CPU's memory, then into a temporary file (only if "disk" is named); the rest waits for another pass over
            the same batches, which are kept for that. The plan is the same: every sum has the same terms in the same
            order (within rounding in layers of 1,024 features or more whose batches have few tokens: their sums are
            formed under a bound alone). None for what is free: then
            statistics that do not fit wait for another pass, and the report says so.
        weights: a safetensors file, or a folder of them, from which W is read, one layer at a time: those of the
            unquantised model if this one is quantised. None to use the model's own weights.
    """

    forward: Forward | None = None
    loss: Forward | None = None
    token_mask: TokenMask = None
    adapter_name: str = "default"
    on_missing: str = "raise"
    progress: bool = True
    max_memory: MaxMemory = None
    weights: str | os.PathLike[str] | None = None

    def options(self) -> dict[str, Any]:
        """The keyword arguments, by name."""
        return {option.name: getattr(self, option.name) for option in fields(Options)}


@dataclass(frozen=True)
class Request(Options):
    """The arguments of `initialize` and `compute_plan`.

    Attributes:
        model: carries LoRA layers with the adapter `adapter_name`, freshly made (B = 0).
        batches: iterable of mappings, tuples or tensors, of any batch size; only its first batches are read. May be
            None for the methods that read the weights alone (lora, pissa, olora), which never look at it.
        config: the method and its options; None for the defaults.
    """

    model: nn.Module
    batches: Iterable[Any] | None = None
    config: InitConfig | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise TypeError(f"model: expected a model (nn.Module) as the first argument, got {quoted(self.model)}")
        _check_config(self.config)


@dataclass(frozen=True)
class TrainerRequest(Options):
    """The arguments of `initialize_from_trainer`.

    Attributes:
        trainer: has `.model`, `.get_train_dataloader()` and no optimizer yet.
        config: the method and its options; None for the defaults.
    """

    trainer: Any
    config: InitConfig | None = None

    def __post_init__(self) -> None:
        _check_config(self.config)


def _check_config(config: object) -> None:
    """Raise TypeError for what is no configuration: a name, or a mapping."""
    if config is not None and not isinstance(config, InitConfig):
        cure = "InitConfig.from_dict(…)" if isinstance(config, dict) else f"InitConfig(method={quoted(config)})"
        raise TypeError(f"config: expected an InitConfig, got {quoted(config)}; write {cure}")


def called_with(arguments: Callable[P, A]) -> Callable[[Callable[[A], R]], Callable[P, R]]:
    """Decorate a function of one object, which is then called with the fields of that object.

    Signature and documentation of the arguments are those of the class.

    Args:
        arguments: the class, a dataclass.
    """

    def decorate(make: Callable[[A], R]) -> Callable[P, R]:
        signature = inspect.signature(arguments)
        name, choices = make.__name__, {field.name for field in fields(InitConfig)}

        @wraps(make)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            for key in kwargs:
                if key in choices:
                    raise TypeError(
                        f"{name}: {key!r} is an option of the configuration; give config=InitConfig({key}=…)"
                    )
                if key not in signature.parameters:
                    raise TypeError(unknown_name(f"{name}: argument", key, signature.parameters))
            try:
                signature.bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(f"{name}: {error}; it is {name}{_shown(signature)}") from None
            return make(arguments(*args, **kwargs))

        returned = make.__annotations__["return"]
        call.__signature__ = signature.replace(return_annotation=returned)  # type: ignore[attr-defined]
        call.__annotations__ = {**get_type_hints(arguments), "return": get_type_hints(make)["return"]}
        call.__doc__ = _documented(inspect.getdoc(make) or "", arguments)
        return call

    return decorate


def _shown(signature: inspect.Signature) -> str:
    given = (p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in signature.parameters.values())
    return f"({', '.join(given)})"


def _documented(text: str, arguments: Any) -> str:
    """The documentation of a function with a section of its arguments, before what it returns and raises."""
    own, shared = (_described(cls) for cls in (arguments, Options))
    section = "Args:\n" + textwrap.indent(f"{own}\n{shared}", "    ")
    for heading in ("\nReturns:\n", "\nRaises:\n"):
        before, found, after = text.partition(heading)
        if found:
            return f"{before}\n{section}\n{found}{after}"
    return f"{text}\n\n{section}\n"


def _described(cls: Any) -> str:
    """The attributes of a dataclass as they are documented."""
    return textwrap.dedent(inspect.cleandoc(cls.__doc__).partition("Attributes:\n")[2]).rstrip()
