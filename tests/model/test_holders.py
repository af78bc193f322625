"""Other holders of an adapter's parameters: told by reference counts, and searched for only if there is any."""

from __future__ import annotations

import gc
from collections.abc import Callable
from types import GeneratorType
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.tiny import KINDS, adapted, text_batches
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cntlora import InitConfig, initialize
from cntlora.model import holders
from cntlora.model.sites import find_sites

Looks = list[int]


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Looks:
    """Grow with every look at all Python objects."""
    made: Looks = []
    search = holders._holders

    def counted() -> list[Any]:
        made.append(0)
        return search()

    monkeypatch.setattr(holders, "_holders", counted)
    return made


@pytest.mark.parametrize("base", ["offset", "paired", "subtract", "keep"])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_searched_where_the_model_alone_holds_its_factors(
    kind: str, base: str, dora: bool, looks: Looks
) -> None:
    initialize(adapted(kind, use_dora=dora), KINDS[kind].batches(), InitConfig(method="self", base=base))
    assert not looks


@pytest.mark.parametrize("method", ["self", "pissa", "eva", "lora_ga", "descent"])
def test_no_method_leaves_a_reference(method: str, looks: Looks) -> None:
    """Also after a backward pass of the caller, whose graph is gone."""
    model = adapted()
    model(**text_batches()[0]).loss.backward()
    initialize(model, text_batches(), InitConfig(method=method, base="paired" if method == "self" else None))
    assert not looks


class Mixed(nn.Module):
    """An embedding, whose factors are in a ParameterDict, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.conv = nn.Embedding(20, 8), nn.Conv1d(8, 8, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.conv(self.table(ids).mT)


def mixed() -> Any:
    return get_peft_model(Mixed(), LoraConfig(r=2, target_modules=["table", "conv"]))


def test_factors_of_embeddings_and_convolutions_are_counted(looks: Looks) -> None:
    initialize(mixed(), config=InitConfig(method="pissa"))
    assert not looks
    model = mixed()
    kept = [torch.optim.SGD([layer.A], lr=0.1) for layer in find_sites(model)[0][:1]]
    with pytest.raises(ValueError, match=r"site table: an optimizer \(SGD\)"):
        initialize(model, config=InitConfig(method="pissa"))
    assert looks and kept


def in_a_group(model: Any) -> object:
    """One factor of the last site alone, in a group added later."""
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
    optimizer.add_param_group({"params": [find_sites(model)[0][-1].B]})
    return optimizer


HOLDERS: dict[str, Callable[[Any], object]] = {
    "all that trains": lambda m: torch.optim.AdamW([p for p in m.parameters() if p.requires_grad]),
    "one factor in a group of its own": in_a_group,
    "LBFGS": lambda m: torch.optim.LBFGS([p for p in m.parameters() if p.requires_grad]),
    "an optimizer inside another object": lambda m: {"state": [torch.optim.SGD(m.parameters(), lr=0.1)]},
}


@pytest.mark.parametrize("name", HOLDERS)
def test_every_optimizer_is_found(name: str) -> None:
    model = adapted()
    kept = HOLDERS[name](model)
    with pytest.raises(ValueError, match="an optimizer .* already holds its parameters"):
        initialize(model, text_batches(), config=InitConfig(method="self"))
    del kept
    initialize(model, text_batches(), config=InitConfig(method="self"))  # the control: it is gone


def test_a_refusal_leaves_no_search_half_done() -> None:
    """A suspended generator held every object of the process, and Python 3.10 aborted when it was collected."""

    def searches() -> list[object]:
        return [
            o for o in gc.get_objects() if isinstance(o, GeneratorType) and o.gi_code.co_filename == holders.__file__
        ]

    model = adapted()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="already holds its parameters") as caught:
        initialize(model, text_batches(), InitConfig(method="self"))
    assert caught.tb is not None and optimizer and not searches()


def test_ddp_counts_as_a_holder(process_group: None, looks: Looks) -> None:
    model = adapted()
    wrapped = DistributedDataParallel(model)
    with pytest.raises(ValueError, match="already wrapped in DistributedDataParallel"):
        initialize(model, text_batches(), config=InitConfig(method="self"))
    assert looks and wrapped is not None


def test_a_list_of_the_caller_is_no_optimizer(looks: Looks) -> None:
    """It costs the search, and is in nobody's way."""
    model = adapted()
    kept = list(model.parameters())
    initialize(model, text_batches(), config=InitConfig(method="self"))
    assert looks and kept
