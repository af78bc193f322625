"""Random models, data and options: a correct plan or a documented error, never a hang, a NaN or a leftover hook."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from tests import fuzz_judge
from tests.fuzz_judge import judge, outcomes

from cntlora.linalg import factors as factor
from cntlora.methods import factors as method_factors


def kinds(found: Counter[str]) -> Counter[str]:
    """Outcomes without the text of the errors."""
    total: Counter[str] = Counter()
    for outcome, count in found.items():
        total[outcome.partition(":")[0]] += count
    return total


def test_random_uses_end_well() -> None:
    found = kinds(outcomes(60))
    assert found.total() >= 60 and found["plan"] >= 20 and found["refused"] >= 5, found


@pytest.mark.slow
def test_thousands_of_random_uses_end_well() -> None:
    found = outcomes(2000, first=1)
    counts = kinds(found)
    assert counts.total() >= 2000 and counts["plan"] >= 800 and counts["refused"] >= 300, counts
    assert len(found) > 200  # of many different errors


def judged(fault: str) -> str:
    """Return what the judge says of random uses of a library with a fault."""
    try:
        outcomes(60)
    except AssertionError as error:
        return str(error)
    return f"nothing about {fault}"


def test_faults_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: a NaN in a factor, halves that do not cancel, a moved generator, a changed weight."""
    plain = factor.svd_factors
    with monkeypatch.context() as patch:
        patch.setattr(
            "cntlora.execution.site_plans.offset", lambda B, A: (torch.cat([B, -0.9 * B], 1), torch.cat([A, A]))
        )
        assert "the start is off" in judged("halves")
    with monkeypatch.context() as patch:
        patch.setattr(method_factors, "svd_factors", lambda *a: [plain(*a), torch.rand(1)][0])
        assert "random generator" in judged("the generator")
    with monkeypatch.context() as patch:
        patch.setattr("cntlora.model.checks.check_fresh", lambda site: site.base.weight.data.add_(1e-3))
        assert "weight was changed" in judged("a weight") or "traces" in judged("a weight")
    with monkeypatch.context() as patch:
        patch.setattr(fuzz_judge, "start", lambda case, model: (_ for _ in ()).throw(ValueError("no")))
        assert "ValueError: no" in judged("an error that names nothing")


def test_a_case_can_be_judged_again() -> None:
    from tests.fuzz_cases import Batches, Case

    case = Case(
        tree=("sequence", [("linear", 8, True, "plain"), ("conv1d", 6)]), width=12, dtype="float32", targets=3,
        lora={"r": 2, "lora_alpha": 4}, batches=Batches(2, 4, 8, "mapping", "left", "tokens", "no", 1.0),
        config={"method": "self"}, call={"on_missing": "raise"}, training=True, by_plan=True, reload=True, seed=0,
    )  # fmt: skip
    assert judge(case) == "plan"
