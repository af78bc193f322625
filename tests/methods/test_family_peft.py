"""Agreement with PEFT's own initialisations on a real model, and their defects, each documented and pinned.

A difference that PEFT mends will show here: `PINNED` says for which versions a defect was seen.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import peft
import pytest
import torch
from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from tests import bounds
from tests.cases import recorded
from torch import Tensor

from cntlora import InitConfig, compute_plan
from cntlora.lab.recipes.text.classification import SequenceTask
from cntlora.lab.recipes.text.sentiment import TARGET_MODULES, TweetsSettings, make_task
from cntlora.model.sites import Site, find_sites
from cntlora.plan import InitPlan

pytestmark = pytest.mark.packages
PINNED = "0.21."
Batch = dict[str, Tensor]


@pytest.fixture(scope="module")
def task() -> SequenceTask:
    return make_task(TweetsSettings(eval_size=64))


@pytest.fixture(scope="module")
def batches(task: SequenceTask) -> list[Batch]:
    return [batch for batch, _ in zip(task.train_batches(0), range(3), strict=False)]


@pytest.fixture(scope="module")
def sequence(task: SequenceTask) -> list[Batch]:
    """One sequence of 512 tokens without padding, more than the 384 features: all that CorDA in PEFT can read."""
    text = " ".join(task.tables[0].texts[:60])
    return [dict(task.tokenizer(text, truncation=True, max_length=512, return_tensors="pt"))]


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(r=8, lora_alpha=16, task_type="SEQ_CLS", target_modules=list(TARGET_MODULES), **options)


def ours(task: SequenceTask, method: str, batches: list[Batch] | None, **options: Any) -> InitPlan:
    model = get_peft_model(task.build_model(0), lora())
    return compute_plan(
        model, batches, InitConfig.from_dict({"method": method, "base": "keep", **options}), progress=False
    )


def sites(model: Any) -> dict[str, Site]:
    return {site.name: site for site in find_sites(model)[0]}


def product_errors(plan: InitPlan, theirs: dict[str, Site]) -> dict[str, float]:
    """The relative difference of s·B·A at every site."""
    errors = {}
    for name, site in theirs.items():
        mine = plan.sites[name].scaling * plan.sites[name].B.double() @ plan.sites[name].A.double()
        their = site.scaling * site.B.detach().double() @ site.A.detach().double()
        errors[name] = float((mine - their).norm() / their.norm())
    assert len(errors) == 24
    return errors


def product_error(plan: InitPlan, theirs: dict[str, Site]) -> float:
    """The largest of them."""
    return max(product_errors(plan, theirs).values())


def smallest_cosine(inner: Tensor, outer: Tensor) -> float:
    """Cosine of the largest principal angle between the row space of `inner` and that of `outer`."""
    one, other = (torch.linalg.qr(M.detach().double().mT).Q for M in (inner, outer))
    return float(torch.linalg.svdvals(one.mT @ other).min())


def corda_of_peft(task: SequenceTask, batches: list[Batch]) -> dict[str, Site]:
    base = task.build_model(0)
    config = lora(init_lora_weights="corda", corda_config=CordaConfig(corda_method="ipm"))

    def run() -> None:
        for batch in batches:
            base(**batch)

    preprocess_corda(base, config, run_model=run)
    return sites(get_peft_model(base, config))


def eva_of_peft(task: SequenceTask, batches: list[Batch], **options: Any) -> dict[str, Site]:
    model = get_peft_model(task.build_model(0), lora(init_lora_weights="eva", eva_config=EvaConfig(**options)))
    unlabelled = [{k: v for k, v in batch.items() if k != "labels"} for batch in batches]
    initialize_lora_eva_weights(model, unlabelled, show_progress_bar=False)
    return sites(model)


@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_pissa_and_olora_agree(task: SequenceTask, method: str) -> None:
    """They differ by what rounding makes of each W: 2e-7 to 1e-4 by its spectrum; the truncated SVD by 1e-3 of ‖W‖."""
    theirs = sites(get_peft_model(task.build_model(0), lora(init_lora_weights=method)))
    model, bound = task.build_model(0), {"pissa": bounds.truncation, "olora": bounds.leading_columns}[method]
    exact = product_errors(ours(task, method, None, exact_svd=True), theirs)
    for name, error in product_errors(ours(task, method, None), theirs).items():
        W = model.get_submodule(name).weight.detach()
        assert exact[name] < bound(W, 8), name
        largest = 1e-3 * W.norm() / torch.linalg.svdvals(W)[:8].norm() if method == "pissa" else bound(W, 8)
        assert error < largest, name
    assert product_error(ours(task, "olora" if method == "pissa" else "pissa", None), theirs) > 0.5  # the control


def test_pissa_by_subspace_iteration_is_an_approximation(task: SequenceTask) -> None:
    """Eckart–Young: nothing of rank r is nearer to W than ours; PEFT's iteration without oversampling stays away."""
    mine, model = ours(task, "pissa", None), task.build_model(0)

    def rest(niter: int) -> float:
        torch.manual_seed(0)
        theirs = sites(get_peft_model(task.build_model(0), lora(init_lora_weights=f"pissa_niter_{niter}")))
        ratios = []
        for name, site in theirs.items():
            W = model.get_submodule(name).weight.detach().double()
            best = float(
                (W - mine.sites[name].scaling * mine.sites[name].B.double() @ mine.sites[name].A.double()).norm()
            )
            ratios.append(float((W - site.scaling * (site.B.double() @ site.A.double())).norm()) / best)
        assert min(ratios) > 1 - 1e-6
        return max(ratios)

    assert rest(1) > rest(16) > 1 + 1e-6


def test_corda_agrees_on_one_sequence(task: SequenceTask, sequence: list[Batch]) -> None:
    """PEFT inverts the damped covariance in float32, so that they differ by eps times its condition of 1e4 or so."""
    theirs, model = corda_of_peft(task, sequence), task.build_model(0)
    with recorded(model, list(theirs)) as seen, torch.no_grad():
        model(**sequence[0])
    other = product_errors(ours(task, "corda", sequence, damping=1.0), theirs)  # the control
    for name, error in product_errors(ours(task, "corda", sequence), theirs).items():
        C = seen[name][0].double().mT @ seen[name][0].double()
        D = torch.linalg.eigvalsh(C + 0.01 * C.diagonal().mean() * torch.eye(len(C)))
        bound = bounds.inverse(float(D[-1] / D[0]), dtype=torch.float32)
        assert error < bound < other[name], name


def test_corda_in_peft_depends_on_how_rows_are_batched(task: SequenceTask, sequence: list[Batch]) -> None:
    """It divides each batch by that batch's own largest input, so its covariance is not that of the tokens."""
    assert peft.__version__.startswith(PINNED)
    model = task.build_model(0)
    layer = model.bert.encoder.layer[0].attention.self.query
    with torch.no_grad():
        hidden = model.bert.embeddings(sequence[0]["input_ids"])[0]
    halves = [hidden[:100], 3.0 * hidden[100:]]

    def covariance(parts: list[Tensor]) -> Tensor:
        config = lora(init_lora_weights="corda", corda_config=CordaConfig(corda_method="ipm"))
        config.target_modules = {"layer.0.attention.self.query"}
        from peft.tuners.lora.corda import calib_cov_distribution

        calib_cov_distribution(model, config, lambda: [layer(part[None]) for part in parts], None, None)
        C = layer.covariance_matrix
        return C / C.norm()

    once, twice = covariance([torch.cat(halves)]), covariance(halves)
    assert float((once - twice).norm()) > 0.05
    assert float((once - covariance([torch.cat(halves)])).norm()) < 1e-6  # the control


def test_corda_in_peft_crashes_with_more_than_one_sequence(task: SequenceTask, batches: list[Batch]) -> None:
    assert peft.__version__.startswith(PINNED)
    with pytest.raises(RuntimeError):
        corda_of_peft(task, batches[:1])
    assert len(ours(task, "corda", batches[:1]).sites) == 24  # ours reads it


def test_eva_agrees_on_the_subspace(task: SequenceTask, batches: list[Batch]) -> None:
    """PEFT keeps rho·r components of an incremental, randomised PCA; its leading half lies within our exact ones."""
    one = batches[:1]
    theirs = eva_of_peft(task, one, rho=1.0)
    mine, uncentred = ours(task, "eva", one), ours(task, "eva", one, center=False)
    cosines = {name: smallest_cosine(site.A[:4], mine.sites[name].A) for name, site in theirs.items()}
    printed = {name: smallest_cosine(site.A[:4], uncentred.sites[name].A) for name, site in theirs.items()}
    assert min(cosines.values()) > 0.99
    assert min(printed.values()) < min(
        cosines.values()
    )  # eq. 39 as printed does not subtract the mean, EVA's code does
    assert sum(printed.values()) < sum(cosines.values())
    scrambled = [smallest_cosine(torch.randn_like(site.A[:4]), mine.sites[name].A) for name, site in theirs.items()]
    assert max(scrambled) < 0.5  # the control


def test_eva_in_peft_cannot_read_labels_of_a_classifier(task: SequenceTask, batches: list[Batch]) -> None:
    assert peft.__version__.startswith(PINNED)
    model = get_peft_model(task.build_model(0), lora(init_lora_weights="eva", eva_config=EvaConfig(rho=1.0)))
    with pytest.raises(RuntimeError):
        initialize_lora_eva_weights(model, batches[:1], show_progress_bar=False)
    assert len(ours(task, "eva", batches[:1]).sites) == 24  # ours reads them


def loraga_of_peft(task: SequenceTask, batches: list[Batch], factor: float = 1.0) -> dict[str, Site]:
    loraga = pytest.importorskip("peft.tuners.lora.loraga", reason="this PEFT has no LoRA-GA")
    base = task.build_model(0)
    config = lora(init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig())

    def step() -> None:
        base.eval()
        for batch in batches:
            (factor * base(**batch).loss).backward()

    loraga.preprocess_loraga(base, config, step)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return sites(get_peft_model(base, config))


def test_lora_ga_agrees_on_both_subspaces(task: SequenceTask, batches: list[Batch]) -> None:
    theirs, mine = loraga_of_peft(task, batches), ours(task, "lora_ga", batches)
    for name, site in theirs.items():
        # PEFT's come from a randomised SVD with a few iterations, which leaves an angle of 2 degrees; 6 are allowed
        assert smallest_cosine(site.A, mine.sites[name].A) > 0.995
        assert smallest_cosine(site.B.mT, mine.sites[name].B.mT) > 0.995
    other = ours(task, "lora_ga", batches[:1])
    assert min(smallest_cosine(s.A, other.sites[n].A) for n, s in theirs.items()) < 0.9  # the control


def test_lora_ga_in_peft_starts_at_the_size_of_the_gradient(task: SequenceTask, batches: list[Batch]) -> None:
    """PEFT multiplies B by the gradient's singular values, so its start scales with the loss; the paper's does not."""
    assert peft.__version__.startswith(PINNED)

    def size(found: dict[str, Site]) -> float:
        return sum(float((s.B.detach() @ s.A.detach()).norm()) for s in found.values())

    once, tenfold = (size(loraga_of_peft(task, batches[:1], factor)) for factor in (1.0, 10.0))
    assert tenfold / once == pytest.approx(10.0, rel=0.05)

    def mine(factor: float) -> float:
        model = get_peft_model(task.build_model(0), lora())
        config = InitConfig(method="lora_ga", base="keep")
        plan = compute_plan(model, batches[:1], config, loss=lambda m, b: factor * m(**b).loss, progress=False)
        return sum(float((s.B @ s.A).norm()) for s in plan.sites.values())

    assert mine(10.0) / mine(1.0) == pytest.approx(1.0, rel=1e-3)


def test_the_pinned_version_is_the_one_installed() -> None:
    assert version("peft").startswith(PINNED), "look through the defects above again, then move the pin"
