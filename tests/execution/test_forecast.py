"""The forecast: what it says of passes and memory is what the call then does, and nothing is written."""

from __future__ import annotations

import pytest
import torch
from tests.cases import SIZES, mlp, token_batches, wrapped
from tests.tiny import adapted, changed, state, text_batches

import cntlora
from cntlora import InitConfig, Self
from cntlora.execution import reading
from cntlora.execution.forecast import Forecast, forecast


@pytest.mark.parametrize("method", ["descent", "self", "eva", "lora_ga", "pissa", None])
def test_a_forecast_writes_nothing_and_counts_what_is_read(method: str | None) -> None:
    model, batches = adapted("bert"), text_batches()
    before, random = state(model), torch.get_rng_state()
    found = forecast(model, iter(batches), InitConfig(method=method, num_batches=3))
    assert not changed(before, model) and torch.equal(random, torch.get_rng_state())
    assert found.method == (method or "whitened") and found.sites == 4
    assert 0 <= found.data_seconds <= found.seconds and found.passes == 1 and found.peak > 0
    assert (found.data_seconds == 0) == (method == "pissa")
    assert f"{found.method}, 4 sites: about" in str(found) and "in one pass" in str(found)


def test_passes_are_those_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    config, batches = InitConfig(method="self"), token_batches(SIZES)
    plenty = forecast(wrapped(mlp()), batches, config)
    monkeypatch.setattr(reading, "free_bytes", lambda device: 0.65 * plenty.peak)
    tight = forecast(wrapped(mlp()), batches, config)
    plan = cntlora.compute_plan(wrapped(mlp()), batches, config)
    assert tight.passes == plan.memory["passes"] > plenty.passes == 1
    assert tight.peak <= plenty.peak and tight.free == 0.65 * plenty.peak
    assert f"{tight.passes} passes" in str(tight)


def test_the_callers_batch_weights_and_errors_hold() -> None:
    config = InitConfig(method=Self(batch_weights=(1.0, 0.5)), num_batches=2)
    sites = cntlora.compute_plan(wrapped(mlp()), token_batches(SIZES), config).sites
    assert forecast(wrapped(mlp()), token_batches(SIZES), config).sites == len(sites)
    with pytest.raises(ValueError, match="reads inputs, so it needs some"):
        forecast(wrapped(mlp()), None, InitConfig(method="self"))


def test_a_system_that_does_not_say_what_is_free() -> None:
    one = Forecast("self", 2, 1.0, 3.0, 1, 2.0**20, None)
    assert str(one) == ("self, 2 sites: about 3 s, 1 s of it in one pass over the batches; about 1MiB above the model")
