"""Every combination of the paper's tables: it starts where it should, both factors train, plain PEFT reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests.tiny import adapted, base_model, logits, text_batches, train

from cntlora import InitConfig, initialize, save_adapter, start_diagnostics
from cntlora.lab.experiments.arms import Arm, parse_arm

TARGETS = ["query", "key", "value", "attention.output.dense"]
MODES = ("cross", "self", "shift")
PEERS = ("pissa", "olora", "corda", "lora_ga", "lora_one", "lora_da", "gora", "eva")
MORE = ("", "+vas", "+qr", "+dora", "+rslora", "+vas+dora", "+vas+rslora")
COMBINATIONS = (
    *(f"{mode}{more}" for mode in MODES for more in MORE),
    *(f"{mode}+p{p}" for mode in MODES for p in (0.1, 0.25, 0.5, 0.75)),
    *(f"shift+C{C}" for C in ("gaussian", 0.1, 1, 10)),
    *(f"{peer}{more}" for peer in PEERS for more in ("", "+dora", "+vas")),
    *(f"{mode}+{base}" for mode in MODES for base in ("paired", "subtract")),
)


def started(arm: Arm, **more: Any) -> Any:
    """A tiny BERT with the arm's adapter, initialised."""
    assert arm.init is not None
    # with a tolerance that real activations do not need: 24 features of a random model and few tokens
    tolerance = {"rtol": 1e-3} if arm.init["method"] in MODES else {}
    options = {**tolerance, **arm.init, **more}
    model = adapted("bert", target_modules=TARGETS, **arm.lora)
    initialize(model, text_batches(), InitConfig.from_dict(options), progress=False)
    return model


@pytest.mark.parametrize("name", COMBINATIONS)
def test_it_starts_trains_and_is_read_by_plain_peft(name: str, tmp_path: Path) -> None:
    model, batch = started(parse_arm(name)), text_batches(seed=9)[0]
    pristine = logits(base_model("bert"), batch)
    torch.testing.assert_close(logits(model, batch), pristine, rtol=1e-4, atol=1e-4)
    if not name.startswith("eva"):
        gradients = start_diagnostics(model, batch)
        assert all(g > 0 for g in (*gradients.gradient_A.values(), *gradients.gradient_B.values()))
    train(model, text_batches(), steps=2, lr=0.02)
    moved = logits(model, batch)
    assert (moved - pristine).abs().max() > 1e-3
    save_adapter(model, tmp_path / "adapter")
    read = PeftModel.from_pretrained(base_model("bert"), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(logits(read, batch), moved, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("mode", MODES)
def test_keep_is_the_control(mode: str) -> None:
    batch = text_batches(seed=9)[0]
    moved = logits(started(parse_arm(f"{mode}+keep")), batch) - logits(base_model("bert"), batch)
    assert moved.abs().max() > 1e-3
