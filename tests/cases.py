"""Makers of what the tests compute on: weights with batches of inputs, and small PEFT-wrapped modules.

A test measures cntlora against `tests.reference`, which sees the very same numbers as float64 numpy arrays.
Layout as in the paper: W (k, d), X (d, b); cntlora is fed the transpose of X, one row a token.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from tests import reference
from torch import Tensor, nn

from cntlora import InitConfig
from cntlora.linalg.moments import Moments
from cntlora.methods.estimator import InputReader, absorb_batch
from cntlora.methods.factors import site_generator
from cntlora.methods.shift import shift_constant

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
"""What the relative error against the reference may be, by the dtype of the inputs."""


def relative_error(got: Tensor | np.ndarray, expected: Tensor | np.ndarray) -> float:
    """‖got − expected‖_F / ‖expected‖_F in float64; NaN and Inf give infinity."""
    a, b = array(got), array(expected)
    assert a.shape == b.shape, (a.shape, b.shape)
    error = float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-300))
    return error if np.isfinite(error) else float("inf")


def precision_of(dtype: torch.dtype) -> str:
    """Return the reference's name for a dtype."""
    return str(dtype).removeprefix("torch.")


def array(M: Tensor | np.ndarray) -> np.ndarray:
    """Convert to a float64 NumPy array."""
    return (M.detach().cpu().double().numpy() if isinstance(M, Tensor) else np.asarray(M)).astype(np.float64)


# --- matrices -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """W (k, d) and one X_j (d, b_j) a batch; `full` if every G_j has rank d."""

    name: str
    W: Tensor
    batches: tuple[Tensor, ...]
    full: bool

    def to(self, dtype: torch.dtype) -> Case:
        return Case(self.name, self.W.to(dtype), tuple(X.to(dtype) for X in self.batches), self.full)

    @property
    def arrays(self) -> tuple[np.ndarray, list[np.ndarray]]:
        return array(self.W), [array(X) for X in self.batches]

    def __repr__(self) -> str:
        return self.name


def draw(seed: int, *shape: int) -> Tensor:
    """Standard normal entries, float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _case(name: str, k: int, d: int, batches: Sequence[Tensor], seed: int = 0) -> Case:
    full = all(int(torch.linalg.matrix_rank(X)) == d for X in batches)
    return Case(name, draw(1000 + seed, k, d) / d**0.5, tuple(batches), full)


def _plain(name: str, k: int, d: int, sizes: Sequence[int]) -> Case:
    return _case(name, k, d, [draw(i, d, b) for i, b in enumerate(sizes)])


def _repeated(seed: int, d: int, distinct: int, times: int) -> Tensor:
    return draw(seed, d, distinct).repeat(1, times)


def _low_rank(seed: int, d: int, b: int, rank: int) -> Tensor:
    return draw(seed, d, rank) @ draw(seed + 50, rank, b)


def _decaying(seed: int, d: int, b: int) -> Tensor:
    """Singular values that fall by a factor of about 300, as real activations' do."""
    return torch.logspace(0.5, -2, d, dtype=torch.float64)[:, None] * draw(seed, d, b)


CASES = (
    _plain("k<d,b<d", 5, 12, (7, 4)),
    _plain("k<d,b>d", 5, 9, (20, 13, 31)),
    _plain("k=d,b<d", 8, 8, (3, 6, 5)),
    _plain("k=d,b=d", 7, 7, (7, 7)),
    _plain("k=d,b>d", 8, 8, (12, 25)),
    _plain("k>d,b<d", 13, 10, (6, 9)),
    _plain("k>d,b>d", 13, 6, (18, 8, 40)),
    _plain("k>d,b<=>d", 11, 8, (3, 8, 9, 30)),
    _plain("one token", 6, 9, (1,)),
    _case("rank-deficient,b<d", 9, 12, [_low_rank(1, 12, 8, 3), _low_rank(2, 12, 10, 5)]),
    _case("rank-deficient,b>d", 6, 8, [_low_rank(1, 8, 30, 3), _low_rank(2, 8, 21, 5)]),
    _case("duplicated columns,b<d", 7, 12, [_repeated(1, 12, 3, 3), _repeated(2, 12, 5, 2)]),
    _case("duplicated columns,b>d", 12, 7, [_repeated(1, 7, 3, 6), _repeated(2, 7, 6, 4)]),
    _case("decaying spectrum", 10, 8, [_decaying(1, 8, 40), _decaying(2, 8, 24)]),
)


@dataclass(frozen=True)
class Mode:
    """A mode of the method as cntlora's options and as the reference's arguments."""

    name: str
    options: dict[str, Any]
    arguments: dict[str, Any]

    def __repr__(self) -> str:
        return self.name


MODES = (
    # † at the tolerance of rounding, which the reference has, where the method's own is another
    Mode("cross", {"method": "cross", "rtol": 0.0}, {"method": "cross"}),
    Mode("self", {"method": "self"}, {"method": "self", "root": "paper"}),
    Mode("self symmetric", {"method": "self", "root": "symmetric"}, {"method": "self", "root": "symmetric"}),
    Mode("self cholesky", {"method": "self", "root": "cholesky"}, {"method": "self", "root": "cholesky"}),
    Mode("shift", {"method": "shift", "rtol": 0.0}, {"method": "shift"}),
    Mode("shift 0.1", {"method": "shift", "rtol": 0.0, "shift_constant": 0.1}, {"method": "shift", "C": 0.1}),
    Mode("shift 10", {"method": "shift", "rtol": 0.0, "shift_constant": 10}, {"method": "shift", "C": 10.0}),
    Mode(
        "shift gaussian", {"method": "shift", "rtol": 0.0, "shift_constant": "gaussian", "seed": 3}, {"method": "shift"}
    ),
)


def gaussian_constant(k: int, name: str, seed: int) -> np.ndarray:
    """The C (k, k) that a site draws in shift mode with `shift_constant="gaussian"`."""
    return array(shift_constant("gaussian", k, site_generator(seed, name), torch.zeros(1, dtype=torch.float64)))


def reference_delta(mode: Mode, W: np.ndarray, batches: Sequence[np.ndarray], site: str = "site", **more: Any) -> Any:
    """ΔW (k, d) of the reference; `precision` of the inputs is that of float64 unless given."""
    arguments = {**mode.arguments, **more}
    if mode.options.get("shift_constant") == "gaussian":
        arguments["C"] = gaussian_constant(len(W), site, mode.options["seed"])
    return reference.delta(W, list(batches), **arguments)


def moments(X: Tensor, gram: str = "sum", pieces: int = 1) -> Moments:
    """The moments of X (d, b), fed in so many pieces."""
    total = Moments(X.shape[0], gram)
    for rows in X.mT.tensor_split(pieces):
        total.update(rows)
    return total


def absorb(estimator: Any, names: Sequence[str], X: Moments, weight: float) -> None:
    """Add one batch that the sites `names` saw as `X`, times w_j."""
    assert isinstance(estimator, InputReader)
    absorb_batch(estimator, [(names, X)], weight)


def delta(config: InitConfig, W: Tensor, batches: Sequence[Tensor], site: str = "site") -> Tensor:
    """ΔW (k, d) of cntlora's core, one batch at a time."""
    estimator = config.method.estimator(lambda name: W.to(torch.float64, copy=True), config)
    weights = config.method.batch_weights or (1.0,) * len(batches)
    for X, weight in zip(batches, weights, strict=True):
        absorb(estimator, [site], moments(X, config.method.gram, pieces=2), weight)
    M = estimator.target(site, len(batches)).M
    assert M is not None
    return M


# --- modules ------------------------------------------------------------------------------------------------


class Mlp(nn.Module):
    """A stack of nn.Linear that treats every token alike; q, k, v share an input. Accepts (..., 10) features."""

    targets = ("q", "k", "v", "up", "down")
    width = 10

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(10, 14), nn.Linear(10, 14), nn.Linear(10, 14)
        self.up, self.down = nn.Linear(14, 14), nn.Linear(14, 6)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        h = torch.tanh(self.q(x)) * torch.sigmoid(self.k(x)) + self.v(x)
        return self.down(torch.nn.functional.gelu(self.up(h)))


def seeded(make: Callable[[], nn.Module], seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A module with its own default initialisation, the global generator left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().to(dtype)


def mlp(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    return seeded(Mlp, seed, dtype)


def lora(r: int = 3, alpha: float = 6, targets: Sequence[str] = Mlp.targets, **more: Any) -> LoraConfig:
    return LoraConfig(r=r, lora_alpha=alpha, target_modules=list(targets), **more)


def wrapped(base: nn.Module, config: LoraConfig | None = None, how: str = "get_peft_model") -> nn.Module:
    """The base with a fresh adapter, its factors in the dtype of the base. Changes `base` in place, as PEFT does."""
    config = config or lora()
    dtype = next(base.parameters()).dtype
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        if how == "get_peft_model":
            return get_peft_model(base, config).to(dtype)  # type: ignore[arg-type]
        return inject_adapter_in_model(config, base).to(dtype)


def token_batches(
    sizes: Sequence[tuple[int, int]], width: int = 10, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """One (batch, tokens, width) tensor a size."""
    return [draw(200 + i, *size, width).to(dtype) for i, size in enumerate(sizes)]


SIZES = ((2, 3), (4, 7), (1, 2), (3, 5))
"""6, 28, 2 and 15 tokens: fewer and more than the 10 and 14 features of `Mlp`."""


@contextmanager
def recorded(base: nn.Module, names: Sequence[str]) -> Iterator[dict[str, list[Tensor]]]:
    """{name: inputs (b, d), one a call} that the layers of the bare base model see while the context is open."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}

    def hook(name: str) -> Callable[..., None]:
        return lambda module, args: seen[name].append(args[0].detach().clone().reshape(-1, args[0].shape[-1]))

    handles = [base.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def inputs_of(base: nn.Module, batches: Sequence[Tensor], names: Sequence[str] = Mlp.targets) -> dict[str, list[Any]]:
    """{name: [X (d, b_j), one a batch]} as float64 arrays, recorded on the bare base model."""
    with recorded(base, names) as seen, torch.no_grad():
        for batch in batches:
            base(batch)
    return {name: [array(x).T for x in inputs] for name, inputs in seen.items()}


def added(site: Any) -> np.ndarray:
    """scaling·B·A (k, d) of a planned site, multiplied in float64."""
    return site.scaling * array(site.B) @ array(site.A)


def squares(model: nn.Module, batch: Tensor) -> Tensor:
    """A loss for modules that have none."""
    return model(batch).square().mean()


def output_squares(base: nn.Module, batches: list[Tensor]) -> dict[str, np.ndarray]:
    """The mean over tokens of (b·∂L/∂y)² (k,), b samples a batch, on the bare base model, by autograd alone."""
    base = copy.deepcopy(base)
    outputs: dict[str, list[Tensor]] = {name: [] for name in Mlp.targets}
    for name in Mlp.targets:
        base.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: (output.retain_grad(), outputs[name].append(output))[0]
        )
    for batch in batches:
        squares(base, batch).backward()
    each = {name: [array(len(y) * y.grad).reshape(-1, y.shape[-1]) for y in found] for name, found in outputs.items()}
    return {name: np.mean(np.vstack(rows) ** 2, axis=0) for name, rows in each.items()}


def gradients(base: nn.Module, batches: list[Tensor]) -> dict[str, np.ndarray]:
    """The mean over batches of ∂L/∂W (k, d) on the bare base model, by autograd alone."""
    base = copy.deepcopy(base)
    for batch in batches:
        (squares(base, batch) / len(batches)).backward()
    return {name: array(base.get_submodule(name).weight.grad) for name in Mlp.targets}
