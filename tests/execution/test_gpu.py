"""A GPU: the plan of the CPU, no wait in the hooks, TF32 off, the model left on its device. Skipped without one."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tests.tiny import KINDS, adapted, logits, state, text_batches, train
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import cntlora
from cntlora import InitConfig, compute_plan, initialize
from cntlora.data.collect import collect
from cntlora.execution.arguments import Request
from cntlora.execution.executor import LocalExecutor
from cntlora.execution.reading import read_statistics
from cntlora.linalg.low_rank import product_of_halves, sums_in_float32
from cntlora.linalg.parallel import STREAMS, side_by_side

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
METHODS = ("cross", "self", "shift", "corda", "lora_ga", "lora_one", "pissa", "olora")


def on_gpu(batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [{key: value.cuda() for key, value in batch.items()} for batch in batches]


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def distance(one: cntlora.SitePlan, other: cntlora.SitePlan) -> float:
    """‖B·A − B'·A'‖ / ‖B·A‖ of the halves that train."""
    first, second = (s.B[:, : s.rank].double().cpu() @ s.A[: s.rank].double().cpu() for s in (one, other))
    return float(torch.linalg.matrix_norm(first - second) / torch.linalg.matrix_norm(first))


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2", "vit"])
@pytest.mark.parametrize("method", METHODS)
def test_the_plan_is_that_of_the_cpu(method: str, kind: str) -> None:
    """Directions whose eigenvalues are rounding may differ, hence the tolerance of the pseudo-inverse."""
    options = {"rtol": 1e-3} if method in ("cross", "self", "shift") else {}
    config = InitConfig.from_dict({"method": method, **options})
    batches = KINDS[kind].batches(count=3)
    model = adapted(kind)
    with tf32(False):
        here = compute_plan(model, batches, config)
        there = compute_plan(adapted(kind).cuda(), on_gpu(batches), config)
        other = compute_plan(model, KINDS[kind].batches(count=3, seed=1), config)
    for name, site in here.sites.items():
        assert there.sites[name].A.device.type == "cuda"
        assert distance(site, there.sites[name]) < 2e-3, name
    if method not in ("pissa", "olora"):  # control: other data, another plan
        assert max(distance(site, other.sites[name]) for name, site in here.sites.items()) > 2e-3


def test_batches_on_the_cpu_are_brought_to_the_model() -> None:
    batches = text_batches()
    one, two = (
        compute_plan(adapted().cuda(), given, InitConfig(method="self")) for given in (batches, on_gpu(batches))
    )
    assert all(torch.equal(site.A, two.sites[name].A) for name, site in one.sites.items())


def test_training_goes_on_where_the_base_model_was() -> None:
    model, batches = adapted().cuda(), on_gpu(text_batches())
    with model.disable_adapter():
        base = logits(model, batches[0])
    before, generator = state(model), torch.cuda.get_rng_state()
    initialize(model, batches, InitConfig(method="self", adaptive_ranks=True))
    assert torch.equal(generator, torch.cuda.get_rng_state())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items() if "lora_" not in k)
    assert float((logits(model, batches[0]) - base).abs().max()) < 1e-3  # the halves cancel up to rounding
    losses = train(model, [batches[0]], steps=12)  # one batch again and again
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("method", ["cross", "self", "eva"])
def test_tf32_of_the_user_does_not_reach_the_sums(method: str) -> None:
    batches = [torch.randn(64, 300, generator=torch.Generator().manual_seed(i)).cuda() for i in range(2)]

    def plan() -> cntlora.InitPlan:
        from peft import LoraConfig, get_peft_model

        with torch.random.fork_rng():
            torch.manual_seed(0)
            model: Any = torch.nn.Sequential(torch.nn.Linear(300, 280), torch.nn.Linear(280, 10)).cuda()
        adapted_model: Any = get_peft_model(model, LoraConfig(target_modules=["0"], r=4))
        return compute_plan(adapted_model.half() if method == "cross" else adapted_model, half(batches), config)

    def half(given: list[Tensor]) -> list[Tensor]:
        return [x.half() for x in given] if method == "cross" else given

    config = InitConfig(method=method)
    with tf32(True):
        fast = plan()
        assert not torch.equal(batches[0].mT @ batches[0], exact(batches[0]))  # control: TF32 is on out here
    with tf32(False):
        plain = plan()
    assert all(torch.equal(site.A, plain.sites[name].A) for name, site in fast.sites.items())


def exact(x: Tensor) -> Tensor:
    with tf32(False):
        return x.mT @ x


def test_matrix_units_sum_in_float32() -> None:
    left, right = (torch.randn(300, 2000, generator=torch.Generator().manual_seed(i)).bfloat16().cuda() for i in (0, 1))
    assert sums_in_float32(left.dtype, left.device)
    found, expected = product_of_halves(left, right.mT).double(), left.double() @ right.double().mT
    assert found.dtype == torch.float64 and float((found - expected).norm() / expected.norm()) < 1e-5
    assert float(((left @ right.mT).double() - expected).norm() / expected.norm()) > 1e-4  # control: rounded sums


def llama(layers: int) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LlamaConfig(
        vocab_size=512, hidden_size=64, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=96,
        initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = LlamaForCausalLM(config).to(torch.bfloat16).cuda().eval()
        targets = ["q_proj", "k_proj", "o_proj", "up_proj", "down_proj"]
        return get_peft_model(base, LoraConfig(target_modules=targets, r=4, lora_alpha=8))  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["cross", "eva", "lora_ga"])
def test_the_data_pass_does_not_wait_for_every_layer(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of synchronisations is the same for two layers and for eight."""
    ids = torch.randint(3, 512, (4, 64), generator=torch.Generator().manual_seed(0)).cuda()
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    counts: list[int] = []

    def counted(*args: Any, **options: Any) -> Any:
        seen: list[Any] = []
        counts.append(synchronisations(lambda: seen.append(collect(*args, **options))))
        return seen[0]

    monkeypatch.setattr("cntlora.execution.reading.collect", counted)
    options = {"rtol": 1e-6} if method == "cross" else {}  # an input without full rank waits for its eigenvalues
    for layers in (2, 2, 8):  # the first call loads libraries
        config = InitConfig.from_dict({"method": method, **options})
        read_statistics(Request(llama(layers), [batch], config), LocalExecutor())
    assert counts[1] == counts[2] > 0
    assert synchronisations(lambda: [float(ids.sum()) for _ in range(5)]) == 5  # control


def synchronisations(work: Any) -> int:
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in caught)


@pytest.mark.parametrize("method", ["cross", "self", "shift", "corda", "eva", "lora_ga"])
def test_streams_change_no_bit(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several factorisations at a time, and one after another."""
    batches = on_gpu(KINDS["llama"].batches(count=3))
    config = InitConfig(method=method, adaptive_ranks=True)
    several, again = (compute_plan(adapted("llama").cuda(), batches, config) for _ in range(2))
    monkeypatch.setattr("cntlora.linalg.parallel._on_streams", lambda work, items, device: [work(x) for x in items])
    one = compute_plan(adapted("llama").cuda(), batches, config)
    for name, site in one.sites.items():
        for other in (several, again):
            assert torch.equal(site.A, other.sites[name].A) and torch.equal(site.B, other.sites[name].B), name


def test_several_streams_are_at_work_and_an_error_comes_out() -> None:
    names: set[int] = set()

    def work(item: int) -> int:
        names.add(torch.cuda.current_stream().cuda_stream)
        torch.linalg.eigh(torch.eye(300, device="cuda") * (1 + item))
        return 1 // (5 - item)

    device = torch.device("cuda", 0)
    with pytest.raises(ZeroDivisionError):
        side_by_side(work, range(8), [300] * 8, device)
    assert len(names) == STREAMS
    before = len(names)
    side_by_side(work, range(3), [300] * 3, device, streams=False)
    assert len(names) == before + 1  # this thread's own
