"""Properties of every random use of the library (`fuzz_cases`): a correct plan, or one documented error."""

from __future__ import annotations

import copy
import re
import signal
import tempfile
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from peft import PeftModel
from tests.fuzz_cases import Case, adapted, base_of, cases, start
from torch import Tensor, nn

from cntlora import InitConfig, InitReport, save_adapter
from cntlora.methods.method import all_options
from cntlora.model.sites import Site, find_sites

SECONDS = 20
"""After which a case counts as hanging."""
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
ARGUMENTS = ("batches", "token_mask", "max_memory", "on_missing", "loss", "adapter_name", "forward=")


def outcomes(count: int, first: int = 0) -> Counter[str]:
    """Judge so many cases, the same ones every time for the same `first`; the number of each outcome.

    A case that is judged wrong ends it with an error that shows the case, which can be pasted into a test.
    """
    found: Counter[str] = Counter()

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @seed(first)
    @given(cases)
    def run(case: Case) -> None:
        found[judge(case)] += 1

    run()
    return found


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raise AssertionError in a block that takes longer; only in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def hangs(*_: object) -> None:
        raise AssertionError(f"not ended after {seconds} s")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def as_it_is(model: nn.Module, weights: bool) -> dict[str, Any]:
    """Hooks, modes and `requires_grad` of a model and the random states; with `weights` all values besides."""
    named = list(model.named_modules())
    found = {
        "hooks": {
            f"{n}.{k}": [id(h) for h in getattr(m, k).values()] for n, m in named for k in HOOKS if getattr(m, k)
        },
        "modes": {n: m.training for n, m in named if "lora_" not in n},
        "random": bits(torch.random.get_rng_state()),
    }
    if weights:
        found["values"] = {n: bits(t) for n, t in model.state_dict().items()}
        attention = any(isinstance(m, nn.MultiheadAttention) for _, m in named)  # PEFT makes its parameters anew
        found["wanted"] = {
            n: (attention or id(p), p.requires_grad, p.grad is None) for n, p in model.named_parameters()
        }
        found["config"] = repr(model.peft_config)
    return found


def documented(error: Exception, case: Case, model: nn.Module) -> bool:
    """Return whether an error is one line that names a site, a batch or an option."""
    options = [*(f.name for f in fields(InitConfig)), *all_options(), "InitConfig option"]
    sites = [n for n, m in model.named_modules() if hasattr(m, "lora_A")]
    names = [f"site {n.removeprefix('base_model.model.')}" for n in sites] + ["adapter '"]
    message = str(error)
    told = any(name in message for name in (*names, *ARGUMENTS)) or re.search(r"\bbatch \d", message)
    told = told or any(re.search(rf"\b{name}\b", message) for name in options)
    return type(error) in (ValueError, TypeError) and bool(told) and "\n" not in message and len(message) < 600


def judge(case: Case) -> str:
    """Return the outcome of a case: "plan", "refused: " and the error, or "no adapter" where PEFT itself refuses.

    Raises:
        AssertionError: if something does not hold that must.
    """
    state = torch.random.get_rng_state()
    try:
        with at_most(SECONDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _judged(case)
    finally:
        torch.random.set_rng_state(state)


def _judged(case: Case) -> str:
    model = adapted(case)
    if model is None:
        return "no adapter"
    model.train(case.training)
    before = as_it_is(model, weights=True)
    pristine = {n: bits(p) for n, p in model.named_parameters() if ".lora_" not in n}
    untouched = {s.name: copy.deepcopy(s.base) for s in find_sites(model)[0]}
    try:
        report = start(case, model)
    except (ValueError, TypeError) as error:
        assert documented(error, case, model), f"{type(error).__name__}: {error}"
        after = as_it_is(model, weights=True)
        assert after == before, f"an error left its traces: {[key for key in before if before[key] != after[key]]}"
        return f"refused: {error}"
    after = as_it_is(model, weights=False)
    assert after["hooks"] == {k: v for k, v in before["hooks"].items() if k in after["hooks"]}, "a hook was left"
    assert all(before["modes"].get(n, mode) == mode for n, mode in after["modes"].items()), "modes"
    assert after["random"] == before["random"], "the random generator was moved"
    kept = {n: bits(p) for n, p in model.named_parameters() if ".lora_" not in n}
    if report.config.effective_base != "subtract":
        names = {n.replace(".base_layer", ""): v for n, v in pristine.items()}
        assert {n.replace(".base_layer", ""): v for n, v in kept.items()} == names, "a base weight was changed"
    sites = [s for s in find_sites(model)[0] if s.name in report.sites and report.sites[s.name]["rank"] > 0]
    for site in sites:
        check_site(site, untouched[site.name], report)
    if case.reload and sites:
        check_reloaded(case, model, sites)
    return "plan"


def product(site: Site) -> Tensor:
    """s·B·A (k, d) in float64."""
    return site.scaling * (site.B.double().flatten(1) @ site.A.double().flatten(1))


def probed(layer: nn.Module, site: Site) -> Tensor:
    """Return the output of a layer for a fixed input, in eval mode; of the kind that its base layer takes."""
    g, base = torch.Generator().manual_seed(1), site.base
    size = (2, 1, 3, 4) if isinstance(base, nn.Conv2d) else (2, 5, site.in_features)
    x = torch.randn(size, generator=g).to(site.A.dtype)
    training = layer.training
    with torch.no_grad():
        layer.eval()
        y = layer(x, x, x)[0] if isinstance(base, nn.MultiheadAttention) else layer(x)
    layer.train(training)
    return y.double()


def check_site(site: Site, base: nn.Module, report: InitReport) -> None:
    """Finite factors of the planned rank, and the layer's function at the start."""
    planned = report.sites[site.name]
    assert bool(site.A.isfinite().all() and site.B.isfinite().all()), f"{site.name}: NaN in the adapter"
    assert site.A.shape[0] == site.B.shape[1] == planned["file_rank"] == site.rank, f"{site.name}: ranks"
    if site.magnitude is not None and not bool(site.weight().norm(dim=1).all()):
        return  # PEFT's DoRA divides by the norm of a row of zeros, whatever the adapter is
    got, wanted = probed(site.layer, site), probed(base, site)
    moved = report.config.effective_base == "keep"
    plain = isinstance(base, nn.Linear) or type(base).__name__ == "Conv1D"
    if moved and (site.magnitude is not None or not plain):
        return
    size = torch.randn(2, 5, site.in_features, generator=torch.Generator().manual_seed(1)).to(site.A.dtype).double()
    if moved:
        wanted = wanted + size @ product(site).mT
    halves = abs(site.scaling) * (site.B.double().flatten(1).abs() @ site.A.double().flatten(1).abs())
    room = float(wanted.abs().amax()) + float(size.abs().sum(-1).amax()) * float((halves + site.weight().abs()).amax())
    room *= 5 if site.magnitude is not None or not plain else 1
    off = float((got - wanted).abs().max())
    assert off <= 60 * torch.finfo(site.A.dtype).eps * room + 1e-30, (
        f"{site.name}: the start is off by {off:g} of {room:g}"
    )


def check_reloaded(case: Case, model: Any, sites: list[Site]) -> None:
    """The saved adapter, on a new base, adds to every site what the model in memory adds to the pristine weight."""
    fresh: Any = base_of(case)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, Path(folder) / "adapter")
        loaded: Any = PeftModel.from_pretrained(fresh, Path(folder) / "adapter")
    found = {site.name: site for site in find_sites(loaded)[0]}
    for site in sites:
        other = found[site.name]
        here, there = site.weight() - other.weight() + product(site), product(other)
        room = abs(site.scaling) * (site.B.double().norm() * site.A.double().norm()) + other.weight().norm()
        off = float((here - there).norm())
        assert off <= 8 * torch.finfo(site.A.dtype).eps * float(room) + 1e-30, f"{site.name}: reloaded off by {off:g}"
