"""The counter of operations, bytes, launches and waits: exact on known code, and a control for each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from benchmarks import count_work
from benchmarks.work import LAUNCH, WAIT, Solvers, Work, WorkCounter

RATES = {part: [(512, 1e11), (1024, 1e12), (2048, 2e12)] for part in ("eigh", "cholesky", "inverse", "qr")}
SOLVERS, LOOPS = Solvers(RATES), Solvers(RATES, batched=False)


def counted(work: Callable[[], object]) -> Work:
    with WorkCounter() as found:
        work()
    return found


def test_a_product_is_counted_by_its_shapes() -> None:
    A, B = torch.ones(3, 5), torch.ones(5, 7)
    found = counted(lambda: A @ B)
    assert found.operations == {("product", "float32"): 2 * 3 * 5 * 7}
    assert found.bytes == 4 * (15 + 35 + 21) and found.launches == 1 and found.waits == 0
    assert counted(lambda: A.double() @ B.double()).operations == {("product", "float64"): 210}


def test_views_are_free_and_their_copies_are_not() -> None:
    A = torch.ones(4, 6)
    assert counted(lambda: A.mT[:2].unflatten(1, (2, 2))).launches == 0
    assert counted(lambda: A.mT.contiguous()).launches == 1


@pytest.mark.parametrize(
    "work, waits",
    [
        (lambda x: float(x.sum()), 1),
        (lambda x: bool((x > 0).all()), 1),
        (lambda x: x.tolist(), 1),
        (lambda x: x[x > 0], 1),
        (lambda x: [int(x[0]), int(x[1])], 2),
        (lambda x: (x + 1).sum(), 0),
        (lambda x: torch.where(x > 0, x, 0.0), 0),
        (lambda x: x[torch.tensor([0, 1])], 0),
    ],
)
def test_a_wait_is_a_value_that_python_asks_for(work: Callable[[torch.Tensor], object], waits: int) -> None:
    x = torch.arange(1.0, 5.0)
    assert counted(lambda: work(x)).waits == waits


def test_factorisations_are_counted_with_their_stacks() -> None:
    S = torch.eye(6, dtype=torch.float64).repeat(5, 1, 1)
    found = counted(lambda: (torch.linalg.cholesky_ex(S), torch.linalg.eigh(S[0]), torch.linalg.cholesky_ex(S[1])))
    assert found.calls == {
        ("cholesky", "float64", 6, 6, 5): 1,
        ("cholesky", "float64", 6, 6, 1): 1,
        ("eigh", "float64", 6, 6, 1): 1,
    }
    assert found.operations["cholesky", "float64"] == pytest.approx(6 * 6**3 / 3)
    assert found.operations["eigh", "float64"] == 9 * 6**3


def test_a_backward_pass_counts_twice_its_forward_pass() -> None:
    weight = torch.ones(8, 8, requires_grad=True)
    x = torch.ones(2, 8, requires_grad=True)

    def there_and_back() -> None:
        (x @ weight).sum().backward()

    assert counted(there_and_back).operations == {("product", "float32"): 3 * 2 * 2 * 8 * 8}


def test_seconds_follow_the_measured_rates() -> None:
    assert SOLVERS("eigh", 1024, 1024) == pytest.approx(9 * 1024**3 / 1e12)
    assert LOOPS("eigh", 512, 512) == pytest.approx(9 * 512**3 / 1e11)  # by Jacobi in float32
    assert LOOPS("eigh", 512, 512, torch.float64) == pytest.approx(9 * 1024**3 / 1e12 / 2)
    assert SOLVERS("cholesky", 64, 64) == pytest.approx(SOLVERS("cholesky", 512, 512) / 8)
    assert SOLVERS("cholesky", 1024, 1024) < SOLVERS("cholesky", 1500, 1500) < SOLVERS("cholesky", 2048, 2048)
    assert SOLVERS("inverse", 4096, 4096) == pytest.approx(8 * SOLVERS("inverse", 2048, 2048))
    work = Work(launches=3, waits=4)
    work.calls["cholesky", "float32", 1024, 1024, 6] = 2
    work.calls["qr", "float32", 1024, 512, 6] = 2
    seconds = work.record(SOLVERS)["seconds"]
    assert seconds["waits"] == 4 * WAIT and seconds["cholesky"] == pytest.approx(2 * SOLVERS("cholesky", 1024, 1024))
    assert seconds["qr"] == pytest.approx(12 * SOLVERS("qr", 1024, 512))  # one after another
    assert work.times(2.0).record(SOLVERS)["h100_seconds"] == pytest.approx(2 * sum(seconds.values()))
    assert counted(lambda: torch.ones(1)).seconds["other"] == pytest.approx(LAUNCH)


def test_stacks_of_eigenvectors_follow_the_batched_solver() -> None:
    """Its published seconds: 1.67 ms for one of 512 rows, 14.61 ms for 64 of them, 2.39 ms for 16 of 256."""

    def seconds(solvers: Solvers, n: int, stack: int) -> float:
        work = Work()
        work.calls["eigh", "float32", n, n, stack] = 1
        return float(work.record(solvers)["seconds"]["eigh"])

    assert seconds(SOLVERS, 512, 1) == pytest.approx(1.67e-3)
    assert seconds(SOLVERS, 512, 64) == pytest.approx(14.61e-3, rel=0.02)
    assert seconds(SOLVERS, 256, 16) == pytest.approx(2.39e-3, rel=0.05)
    assert seconds(SOLVERS, 2048, 2) <= 2 * seconds(SOLVERS, 2048, 1)  # never more than one after another
    assert seconds(LOOPS, 512, 64) == pytest.approx(64 * seconds(LOOPS, 512, 1))  # control


def test_a_method_is_counted_and_put_into_the_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "work.json"
    for row in ("forward pass", "self"):
        count_work.main(["--case", "tiny", "--rows", row, "--out", str(path)])
    rows = json.loads(path.read_text())["tiny"]["rows"]
    assert set(rows) == {"forward pass", "self"}
    assert rows["self"]["operations"]["product float32"] > rows["forward pass"]["operations"]["product float32"]
    assert any(key.startswith("eigh") for key in rows["self"]["factorisations"])
    assert rows["forward pass"]["factorisations"] == {}  # control
    count_work.main(["--table", "--out", str(path)])
    assert "| `self` |" in capsys.readouterr().out
    count_work.main(["--rerate", "--out", str(path)])
    for name, again in json.loads(path.read_text())["tiny"]["rows"].items():
        assert again["seconds"] == pytest.approx(rows[name]["seconds"])
        assert again["factorisations"] == rows[name]["factorisations"]
    slower = count_work.rerated(rows["self"], LOOPS)  # control: other rates
    assert slower["h100_seconds"] != rows["self"]["h100_seconds"] and slower["launches"] == rows["self"]["launches"]
    with pytest.raises(SystemExit, match="--rows: 'selfish' is not known"):
        count_work.main(["--rows", "selfish", "--out", str(path)])
