"""Random module trees for the fuzz tests, from plain nested tuples that a failing case prints."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

Node = tuple[Any, ...]
MAPS = ("linear", "conv1d")
ODD = ("conv2d", "attention")


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Parallel(nn.Module):
    """Layers with the same input, whose outputs are added; some are never called."""

    def __init__(self, branches: dict[str, nn.Module], called: int) -> None:
        super().__init__()
        self.branches, self.called = nn.ModuleDict(branches), called

    def forward(self, x: Tensor) -> Tensor:
        return sum(layer(x) for layer in list(self.branches.values())[: self.called])  # type: ignore[return-value]


class Repeated(nn.Module):
    """One module that is called several times in a forward pass."""

    def __init__(self, inner: nn.Module, times: int) -> None:
        super().__init__()
        self.inner, self.times = inner, times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = torch.tanh(self.inner(x))
        return x


class Tied(nn.Module):
    """Two layers that share one weight."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(d, d), nn.Linear(d, d)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.relu(self.one(x)))


class Shared(nn.Module):
    """One layer under two names."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.first = nn.Linear(d, d)
        self.again = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.again(torch.relu(self.first(x)))


class Convolved(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.reshape(1, 1, -1, x.shape[-1])).reshape(x.shape) if x.numel() else x


class Attending(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(d, 1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0].contiguous()  # Conv1D takes no other


class Whole(nn.Module):
    """The model: x, a mask that it ignores, and labels that give a loss of a chosen scale."""

    def __init__(self, body: nn.Module, scale: float) -> None:
        super().__init__()
        self.body, self.scale = body, scale

    def forward(self, x: Tensor, attention_mask: Any = None, labels: Any = None) -> Any:
        y = self.body(x)
        if labels is None:
            return y
        return {"loss": self.scale * (y.float() - 1.0).square().mean(), "out": y}


ACTS: dict[str, Any] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "dropout": lambda: nn.Dropout(0.3),
    "identity": nn.Identity,
}


def build(node: Node, d: int) -> tuple[nn.Module, int]:
    """The module of a node for inputs (…, d), and the size of its outputs."""
    kind, *rest = node
    if kind == "linear":
        layer = nn.Linear(d, rest[0], bias=rest[1])
        if rest[2] == "zero":
            nn.init.zeros_(layer.weight)
        elif rest[2] != "plain":
            layer.weight.data.mul_(rest[2])
        return layer, rest[0]
    if kind == "conv1d":
        return Conv1D(rest[0], d), rest[0]
    if rest[0:1] == ["in place"]:  # on the output of a layer, where a backward pass allows it
        return nn.Sequential(nn.Linear(d, d), nn.ReLU(inplace=True)), d
    if kind == "act":
        return (nn.LayerNorm(d) if rest[0] == "norm" else ACTS[rest[0]]()), d
    if kind == "sequence":
        layers, size = [], d
        for inner in rest[0]:
            layer, size = build(inner, size)
            layers.append(layer)
        return nn.Sequential(*layers), size
    if kind == "parallel":
        branches = {f"b{i}": build(("linear", rest[0], True, "plain"), d)[0] for i in range(rest[1])}
        return Parallel(branches, rest[2]), rest[0]
    if kind in ("residual", "repeated"):
        layer = nn.Sequential(build(rest[0], d)[0])
        back = nn.Linear(build(rest[0], d)[1], d)
        inner = nn.Sequential(layer, back)
        return (Residual(inner) if kind == "residual" else Repeated(inner, rest[1])), d
    return {"tied": Tied, "shared": Shared, "conv2d": Convolved, "attention": Attending}[kind](d), d


_size = st.sampled_from([4, 5, 6, 7, 8, 9, 11, 12, 15, 16, 17, 24, 32, 33, 40, 3, 2, 1])
_weights = st.sampled_from(["plain"] * 12 + ["zero", 1e-6, 1e4])
_linear = st.tuples(st.just("linear"), _size, st.booleans(), _weights)
_leaf = st.one_of(
    _linear,
    _linear,
    st.tuples(st.just("conv1d"), _size),
    st.tuples(st.just("act"), st.sampled_from([*ACTS, "norm", "in place"])),
    st.tuples(st.just("parallel"), _size, st.integers(2, 3), st.integers(1, 3)),
    st.sampled_from([("tied",), ("shared",), ("conv2d",), ("attention",)]),
)


def _larger(inner: st.SearchStrategy[Node]) -> st.SearchStrategy[Node]:
    return st.one_of(
        st.tuples(st.just("sequence"), st.lists(inner, min_size=1, max_size=3).map(tuple)),
        st.tuples(st.just("residual"), inner),
        st.tuples(st.just("repeated"), inner, st.integers(1, 3)),
    )


sizes = _size
trees = st.tuples(st.just("sequence"), st.lists(st.recursive(_leaf, _larger, max_leaves=4), min_size=1, max_size=4))
"""Descriptions of modules, for `build`."""
