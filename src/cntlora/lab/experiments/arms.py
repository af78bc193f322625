"""The arms of a comparison by name: a base method and modifiers, as in "self+vas" or "peft:eva+dora".

`parse_arm` reads a name. A base is one row of `BASES`, a modifier one row of `MODIFIERS`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ...config import InitConfig
from ...messages import unknown_name
from ...methods.method import METHODS, find, methods

LABELS = {
    "full": "Full fine-tuning",
    "lora": "LoRA",
    "cross": "CNTLoRA-X",
    "self": "CNTLoRA-S",
    "shift": "CNTLoRA-Sh",
    "descent": "CNTLoRA-D",
    "whitened": "CNTLoRA-W",
    "whitened_descent": "CNTLoRA-WD",
    "pissa": "PiSSA",
    "olora": "OLoRA",
    "eva": "EVA",
    "corda": "CorDA",
    "lora_ga": "LoRA-GA",
    "lora_one": "LoRA-One",
    "lora_da": "LoRA-DA",
    "gora": "GoRA",
}
"""Labels as in the paper; a method that is not here is labelled by its name."""

PEFT_LABELS = {
    "pissa": "PiSSA (PEFT)",
    "pissa_niter_4": "PiSSA (PEFT, 4 iterations)",
    "olora": "OLoRA (PEFT)",
    "eva": "EVA (PEFT)",
    "corda": "CorDA (PEFT)",
    "lora_ga": "LoRA-GA (PEFT)",
    "adalora": "AdaLoRA",
}
"""PEFT's own initialisations, named peft:NAME."""


@dataclass(frozen=True)
class Arm:
    """One row of a comparison: how the model is adapted and how the adapter starts.

    Attributes:
        name: as parsed, the `method` of its records.
        label: for tables and legends, as in the paper.
        init: options of `InitConfig` that this arm sets (always `method`); None where cntlora takes no part.
        lora: options of `peft.LoraConfig` that this arm sets: use_dora, use_rslora, r.
        data: what its initialisation reads instead of the training data as it is, see `controls.read`.
        peft: PEFT's own initialisation, one of `PEFT_LABELS`; None for PEFT's default (Kaiming A, B = 0).
        full: all weights train and there is no adapter.
        fitted: its start is rescaled for the learning rate of the run: by `InitConfig.learning_rate` if its method is
            made for one rate, else by `cntlora.fit_learning_rate`.
        fit_head: its new head starts by `cntlora.fit_head`, from the same batches.
    """

    name: str
    label: str
    init: Mapping[str, Any] | None = None
    lora: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    peft: str | None = None
    full: bool = False
    fitted: bool = False
    fit_head: bool = False

    @property
    def reads_besides(self) -> bool:
        """Return whether batches are read by more than the initialisation of cntlora or PEFT."""
        return self.fitted or self.fit_head

    @property
    def meaning(self) -> tuple[Any, ...]:
        """Equal for two names of the same arm, such as "dora" and "lora+dora"."""
        init = None if self.init is None else InitConfig.from_dict(self.init).to_dict()
        if init is not None and self.init is not None:  # [init] may give what the arm does not name
            init |= {name: self.init.get(name) for name in ("strength", "rtol")}
        settings = (init and sorted(init.items()), sorted(self.lora.items()), sorted(self.data.items()))
        return *map(str, settings), self.peft, self.full, self.fitted, self.fit_head


@dataclass(frozen=True)
class Modifier:
    """A change that "+…" makes.

    Attributes:
        pattern: matches the whole text behind the plus; a group holds the value.
        example: for messages.
        option: of `InitConfig`, of `LoraConfig`, of `controls.read` or of `Arm` itself, by `of`.
        value: that the option gets; None for the number in the pattern's group.
        suffix: of the label; {} is the value as written.
        only: the one method that it works with; None for every one of cntlora.
        of: whose option it is; those of "lora" and "arm" go to PEFT's arms too.
        number: type of a number in the pattern.
    """

    pattern: str
    example: str
    option: str
    value: Any
    suffix: str
    only: str | None = None
    of: Literal["init", "lora", "data", "arm"] = "init"
    number: type = float


_NUMBER = r"([0-9]+\.?[0-9]*(?:e-?[0-9]+)?)"

MODIFIERS = (
    Modifier("dora", "dora", "use_dora", True, " + DoRA", of="lora"),
    Modifier("rslora", "rslora", "use_rslora", True, " + rsLoRA", of="lora"),
    Modifier("qr", "qr", "decomposition", "qr", "-QR"),
    Modifier("qr_pivoted", "qr_pivoted", "decomposition", "qr_pivoted", "-QR (pivoted)"),
    Modifier(f"p{_NUMBER}", "p0.75", "p", None, "-{}"),
    Modifier(f"C(-?{_NUMBER})", "C10", "shift_constant", None, "-{}", only="shift"),
    Modifier("Cgaussian", "Cgaussian", "shift_constant", "gaussian", "-Norm", only="shift"),
    Modifier("symmetric", "symmetric", "root", "symmetric", " (symmetric root)", only="self"),
    Modifier("cholesky", "cholesky", "root", "cholesky", " (Cholesky root)", only="self"),
    Modifier("mean", "mean", "gram", "mean", " (mean)"),
    Modifier(f"strength{_NUMBER}", "strength1", "strength", None, " (strength {})"),
    Modifier(f"rtol{_NUMBER}", "rtol1e-3", "rtol", None, " (rtol {})"),
    *(Modifier(base, base, "base", base, f" ({base})") for base in ("offset", "paired", "subtract", "keep")),
    Modifier("r([0-9]+)", "r4", "r", None, " (rank {})", of="lora", number=int),
    Modifier("n([0-9]+)", "n1", "num_batches", None, " ({} batches)", number=int),
    Modifier("split([0-9]+)", "split4", "parts", None, " (batches in {})", of="data", number=int),
    Modifier("unseen", "unseen", "unseen", True, " (unseen batches)", of="data"),
    Modifier("shuffled", "shuffled", "content", "shuffled", " (shuffled data)", of="data"),
    Modifier("foreign", "foreign", "content", "foreign", " (other data)", of="data"),
    Modifier("fitted", "fitted", "fitted", True, " (fitted to the rate)", of="arm"),
    Modifier("head", "head", "fit_head", True, " (fitted head)", of="arm"),
    Modifier("vas", "vas", "adaptive_ranks", True, " + VAS"),
)

_ALIASES = {"dora": "lora+dora", "rslora": "lora+rslora", "peft:dora": "lora+dora"}
_MERGED = (  # names that are not a name with " + …" behind it
    (" + DoRA", "CNTLoRA", "CNTDoRA"),
    (" + rsLoRA", "CNTLoRA", "CNTRS-LoRA"),
    (" + DoRA", "LoRA", "DoRA"),
    (" + rsLoRA", "LoRA", "rsLoRA"),
)


def bases() -> tuple[str, ...]:
    """Every name that an arm may begin with."""
    own = tuple(name for name in methods() if name != "lora")
    return ("full", "lora", "dora", "rslora", *own, *(f"peft:{name}" for name in PEFT_LABELS), "peft:dora")


def parse_arm(name: str) -> Arm:
    """Read the name of an arm.

    Bases: full (every weight trains), lora (PEFT's plain LoRA), dora, rslora, every other one of `cntlora.methods()`,
    peft:eva, peft:corda, peft:pissa, peft:pissa_niter_4, peft:olora, peft:lora_ga, peft:adalora, peft:dora (PEFT's own
    code), and file.py:function for a function of yours. Modifiers, in any order: `MODIFIERS`.

    Raises:
        ValueError: for an unknown base or modifier (with the nearest right name), one that comes twice, two that
            contradict each other, or one that the base cannot take; the message names the arm.
    """
    if not isinstance(name, str):
        raise TypeError(f"method: expected a name such as 'self+vas', got {type(name).__name__} {name!r}")
    base, *texts = name.split("+")
    if ":" in base and not base.startswith("peft:"):
        find(base)
    elif base not in bases():
        raise ValueError(unknown_name(f"method {name!r}: base", base, bases()))
    root, *implied = _ALIASES.get(base, base).split("+")
    found = [_modifier(name, text) for text in (*implied, *texts)]
    _check(name, root, found)
    lora, options, data, own = (
        {m.option: value for m, value in found if m.of == of} for of in ("lora", "init", "data", "arm")
    )
    label = _label(root, found, [*implied, *texts])
    if lora.get("r", 1) < 1:
        raise ValueError(f"method {name!r}: +r: expected a rank of at least 1, got {lora['r']}")
    if root == "full":
        return Arm(name, label, full=True)
    if root == "lora":
        return Arm(name, label, lora=lora, data=data, **own)
    if root.startswith("peft:"):
        return Arm(name, label, lora=lora, peft=root.removeprefix("peft:"), **own)
    arm = Arm(name, label, {"method": root, **options}, lora, data, **own)
    try:
        InitConfig.from_dict({"method": root, **options})
    except (ValueError, TypeError) as error:
        raise ValueError(f"method {name!r}: {error}") from error
    return arm


def _modifier(name: str, text: str) -> tuple[Modifier, Any]:
    """The modifier of a text and the value it sets."""
    for modifier in MODIFIERS:
        match = re.fullmatch(modifier.pattern, text)
        if match:
            return modifier, modifier.number(match[1]) if modifier.value is None else modifier.value
    raise ValueError(unknown_name(f"method {name!r}: modifier", text, [m.example for m in MODIFIERS]))


def _check(name: str, root: str, found: list[tuple[Modifier, Any]]) -> None:
    """Modifiers that exclude each other, or that have no effect on the base."""
    seen: dict[str, Modifier] = {}
    unchanged = root in ("full", "peft:adalora")  # which take no modifier
    of_peft = root == "lora" or root.startswith("peft:")
    reads = not root.startswith("peft:") and any(modifier.of == "arm" for modifier, _ in found)  # whatever the method
    for modifier, _ in found:
        shown = f"+{modifier.example}"
        if modifier.option in seen:
            other = seen[modifier.option]
            what = "comes twice" if other is modifier else f"and +{other.example} both set {modifier.option}"
            raise ValueError(f"method {name!r}: {shown} {what}; keep one of them")
        seen[modifier.option] = modifier
        if unchanged or (of_peft and (modifier.of == "init" or (modifier.of == "data" and not reads))):
            allowed = [] if unchanged else [f"+{m.example}" for m in MODIFIERS if m.of in ("lora", "arm")]
            raise ValueError(f"method {name!r}: {shown} has no effect on {root!r}; it takes {allowed or 'no modifier'}")
        if modifier.option == "base" and root in METHODS and METHODS[root].zero_start:
            raise ValueError(f"method {name!r}: {shown} has no effect on {root!r}, which starts at B = 0; leave it out")
        if modifier.of == "data" and not reads and root in METHODS and METHODS[root].reads == "weights":
            raise ValueError(f"method {name!r}: {shown} has no effect on {root!r}, which reads no data; leave it out")
        if modifier.only not in (None, root):
            raise ValueError(f"method {name!r}: {shown} works with {modifier.only!r} only; leave it out")
    if "p" in seen and "decomposition" in seen:
        raise ValueError(f"method {name!r}: +p shares singular values out, which QR does not have; keep one of them")


def _label(root: str, found: list[tuple[Modifier, Any]], texts: list[str]) -> str:
    """The paper's name: CNTDoRA-X for cross+dora, CNTLoRA-X + VAS for cross+vas, DoRA for lora+dora."""
    label = LABELS.get(root) or PEFT_LABELS.get(root.removeprefix("peft:"), root.rpartition(":")[2])
    suffixes = [
        modifier.suffix.format(re.sub(r"^[a-zC]+(?=-?[0-9])", "", text))
        for modifier in MODIFIERS
        for (m, _), text in zip(found, texts, strict=True)
        if m is modifier
    ]
    for suffix, plain, own in _MERGED:
        if suffix in suffixes and label.startswith(plain):
            label = own + label.removeprefix(plain)
            suffixes.remove(suffix)
    return "".join([label, *suffixes])
