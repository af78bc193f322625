"""Work side by side gives what it gives alone, and full precision is full whatever the caller has switched on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest
import torch
from benchmarks.work import WorkCounter
from tests.cases import draw, lora, mlp, moments, relative_error, token_batches, wrapped
from tests.conftest import RunFresh
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import cntlora
from cntlora import InitConfig
from cntlora.linalg.low_rank import symmetric_product
from cntlora.linalg.parallel import SIDE_BY_SIDE, full_precision, once, side_by_side
from cntlora.methods.estimator import absorb_batch
from cntlora.methods.method import METHODS

CPU = torch.device("cpu")


@pytest.fixture
def two_threads() -> None:
    torch.set_num_threads(2)


def test_results_come_in_order_and_from_several_threads(two_threads: None) -> None:
    barrier, names = threading.Barrier(2, timeout=20), set()

    def work(item: int) -> int:
        if item < 2:
            barrier.wait()  # passes only if two run at once
        names.add(threading.current_thread().name)
        assert torch.get_num_threads() == 1 and not torch.is_grad_enabled()
        return item**2

    assert side_by_side(work, range(6), [10] * 6, CPU) == [0, 1, 4, 9, 16, 25]
    assert len(names) == 2 and torch.get_num_threads() == 2


SAME_BITS = """
import torch
torch.set_num_threads(4)
from tests.tiny import adapted, text_batches
from cntlora import InitConfig, compute_plan
plans = [compute_plan(adapted(), text_batches(3), InitConfig(method="self")) for _ in range(2)]
print(all(torch.equal(site.A, plans[1].sites[name].A) for name, site in plans[0].sites.items()))
"""


@pytest.mark.slow
def test_the_first_plan_of_a_process_has_the_bits_of_the_next(run_fresh: RunFresh) -> None:
    """A new thread would begin with the process's number of threads: False without `_with_one_thread`."""
    assert run_fresh(SAME_BITS, threads=4).split()[-1] == "True"


def test_large_matrices_stay_in_this_thread_and_company_changes_nothing(two_threads: None) -> None:
    here = threading.current_thread().name
    names = side_by_side(lambda _: threading.current_thread().name, range(3), [4, SIDE_BY_SIDE + 1, 4], CPU)
    assert names[1] == here and here not in (names[0], names[2])
    matrices = [draw(i, 300, 300) for i in range(4)]
    together = side_by_side(torch.linalg.inv, matrices, [300] * 4, CPU)
    assert torch.equal(together[2], side_by_side(torch.linalg.inv, matrices[2:3], [300], CPU)[0])
    assert not torch.equal(together[2], together[1])  # control


@pytest.mark.parametrize(("how", "runs", "patience"), [(once, 1, 0.5), (cache, 2, 20)])  # control: `cache` alone
def test_threads_that_ask_for_the_same_make_it_once(
    two_threads: None, how: Callable[[Callable[[int], int]], Callable[[int], int]], runs: int, patience: float
) -> None:
    asking, together, made = threading.Barrier(2, timeout=20), threading.Event(), []

    def make(item: int) -> int:
        made.append(item)
        if len(made) == 2:
            together.set()
        together.wait(patience)  # so long that the other thread asks too
        return 2 * item

    shared = how(make)

    def work(_: int) -> int:
        asking.wait()
        return shared(3)

    assert side_by_side(work, range(2), [10] * 2, CPU) == [6, 6] and len(made) == runs


def test_an_error_comes_out_and_the_threads_are_as_before(two_threads: None) -> None:
    with pytest.raises(ZeroDivisionError):
        side_by_side(lambda item: 1 // item, [1, 0, 2], [4] * 3, CPU)
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(("waits", "patience"), [(True, 0.5), (False, 20)])  # control: a pool alone does not wait
def test_no_thread_is_at_work_any_more_when_an_error_comes_out(two_threads: None, waits: bool, patience: float) -> None:
    working, begun, seen = set(), threading.Event(), threading.Event()

    def work(item: int) -> None:
        if item == 0:
            begun.wait(20)
            raise ZeroDivisionError
        working.add(item)
        begun.set()
        seen.wait(patience)
        working.remove(item)

    with pytest.raises(ZeroDivisionError):
        if waits:
            side_by_side(work, range(9), [4] * 9, CPU)
        else:
            list(ThreadPoolExecutor(2).map(work, range(9)))
    assert begun.is_set() and bool(working) is not waits
    seen.set()


@pytest.mark.parametrize("method", ["cross", "self", "shift", "eva", "corda", "pissa", "olora"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_a_plan_does_not_depend_on_the_threads(method: str, adaptive: bool, two_threads: None) -> None:
    """Within rounding: the factorisations are the same, but the forward pass is of all threads."""
    config = InitConfig(method=method, adaptive_ranks=adaptive)
    model, batches = wrapped(mlp(), lora()), token_batches([(3, 10), (1, 5), (2, 6)])
    two = cntlora.compute_plan(model, batches, config)
    torch.set_num_threads(1)
    one = cntlora.compute_plan(model, batches, config)
    for name, site in one.sites.items():
        assert site.rank == two.sites[name].rank
        assert relative_error(two.sites[name].A, site.A) < 1e-9 and relative_error(two.sites[name].B, site.B) <= 1e-9
    if method not in ("pissa", "olora"):  # control: one batch fewer
        other = cntlora.compute_plan(model, batches[:2], config)
        pairs = [(site.A, other.sites[name].A) for name, site in one.sites.items()]
        assert any(A.shape != B.shape or relative_error(B, A) > 1e-3 for A, B in pairs)


def test_full_precision_undoes_autocast_and_gives_back_what_was() -> None:
    x = draw(0, 64, 64).float()
    exact = x.double() @ x.double()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert relative_error((x @ x).double(), exact) > 1e-3  # control
            with full_precision(CPU):
                assert relative_error(x @ x, exact) < 1e-6
                assert torch.get_float32_matmul_precision() == "highest" or hasattr(
                    torch.backends.cuda.matmul, "fp32_precision"
                )
            assert (x @ x).dtype == torch.bfloat16
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("method", ["cross", "self", "shift"])
def test_autocast_around_the_call_changes_no_statistic(method: str) -> None:
    config, batches = InitConfig.from_dict({"method": method, "rtol": 1e-3}), token_batches([(3, 10), (4, 10)])

    def in_float32(model: torch.nn.Module, batch: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return model(batch)  # type: ignore[no-any-return]

    plain = cntlora.compute_plan(wrapped(mlp(dtype=torch.float32), lora()), [b.float() for b in batches], config)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = cntlora.compute_plan(
            wrapped(mlp(dtype=torch.float32), lora()), [b.float() for b in batches], config, forward=in_float32
        )
    for name, site in plain.sites.items():
        assert torch.equal(site.A, mixed.sites[name].A) and torch.equal(site.B, mixed.sites[name].B)


class ReadsBack(TorchDispatchMode):
    """Counts the operations that make a GPU wait for its results."""

    waits = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func.overloadpacket.__name__.split(".")[-1] in self.waits
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["cross", "shift"])
def test_a_batch_is_read_back_once_however_many_inputs_it_has(method: str) -> None:
    """Stand-in for no synchronisation a layer on a GPU; `.tolist()` of one tensor counts once an element."""

    def reads(inputs: int) -> int:
        W = draw(0, 9, 6)
        estimator = METHODS[method]().estimator(lambda name: W, InitConfig(method="self"))
        groups = [((f"site{i}",), moments(draw(i, 6, 40))) for i in range(inputs)]
        if method == "shift":  # its condition of W is one read a site and not one a batch
            absorb_batch(estimator, groups, 1.0)  # type: ignore[arg-type]
        with ReadsBack() as mode:
            absorb_batch(estimator, groups, 1.0)  # type: ignore[arg-type]
        return mode.count

    assert reads(2) == reads(12)
    with ReadsBack() as mode:  # control
        for _ in range(3):
            bool(torch.ones(1).any())
    assert mode.count == 3


@pytest.mark.parametrize("method", ["self", "cross"])
def test_eigenpairs_of_equal_shapes_are_found_by_one_call(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: one call for each shape, one look at all eigenvalues, and the sums of the work one by one."""
    solved: list[tuple[int, ...]] = []
    solver = torch.linalg.eigh

    def watched(S: Tensor) -> tuple[Tensor, Tensor]:
        solved.append(tuple(S.shape))
        values, vectors = solver(S)
        return values, vectors

    def sums(inputs: list[Tensor]) -> tuple[list[Tensor], int]:
        estimator = METHODS[method]().estimator(lambda name: inputs[0], InitConfig(method="self"))
        groups = [((f"site{i}",), moments(X)) for i, X in enumerate(inputs)]
        with WorkCounter() as work:
            absorb_batch(estimator, groups, 1.0)  # type: ignore[arg-type]
        found = [estimator.accumulated[0].get(f"site{i}") for i in range(len(inputs))]
        return [T for T in found if T is not None], int(work.waits)

    primal, dual = [draw(i, 9, 40) for i in range(4)], [draw(i, 30, 7) for i in range(3)]
    for X in (*primal, *dual):
        X[:, 0] = X[:, 1] * (1 + 1e-9)  # rank-poor, so that † has to drop something
        X[0] = X[1] * (1 + 1e-9)
    monkeypatch.setattr(torch.linalg, "eigh", watched)
    alone, _ = sums([*primal, *dual])
    assert solved == 4 * [(1, 9, 9)] + 3 * [(1, 7, 7)]  # control
    monkeypatch.setattr("cntlora.methods.estimator.END_TO_END", ())
    solved.clear()
    together, waits = sums([*primal, *dual])
    assert solved == [(4, 9, 9), (3, 7, 7)]
    assert len(alone) == len(together) == 7
    assert all(relative_error(one, other) < 1e-12 for one, other in zip(together, alone, strict=True))
    assert waits == sums([*primal[:2], *dual[:1]])[1] <= 2


@pytest.mark.parametrize(("n", "d"), [(3, 300), (700, 300), (50, 7), (2000, 513)])
def test_the_symmetric_product_by_blocks(n: int, d: int) -> None:
    rows = draw(0, n, d)
    product = symmetric_product(rows)
    assert relative_error(product, rows.mT @ rows) < 1e-14
    assert relative_error(product, rows.mT @ rows + torch.eye(d)) > 1e-8  # control
    assert float((product - product.mT).abs().max()) <= 1e-12 * float(product.abs().max())
